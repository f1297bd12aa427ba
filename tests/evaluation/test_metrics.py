"""The mm protocol against the surface-distance package, boxes, spheres, symmetry and scaling laws."""

from __future__ import annotations

import numpy as np
import pytest
import surface_distance
from scipy.spatial.distance import cdist

from nnssl.evaluation import metrics
from nnssl.evaluation.metrics import MM_METRICS, assd, dice, hd95, jaccard, mm_metrics, nsd

SPACINGS = {2: (0.7, 1.9), 3: (3.0, 0.7, 1.1)}
SHAPES = {2: (24, 31), 3: (9, 17, 21)}


def box(start, stop, shape=(14, 16, 30)):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
    return mask


def area_by_distance(distances, areas):
    """Sum the areas of equal distances: the order among equals is free."""
    keys = np.round(distances, 9)
    return {key: areas[keys == key].sum() for key in np.unique(keys)}


def sphere(radius, size=41, center=20):
    return ((np.indices((size,) * 3) - center) ** 2).sum(0) <= radius**2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the package's own use of old scipy names
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_surface_distance_package(blobs, ndim, seed):
    prediction, reference = blobs(seed, SHAPES[ndim])
    spacing = SPACINGS[ndim]
    theirs = surface_distance.compute_surface_distances(reference, prediction, spacing)
    ours = metrics.surface_distances(prediction, reference, spacing)
    for direction, mask in (("gt_to_pred", "gt"), ("pred_to_gt", "pred")):
        np.testing.assert_allclose(ours[f"distances_{direction}"], theirs[f"distances_{direction}"], rtol=1e-12)
        mine, expected = (
            area_by_distance(s[f"distances_{direction}"], s[f"surfel_areas_{mask}"]) for s in (ours, theirs)
        )
        assert mine == pytest.approx(expected)
    values = mm_metrics(prediction, reference, spacing, tolerance_mm=0.9)
    assert values["hd95"] == pytest.approx(surface_distance.compute_robust_hausdorff(theirs, 95))
    assert values["nsd"] == pytest.approx(surface_distance.compute_surface_dice_at_tolerance(theirs, 0.9))
    assert values["dice"] == pytest.approx(surface_distance.compute_dice_coefficient(reference, prediction))
    to_prediction, to_reference = surface_distance.compute_average_surface_distance(theirs)
    weights = theirs["surfel_areas_gt"].sum(), theirs["surfel_areas_pred"].sum()
    assert values["assd"] == pytest.approx(np.average([to_prediction, to_reference], weights=weights))


@pytest.mark.parametrize(("axis", "spacing", "shift"), [(0, 3.0, 2), (1, 0.7, 4), (2, 1.1, 5)])
def test_shifted_boxes_are_exact(axis, spacing, shift):
    start, stop = [2, 2, 2], [8, 10, 12]
    length = stop[axis] - start[axis]
    reference = box(start, stop)
    prediction = np.roll(reference, shift, axis)
    values = mm_metrics(prediction, reference, (3.0, 0.7, 1.1), tolerance_mm=shift * spacing)
    overlap = length - shift
    assert values["dice"] == pytest.approx(overlap / length)
    assert values["jaccard"] == pytest.approx(overlap / (2 * length - overlap))
    assert values["hd95"] == pytest.approx(shift * spacing)
    assert values["nsd"] == 1  # no element is farther than the shift
    assert nsd(prediction, reference, (3.0, 0.7, 1.1), tolerance_mm=0.9 * spacing) < 1


def test_concentric_spheres_within_half_a_voxel():
    for spacing in (1.0, 0.4):
        values = mm_metrics(sphere(17), sphere(11), (spacing,) * 3, tolerance_mm=7 * spacing)
        assert values["hd95"] == pytest.approx(6 * spacing, abs=0.5 * spacing)
        # elements fill a band around the surface and the nearest of the other band is found: low by half a voxel
        assert values["assd"] == pytest.approx(5.5 * spacing, abs=0.5 * spacing)
        assert values["dice"] == pytest.approx(2 * 11**3 / (11**3 + 17**3), abs=0.02)
        assert values["nsd"] == 1


@pytest.mark.parametrize("ndim", [2, 3])
def test_swapping_the_masks_changes_nothing(blobs, ndim):
    first, second = blobs(7, SHAPES[ndim])
    there, back = (mm_metrics(*pair, SPACINGS[ndim]) for pair in ((first, second), (second, first)))
    for name in MM_METRICS:
        assert there[name] == pytest.approx(back[name]), name


