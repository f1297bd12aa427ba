"""DRS: the formula in float64, the published trajectories, absent classes, and exact resumption."""

import math
from itertools import pairwise

import pytest
import torch

from nnssl.training.difficulty import Difficulty, count_voxels


def counts(*dice: float, size: float = 1000.0) -> torch.Tensor:
    """Return counts of classes whose predictions and labels are of one size and overlap by the given Dice."""
    overlap = torch.tensor([d * size for d in dice])
    return torch.stack([overlap, torch.full_like(overlap, size), torch.full_like(overlap, size)])


def trajectory(series: list[float], classes: int, alpha=0.2, window=50) -> float:
    """W of one class after a series of its Dice, in plain floats and from equations 3 to 5."""
    m, before, up, down, reverse = 1 - 1 / window, 1e-8, 0.0, 0.0, 1.0
    for dice in series:
        delta, ratio = dice - before, math.log(dice / before)
        up = m * up + (1 - m) * max(delta, 0) * ratio
        down = m * down + (1 - m) * min(delta, 0) * ratio
        reverse = m * reverse + (1 - m) * (1 - dice)
        before = dice
    return classes * ((down + 1e-8) / (up + 1e-8)) ** alpha * reverse


@pytest.mark.parametrize(("alpha", "window"), [(0.2, 50), (0.5, 10)])
def test_weights_follow_the_equations(alpha, window):
    generator = torch.Generator().manual_seed(0)
    series = torch.rand(30, 3, generator=generator).mul(0.9).add(0.05)
    state = Difficulty(3, alpha, window)
    for row in series:
        weights = state.update(counts(*row.tolist()))
    expected = [trajectory(series[:, k].tolist(), 3, alpha, window) for k in range(3)]
    assert weights.tolist() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("length", [3, 5, 12])
def test_a_sum_remembers_the_last_iterations_alone(length):
    """Equation 3 in plain floats, with tau = 5."""
    series = torch.rand(length, 2, generator=torch.Generator().manual_seed(1)).mul(0.9).add(0.05).tolist()
    state = Difficulty(2, window=5, memory="sum")
    for row in series:
        weights = state.update(counts(*row))
    for k in range(2):
        dice = [1e-8, *(row[k] for row in series)]
        terms = [((b - a) * math.log(b / a), b > a, 1 - b) for a, b in pairwise(dice)][-5:]
        up, down = (sum(t for t, rose, _ in terms if rose == wanted) for wanted in (True, False))
        reverse = sum(missing for *_, missing in terms) / len(terms)
        assert weights[k].item() == pytest.approx(2 * ((down + 1e-8) / (up + 1e-8)) ** 0.2 * reverse, rel=1e-3)


def test_a_sum_waits_for_an_absent_class():
    state = Difficulty(2, window=3, memory="sum")
    for dice in (0.5, 0.4):
        state.update(counts(dice, dice))
    before = {name: value.clone() for name, value in state.state_dict().items()}
    absent = counts(0.6, 0.6)
    absent[:, 1] = 0
    state.update(absent)
    for name, value in state.state_dict().items():
        assert torch.equal(value[..., 1], before[name][..., 1]), name
        assert name == "unlearn" or not torch.equal(value[..., 0], before[name][..., 0]), name  # Dice only rose


def test_first_steps_of_the_published_formula():
    """Five classes: an easy one weighs little at once, a missed one K, and one drop lifts an easy one eightfold."""
    state = Difficulty(5)
    # a class of 1000 labeled voxels of which none is found has Dice 1e-8 / 2000
    weights = state.update(counts(0.6, 0.6, 0.6, 0.6, 0.0))
    assert all(0.15 < w < 0.4 for w in weights[:4].tolist())
    assert weights[4].item() == pytest.approx(5.1, abs=0.1)
    before = weights[0].item()
    after = state.update(counts(0.5, 0.6, 0.6, 0.6, 0.0))[0].item()
    assert 6 < after / before < 10


def test_on_a_plateau_a_weight_is_k_times_what_is_missing():
    state = Difficulty(4)
    for index in range(1500):
        wobble = 0.02 * math.sin(1.7 * index)
        weights = state.update(counts(0.7 + wobble, 0.9 + wobble, 0.5 + wobble, 0.8 + wobble))
    assert weights.tolist() == pytest.approx([1.2, 0.4, 2.0, 0.8], rel=0.12)


