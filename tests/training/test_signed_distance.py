"""Signed distance maps against distances between all pairs of voxels, and their laws."""

import threading

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.distance import cdist

from nnssl.training.label_space import LabelSpace
from nnssl.training.signed_distance import distance_maps, signed_distance


def blob(shape, seed=0):
    """Return a mask of boxes: some voxels inside have no neighbor outside."""
    mask = np.zeros(shape, bool)
    for corner in np.random.default_rng(seed).integers(0, min(shape) - 4, (2, len(shape))):
        mask[tuple(slice(c, c + 5) for c in corner)] = True
    return mask


@pytest.mark.parametrize("shape", [(14, 11), (9, 8, 10)])
def test_map_pair_by_pair(shape):
    mask = blob(shape)
    inside, outside = np.argwhere(mask), np.argwhere(~mask)
    pairs = cdist(inside, outside)
    expected = np.zeros(shape)
    expected[mask] = np.where(pairs.min(1) == 1, 0, -pairs.min(1) / pairs.min(1).max())
    expected[~mask] = pairs.min(0) / pairs.min(0).max()
    got, known = signed_distance(mask)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert known.all()
    assert got.min() == -1
    assert got.max() == 1
    assert np.array_equal(got <= 0, mask)


@pytest.mark.parametrize(("fill", "value"), [(False, 1), (True, -1)])
def test_absent_and_filling_classes_are_outside_and_inside_everywhere(fill, value):
    got, known = signed_distance(np.full((4, 5), fill))
    assert (got == value).all()
    assert known.all()


@pytest.mark.parametrize(("fill", "passes"), [(False, 0), (True, 0), (None, 2)])
def test_only_classes_with_a_boundary_cost_distance_transforms(monkeypatch, fill, passes):
    calls, edt = [], ndimage.distance_transform_edt
    monkeypatch.setattr(ndimage, "distance_transform_edt", lambda voxels: calls.append(1) or edt(voxels))
    signed_distance(blob((14, 11)) if fill is None else np.full((14, 11), fill))
    assert len(calls) == passes


def test_images_and_classes_are_transformed_side_by_side(monkeypatch):
    meeting = threading.Barrier(2, timeout=30)  # lets nobody through until two threads are in it

    def transform(mask, ignored):
        meeting.wait()
        return np.zeros(mask.shape, np.float32), mask

    monkeypatch.setattr("nnssl.training.signed_distance.signed_distance", transform)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    maps, _ = distance_maps(LabelSpace(2), torch.zeros(2, 1, 8, 8, dtype=torch.int16))
    assert maps.shape == (2, 1, 8, 8)


def test_what_a_thread_raises_reaches_the_caller(monkeypatch):
    def transform(mask, ignored):
        raise MemoryError("full")

    monkeypatch.setattr("nnssl.training.signed_distance.signed_distance", transform)
    with pytest.raises(MemoryError, match="full"):
        distance_maps(LabelSpace(2), torch.zeros(2, 1, 8, 8, dtype=torch.int16))


def test_a_distance_is_known_where_ignored_voxels_cannot_change_it():
    mask = np.zeros((1, 12), bool)
    mask[0, 2:4] = True
    ignored = np.zeros_like(mask)
    ignored[0, 9] = True
    got, known = signed_distance(mask, ignored)
    # voxel 6 is 3 from the class and 3 from the ignored voxel, voxel 7 is nearer to the latter
    assert known[0].tolist() == [True] * 7 + [False] * 5
    for label in (False, True):  # whatever the ignored voxel is, known distances, up to their scale, stay
        whole = mask.copy()
        whole[0, 9] = label
        other, _ = signed_distance(whole)
        ratio = other[known & (got != 0)] / got[known & (got != 0)]
        assert np.allclose(ratio, ratio[0])
    absent, known = signed_distance(np.zeros_like(mask), ignored)
    assert not known.any()
    assert np.isfinite(absent).all()


def test_maps_follow_classes_and_regions():
    label = torch.zeros(2, 1, 12, 12, dtype=torch.int16)
    label[0, :, 2:8, 3:9], label[1, :, 4:7, 4:7], label[1, :, 0] = 1, 2, 3
    space = LabelSpace(3, ignore_label=3)
    maps, known = distance_maps(space, label)
    assert maps.shape == known.shape == (2, 2, 12, 12)
    for item in range(2):
        for channel, c in enumerate((1, 2)):
            expected = signed_distance((label[item, 0] == c).numpy(), (label[item, 0] == 3).numpy())
            assert np.array_equal(maps[item, channel].numpy(), expected[0])
            assert np.array_equal(known[item, channel].numpy(), expected[1])
    assert not known[1, :, 0].any()
    regions = torch.cat([(label == 1) | (label == 2), label == 2], 1)
    nested, _ = distance_maps(LabelSpace(2, regions=True), regions)
    assert nested.shape == (2, 2, 12, 12)
    assert (nested[0, 1] == 1).all()
    assert torch.equal(nested[0, 0] <= 0, regions[0, 0])
