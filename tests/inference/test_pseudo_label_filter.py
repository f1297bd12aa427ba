"""What of a prediction counts as sure, stated as laws on small arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnssl.errors import UserError
from nnssl.inference.pseudo_label_filter import (
    STEPS,
    Box,
    Confidences,
    FilterOptions,
    agreement,
    apply_boxes,
    below,
    confidence,
    doubtful_components,
    most_stable,
    quantized,
)

SHAPE = (4, 10, 10)


def softmax_like(seed: int, channels: int = 3) -> np.ndarray:
    probs = np.random.default_rng(seed).dirichlet(np.ones(channels), SHAPE)
    return np.moveaxis(probs, -1, 0).astype(np.float32)


def two_classes() -> tuple[np.ndarray, np.ndarray]:
    """Return 1,000 voxels of each of two labels, with known confidences."""
    label = np.repeat([0, 1], 1000).reshape(2, 10, 100)
    sure = np.concatenate([np.linspace(0.95, 1, 1000), np.linspace(0.4, 0.8, 1000)])
    return label, quantized(sure.reshape(label.shape))


def test_confidence_is_that_of_the_decision():
    probs = softmax_like(0)
    assert np.array_equal(confidence(probs, False), np.take_along_axis(probs, probs.argmax(0)[None], 0)[0])
    regions = np.array([0.9, 0.2]).reshape(2, 1, 1, 1)
    assert confidence(regions, True).item() == pytest.approx(0.8)  # the second region is absent with 0.8


def test_thresholds_are_medians_per_class_capped_at_nine_tenths():
    label, steps = two_classes()
    counted = Confidences()
    counted.add(label, steps)
    thresholds = counted.thresholds(FilterOptions())
    assert thresholds[0] == 0.9
    assert thresholds[1] == pytest.approx(np.median(np.linspace(0.4, 0.8, 1000)), abs=1e-3)
    assert counted.thresholds(FilterOptions(quantile=0.25))[1] == pytest.approx(0.5, abs=1e-3)
    assert counted.thresholds(FilterOptions(threshold=0.7)) == {0: 0.7, 1: 0.7}
    unsure = below(label, steps, thresholds)
    assert not unsure[label == 0].any()
    assert unsure[label == 1].mean() == pytest.approx(0.5, abs=2e-3)


def test_thresholds_count_all_cases_together():
    label, steps = two_classes()
    together, apart = Confidences(), Confidences()
    together.add(label, steps)
    for half in (slice(0, 5), slice(5, 10)):
        apart.add(label[:, half], steps[:, half])
    assert together.thresholds(FilterOptions()) == apart.thresholds(FilterOptions())


def test_a_threshold_of_one_keeps_certainty_and_keep_all_keeps_everything():
    label = np.ones(SHAPE, int)
    steps = np.full(SHAPE, STEPS, np.uint16)
    steps[0] -= 1
    assert np.array_equal(below(label, steps, {1: 1.0}), steps < STEPS)
    counted = Confidences()
    counted.add(label, np.zeros(SHAPE, np.uint16))
    everything = counted.thresholds(FilterOptions(keep_all=True))
    assert not below(label, np.zeros(SHAPE, np.uint16), everything).any()


def test_small_components_are_doubtful_and_touching_corners_do_not_connect():
    label = np.zeros(SHAPE, int)
    label[0, :3, :3], label[0, 3, 3], label[2, 5:9, 5:9] = 1, 1, 2
    doubtful = doubtful_components(label, FilterOptions(min_component=2 / label.size))
    assert np.argwhere(doubtful).tolist() == [[0, 3, 3]]
    assert not doubtful_components(label, FilterOptions(min_component=1 / label.size)).any()
    assert doubtful_components(label, FilterOptions(min_component=1)).sum() == 10 + 16


def test_only_the_largest_component_of_each_class_is_kept():
    label = np.zeros(SHAPE, int)
    label[0, :2, :2], label[0, 5:9, 5:9], label[3, :2, :3], label[3, 8:, 8:] = 1, 1, 2, 2
    doubtful = doubtful_components(label, FilterOptions(min_component=0, largest_component=True))
    assert np.array_equal(doubtful, (label > 0) & ~_in(label, (0, 5, 5), (1, 9, 9)) & ~_in(label, (3, 0, 0), (4, 2, 3)))


def _in(label, low, high):
    inside = np.zeros(label.shape, bool)
    inside[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return inside


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 1000))
def test_agreement_is_symmetric_one_with_itself_and_within_bounds(a, b):
    first, second = (np.random.default_rng(seed).integers(0, 3, SHAPE) for seed in (a, b))
    assert agreement(first, first) == 1
    assert agreement(first, second) == agreement(second, first)
    assert 0 <= agreement(first, second) <= 1


def test_agreement_is_the_mean_dice_over_labels_that_occur():
    first, second = np.zeros((1, 1, 8), int), np.zeros((1, 1, 8), int)
    assert agreement(first, second) == 1  # nothing on either side
    first[..., :4], second[..., 2:4] = 1, 1
    second[..., 6:] = 2
    assert agreement(first, second) == pytest.approx((2 * 2 / 6 + 0) / 2)


def test_a_label_stays_in_its_grown_boxes_and_one_without_a_box_is_absent():
    probs = softmax_like(1)
    label, sure = apply_boxes(probs, [Box(1, (0, 0, 0), (4, 5, 10))])
    assert not (label == 2).any()
    assert not (label[:, 6:] == 1).any()
    grown = probs[:2, :, :6].argmax(0)  # a margin of one voxel
    assert np.array_equal(label[:, :6], grown)
    assert np.allclose(sure[:, :6], probs[:2, :, :6].max(0) / probs[:2, :, :6].sum(0), atol=1e-5)
    assert (sure[:, 6:] == 1).all()


def test_an_empty_box_is_searched_again_and_stays_unsure_without_any_probability():
    probs = np.zeros((3, *SHAPE), np.float32)
    probs[0], probs[1] = 0.8, 0.1
    probs[1, 1, 2:4, 2:4] = 0.2
    probs[1, 2, 6, 6] = 0.15
    label, sure = apply_boxes(probs, [Box(1, (0, 0, 0), (4, 8, 8)), Box(2, (0, 8, 8), (4, 10, 10))])
    inside = probs[1, :, :8, :8]
    assert np.array_equal(label[:, :8, :8] == 1, inside > 0.1)
    assert np.array_equal(sure[:, :8, :8][inside > 0.1], inside[inside > 0.1])
    assert (sure[:, 8:, 8:] == 0).all()
    assert not (label == 2).any()


def test_the_most_stable_share_is_kept_and_never_none():
    stability = {"a": 0.2, "b": 0.9, "c": 0.5, "d": 0.9}
    assert most_stable(stability, 0.5) == ["b", "d"]
    assert most_stable(stability, 0.75) == ["b", "c", "d"]
    assert most_stable(stability, 0.01) == ["b"]


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 1.5},
        {"quantile": -0.1},
        {"min_component": 2},
        {"keep": 0},
        {"keep_all": True, "threshold": 0.5},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UserError):
        FilterOptions(**options)
