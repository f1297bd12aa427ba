"""Label maps and names."""

from __future__ import annotations

import numpy as np
import pytest

from nnssl.dataset_conversion.labels import label_names, map_values, merged_names, parse_label_map, whole_values
from nnssl.errors import UserError


def test_parse_label_map():
    assert parse_label_map(None) is None
    assert parse_label_map("1:1, 2:1,255:0") == {0: 0, 1: 1, 2: 1, 255: 0}


@pytest.mark.parametrize("text", ["", "1", "1:", "a:b", "1:1,1:2", "1:3", "1:0", "-1:1"])
def test_parse_label_map_refuses(text: str):
    with pytest.raises(UserError):
        parse_label_map(text)


def test_label_names():
    assert label_names({0, 1, 2}, None) == {"background": 0, "label1": 1, "label2": 2}
    assert label_names({0, 2}, ["a", "b"]) == {"background": 0, "a": 1, "b": 2}
    for values, names in (({0, 2}, None), ({0}, None), ({0, 3}, ["a", "b"]), ({1}, ["background"])):
        with pytest.raises(UserError):
            label_names(values, names)


def test_map_values_equals_the_definition_voxel_by_voxel():
    label = np.random.default_rng(0).integers(0, 5, (3, 4, 5)).astype(np.float32)
    mapping = {0: 0, 1: 2, 2: 1, 3: 0, 4: 2}
    mapped, counts = map_values(label, whole_values(label), mapping, "x")
    np.testing.assert_array_equal(mapped, np.vectorize(mapping.get)(label))
    values, numbers = np.unique(mapped, return_counts=True)
    assert counts == dict(zip(values.tolist(), numbers.tolist(), strict=True))


def test_merged_names():
    labels = {"background": 0, "a": 1, "b": 2, "c": 3, "ignore": 4}
    assert merged_names(labels, {0: 0, 1: 1, 2: 0, 3: 1, 4: 2}) == {"background": 0, "a+c": 1, "ignore": 2}
    for mapping in ({0: 0, 1: 1, 2: 1, 3: 1, 4: 1}, {0: 0, 1: 1}, {0: 0, 1: 2, 2: 2, 3: 2, 4: 1}):
        with pytest.raises(UserError):
            merged_names(labels, mapping)
    with pytest.raises(UserError, match="regions"):
        merged_names({"background": 0, "whole": [1, 2]}, {0: 0, 1: 1})
