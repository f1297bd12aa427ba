"""Label sets: dataset.json blocks, regions, ignore label, derived classes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nnssl.errors import UserError
from nnssl.evaluation.labels import LabelSet, label_values


def test_regions_ignore_and_background():
    labels = LabelSet.from_block({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "ignore": 4}, closed=True)
    assert labels.classes == {"whole": (1, 2, 3), "core": (2, 3)}
    assert labels.ignore == 4
    array = np.array([0, 1, 2, 3, 4])
    assert labels.mask(array, "core").tolist() == [False, False, True, True, False]
    assert labels.unknown(np.array([0, 4, 5, 1])) == [5]
    assert labels.as_json() == {"whole": [1, 2, 3], "core": [2, 3]}


def test_derived_classes_are_the_values():
    assert LabelSet.from_values([0, 3, 1, 3]).as_json() == {"1": 1, "3": 3}
    with pytest.raises(UserError, match="background"):
        LabelSet.from_values([0])


@pytest.mark.parametrize("array", [[[0, 7], [255, 7]], [[-3, 0], [5, 5]], [[0, 70000], [1, 1]]])
def test_label_values_equal_unique(array):
    array = np.array(array)
    assert label_values(array) == np.unique(array).tolist()


@pytest.mark.parametrize("block", [{"background": 0}, {"a": "1"}, {"a": []}, {"a": [1, 2.5]}, {"a": True}])
def test_a_broken_block_is_refused(block):
    with pytest.raises(UserError):
        LabelSet.from_block(block)


@pytest.mark.parametrize("text", ["{", json.dumps({"name": "no labels"}), "[1]"])
def test_a_broken_dataset_json_is_refused(tmp_path, text):
    path = tmp_path / "dataset.json"
    path.write_text(text)
    with pytest.raises(UserError, match="labels"):
        LabelSet.from_dataset_json(path)
    with pytest.raises(UserError, match="readable"):
        LabelSet.from_dataset_json(tmp_path / "absent.json")
