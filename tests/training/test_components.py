"""The largest component of each class."""

import numpy as np
import pytest
import torch
from skimage.measure import label as skimage_label

from nnssl.training.components import largest_components


@pytest.mark.parametrize("size", [(20, 21), (8, 9, 10)])
def test_agrees_with_skimage(size):
    hard = torch.from_numpy(np.random.default_rng(0).choice([0, 0, 0, 1, 2], (3, 1, *size)))
    got = largest_components(hard).numpy()
    assert got.shape == hard.shape
    for before, after in zip(hard.numpy()[:, 0], got[:, 0], strict=True):
        assert set(np.unique(after)) == {0, 1, 2}
        for value in (1, 2):
            components = skimage_label(before == value)  # full connectivity is its default
            expected = components == 1 + np.bincount(components.ravel())[1:].argmax()
            assert np.array_equal(after == value, expected)


def test_regions_are_filtered_each_by_itself_and_inputs_stay():
    hard = torch.zeros(1, 2, 6, 6, dtype=torch.bool)
    hard[0, 0, 0, 0] = hard[0, 0, 3:5, 3:5] = hard[0, 1, 5, 5] = True
    given = hard.clone()
    got = largest_components(hard)
    assert got.dtype == torch.bool
    assert torch.equal(hard, given)
    assert got[0, 0].sum() == 4
    assert torch.equal(got[0, 1], hard[0, 1])


def test_corners_connect_and_an_empty_map_stays_empty():
    diagonal = torch.eye(5, dtype=torch.long)[None, None]
    assert torch.equal(largest_components(diagonal), diagonal)
    assert not largest_components(torch.zeros(2, 1, 4, 4, dtype=torch.long)).any()
