"""Calibration guidance against NumPy, and its moving average against the closed form."""

import numpy as np
import pytest
import torch

from nnssl.training.guidance import RunningGuidance, agreement, calibration

CLASSES = 4


def maps(space=(6, 5), seed=0):
    """Return two label maps that agree in most voxels and a mask; class 3 is in neither, class 2 in item 0 alone."""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 2, (3, 1, *space))
    b = np.where(rng.random(a.shape) < 0.7, a, 1 - a)
    a[0, :, :2] = 2
    return a, b, rng.random(a.shape) < 0.8


def onehot(labels):
    classes = np.arange(CLASSES).reshape(1, -1, *[1] * (labels.ndim - 2))
    return torch.from_numpy((labels == classes).astype(np.float32))


def by_sets(a, b, valid, measure, present_only):
    """Count voxels of each class with boolean maps; the mean over the classes."""
    values = []
    for c in range(CLASSES):
        in_a, in_b = (a == c) & valid, (b == c) & valid
        both, either = (in_a & in_b).sum(), (in_a | in_b).sum()
        if present_only and not in_b.any():
            continue
        dice = 1.0 if either == 0 else 2 * both / (in_a.sum() + in_b.sum())
        jaccard = 1.0 if either == 0 else both / either
        values.append({"dice": dice, "jaccard": jaccard, "both": dice + jaccard}[measure])
        if either == 0 and measure == "both":
            values[-1] = 2.0
    return np.mean(values)


@pytest.mark.parametrize("space", [(6, 5), (3, 4, 5)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("present_only", [False, True])
@pytest.mark.parametrize("measure", ["dice", "jaccard", "both"])
def test_agreement_counts_voxels(measure, present_only, masked, space):
    a, b, valid = maps(space)
    valid = valid if masked else np.ones_like(valid)
    mask = torch.from_numpy(valid) if masked else None
    settings = {"valid": mask, "present_only": present_only}
    got = agreement(onehot(a), onehot(b), measure, **settings)
    expected = [by_sets(a[i], b[i], valid[i], measure, present_only) for i in range(3)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    whole = agreement(onehot(a), onehot(b), measure, per_item=False, **settings)
    np.testing.assert_allclose(whole, [by_sets(a, b, valid, measure, present_only)] * 3, rtol=1e-5)
    assert len(set(got.tolist())) == 3


@pytest.mark.parametrize(("measure", "best"), [("dice", 1), ("jaccard", 1), ("both", 2)])
def test_agreement_spans_its_range(measure, best):
    a, _, _ = maps()
    a = a % 2
    assert agreement(onehot(a), onehot(a), measure).tolist() == pytest.approx([best] * 3)
    assert agreement(onehot(a), onehot(1 - a), measure).tolist() == pytest.approx([0] * 3, abs=1e-5)
    assert agreement(onehot(0 * a), onehot(0 * a), measure).tolist() == pytest.approx([best] * 3)


def test_a_false_voxel_of_an_absent_class_hardly_lowers_the_agreement():
    """As a class of its own it would halve it, and the rectifier would take such a crop for a bad one."""
    better = np.zeros((1, 1, 32, 32), int)
    wrong = better.copy()
    wrong[0, 0, 3, 4] = 1
    assert agreement(onehot(wrong), onehot(better)).item() == pytest.approx(2 * 1023 / (1023 + 1024))
    assert agreement(onehot(better), onehot(wrong)).item() < 0.51  # a missed class counts


def test_fixed_and_random_agreement_ignore_the_maps():
    a, b = (onehot(x) for x in maps()[:2])
    assert agreement(a, b, "fixed").tolist() == [0.5] * 3
    draws = torch.stack([agreement(a, b, "random") for _ in range(200)])
    assert 0 <= draws.min() <= draws.max() < 1
    assert draws.mean().item() == pytest.approx(0.5, abs=0.05)
    assert len(set(draws.flatten().tolist())) > 590  # each item has its own
    assert len(set(agreement(a, b, "random", per_item=False).tolist())) == 1


def test_guidance_is_0_for_equal_maps_and_999_for_disjoint_ones():
    overlap = torch.tensor([1.0, 0.5, 0.0])
    assert calibration(overlap).tolist() == [0.0, 499.5, 999.0]
    assert torch.equal(calibration(overlap, "overlap"), overlap)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_running_guidance_follows_the_closed_form(decay):
    values = np.random.default_rng(0).uniform(0, 999, (5, 3))
    running = RunningGuidance(decay)
    for row in values:
        running.update(torch.from_numpy(row))
    means = values.mean(1)
    weights = np.array([decay**4, *(decay ** (4 - k) * (1 - decay) for k in range(1, 5))])
    assert weights.sum() == pytest.approx(1)
    assert running.expand(2).tolist() == pytest.approx([weights @ means] * 2, rel=1e-5)


def test_running_guidance_continues_from_its_state():
    first, second = RunningGuidance(0.5), RunningGuidance(0.5)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.expand(1), second.expand(1))
    first.update(torch.tensor([10.0, 30.0]))
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    for running in (first, second):
        running.update(torch.tensor([100.0]))
    assert first.expand(1).item() == second.expand(1).item() == pytest.approx(0.5 * 20 + 0.5 * 100)


def test_maps_without_a_voxel_that_counts_differ_nowhere():
    maps = torch.zeros(2, 3, 4, 4)
    maps[:, 1] = 1
    other = maps.roll(1, 1)
    valid = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    valid[1] = True
    assert agreement(maps, other, "dice", valid).tolist() == pytest.approx([1.0, 0.0], abs=1e-4)