def test_forgetting_weighs_more_than_learning():
    rising, falling = Difficulty(2), Difficulty(2)
    for index in range(20):
        up, down = 0.3 + 0.02 * index, 0.7 - 0.02 * index
        w_up, w_down = rising.update(counts(0.5, up)), falling.update(counts(0.5, down))
    assert w_down[1] > 3 * w_up[1]


def test_an_absent_class_is_left_alone():
    state = Difficulty(3)
    for dice in (0.5, 0.4):
        state.update(counts(dice, dice, dice))
    before = {name: value.clone() for name, value in state.state_dict().items()}
    absent = counts(0.6, 0.6, 0.6)
    absent[:, 2] = 0
    weights = state.update(absent)
    for name, value in state.state_dict().items():
        assert torch.equal(value[..., 2], before[name][..., 2]), name
        assert name in ("latest", "filled") or not torch.equal(value[:2], before[name][:2]), name
    assert torch.isfinite(weights).all()


def test_the_codes_absent_class_has_dice_one_half():
    state = Difficulty(2, hold_absent=False)
    absent = counts(0.6, 0.6)
    absent[:, 1] = 0
    state.update(absent)
    assert state.dice[1].item() == pytest.approx(0.5)


def test_a_sporadic_class_of_the_code_is_half_way_difficult_and_ours_is_not_moved():
    """Dice 1/2 when absent, about 0 when missed: learning and forgetting cancel, as the sheet of facts says."""
    coded, held = Difficulty(2, hold_absent=False), Difficulty(2)
    absent, missed = counts(0.5, 0.5), counts(0.5, 0.0)
    absent[:, 1] = 0
    for index in range(400):
        batch = absent if index % 2 else missed
        w_coded, w_held = coded.update(batch), held.update(batch)
    assert w_coded[1].item() == pytest.approx(2 * 0.75, rel=0.1)  # d = 1
    assert w_held[1].item() == pytest.approx(2, rel=0.1)  # never found: K


@pytest.mark.parametrize(("norm", "factor"), [("none", 3.0), ("paper", 1.0)])
def test_norms_scale_the_weights(norm, factor):
    plain, scaled = Difficulty(3), Difficulty(3, norm=norm)
    a, b = (state.update(counts(0.2, 0.5, 0.8)) for state in (plain, scaled))
    torch.testing.assert_close(b, a / 3 * factor)


def test_a_perfect_window_leaves_finite_weights_under_max_normalization():
    state = Difficulty(2, window=1, norm="max")
    for _ in range(3):
        state.update(torch.tensor([[9.0, 4.0]] * 3))
    assert torch.isfinite(state.weights()).all()


def test_the_largest_weight_is_k_under_max_normalization():
    state = Difficulty(3, norm="max")
    plain = Difficulty(3).update(counts(0.2, 0.5, 0.8))
    weights = state.update(counts(0.2, 0.5, 0.8))
    assert weights.max().item() == pytest.approx(3)
    torch.testing.assert_close(weights, 3 * plain / plain.max())


def test_weights_are_positive_single_precision_under_half_precision():
    state = Difficulty(2)
    with torch.autocast("cpu", torch.bfloat16):
        for dice in (0.0, 1.0, 0.0, 1.0):
            weights = state.update(counts(dice, 1 - dice).bfloat16())
    assert weights.dtype == torch.float32
    assert torch.isfinite(weights).all()
    assert (weights > 0).all()


@pytest.mark.parametrize("memory", ["average", "sum"])
def test_a_saved_state_goes_on_exactly(memory):
    first = Difficulty(3, memory=memory)
    for dice in (0.1, 0.4, 0.3):
        first.update(counts(dice, dice / 2, 0.9))
    second = Difficulty(3, memory=memory)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    assert torch.equal(first.update(counts(0.5, 0.2, 0.7)), second.update(counts(0.5, 0.2, 0.7)))


def test_counts_are_voxels_of_each_class():
    predicted = torch.zeros(2, 2, 4)
    labeled = torch.zeros(2, 2, 4)
    predicted[0, 0, :3], labeled[0, 0, 1:] = 1, 1
    predicted[1, 1, 0] = 1
    assert count_voxels(predicted, labeled).tolist() == [[2, 0], [3, 1], [3, 0]]


def test_unknown_norms_and_memories_are_refused():
    for wrong in ({"norm": "sum"}, {"memory": "max"}):
        with pytest.raises(ValueError, match="norm is one of"):
            Difficulty(2, **wrong)