@pytest.mark.parametrize("ndim", [2, 3])
def test_distances_scale_with_the_spacing_and_overlaps_do_not(blobs, ndim):
    first, second = blobs(3, SHAPES[ndim])
    spacing = SPACINGS[ndim]
    small = mm_metrics(first, second, spacing, tolerance_mm=1.0)
    large = mm_metrics(first, second, [2.5 * s for s in spacing], tolerance_mm=2.5)
    for name in ("dice", "jaccard", "nsd"):
        assert large[name] == pytest.approx(small[name]), name
    for name in ("hd95", "assd"):
        assert large[name] == pytest.approx(2.5 * small[name]), name


def test_identical_masks_are_perfect(blobs):
    mask, _ = blobs(0, SHAPES[3])
    perfect = {"dice": 1, "jaccard": 1, "hd95": 0, "assd": 0, "nsd": 1}
    assert mm_metrics(mask, mask, SPACINGS[3], tolerance_mm=0) == perfect


def test_position_in_the_image_changes_nothing(blobs):
    first, second = blobs(5, (8, 9, 10))
    padded = [np.pad(mask, ((3, 1), (0, 7), (2, 2))) for mask in (first, second)]
    assert mm_metrics(*padded, (2.0, 1.0, 0.5)) == pytest.approx(mm_metrics(first, second, (2.0, 1.0, 0.5)))


def test_empty_masks():
    empty, full = np.zeros((4, 6, 8), bool), box((1, 1, 1), (2, 3, 4), (4, 6, 8))
    spacing = (3.0, 2.0, 0.5)
    diagonal = np.sqrt(12**2 + 12**2 + 4**2)
    assert mm_metrics(empty, empty, spacing) == dict.fromkeys(MM_METRICS)
    one_empty = {"dice": 0, "jaccard": 0, "hd95": diagonal, "assd": diagonal, "nsd": 0}
    assert mm_metrics(empty, full, spacing) == pytest.approx(one_empty)
    assert mm_metrics(full, empty, spacing) == pytest.approx(one_empty)
    assert (dice(empty, empty), jaccard(empty, empty), hd95(empty, empty, spacing)) == (None, None, None)
    assert dice(full, empty) == jaccard(full, empty) == 0


def test_no_pair_of_masks_is_farther_apart_than_the_diagonal():
    first, last = np.zeros((2, 4, 6, 8), bool)
    first[0, 0, 0] = last[-1, -1, -1] = True
    spacing = (3.0, 2.0, 0.5)
    largest = metrics.surface_distances(first, last, spacing)["distances_gt_to_pred"].max()
    assert largest <= metrics.image_diagonal(first.shape, spacing)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_single_slice_is_a_2d_image(blobs, axis):
    first, second = blobs(2, SHAPES[2])
    flat = mm_metrics(first, second, (0.7, 1.9))
    spacing = np.insert([0.7, 1.9], axis, 8.0)
    assert mm_metrics(np.expand_dims(first, axis), np.expand_dims(second, axis), spacing) == flat
    assert flat["assd"] == assd(first, second, (0.7, 1.9))
    line = np.zeros((1, 1, 9), bool), np.ones((1, 1, 9), bool)
    line[0][0, 0, 3:] = True
    assert mm_metrics(*line, (1.0, 1.0, 2.0))["dice"] == pytest.approx(0.8)


@pytest.mark.parametrize("near", [1e-9, 2, 1e9])
@pytest.mark.parametrize("cost", [0, 1e9])
def test_both_searches_give_the_brute_force_distances(blobs, monkeypatch, near, cost):
    monkeypatch.setattr(metrics, "NEAR_STEPS", near)
    monkeypatch.setattr(metrics, "FAR_POINT_COST", cost)
    first, second = blobs(1, (7, 11, 13))
    second = second & (np.indices(second.shape)[2] < 3)
    spacing = np.array([3.0, 0.7, 1.1])
    expected = cdist(np.argwhere(first) * spacing, np.argwhere(second) * spacing).min(axis=1)
    np.testing.assert_allclose(metrics.directed_distances(first, second, spacing), expected, rtol=1e-12)


def test_float32_spacing_does_not_decide_about_the_tolerance():
    step = float(np.float32(0.3))  # 0.30000001: ten steps exceed 3 mm by rounding alone
    reference = box((2, 2, 2), (10, 12, 14))
    assert nsd(np.roll(reference, 10, 2), reference, (step,) * 3, tolerance_mm=3.0) == 1


def test_wrong_shapes_are_refused():
    mask = np.ones((3, 4), bool)
    with pytest.raises(ValueError, match="shape"):
        dice(mask, mask.T)
    with pytest.raises(ValueError, match="spacing"):
        hd95(mask, mask, (1.0, 1.0, 1.0))
