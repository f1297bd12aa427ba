"""Counts, weights and confidences of classes: plain loops, absent classes, exact resumption."""

import pytest
import torch

from nnssl.training.class_statistics import (
    ClassCounts,
    ClassWeights,
    ConfidenceBank,
    absent_as_rarest,
    count_classes,
    sampling_rate,
)

SERIES = [torch.tensor(row) for row in ([80.0, 15.0, 5.0], [50.0, 40.0, 10.0], [70.0, 0.0, 30.0], [90.0, 6.0, 4.0])]


def inverse(counts: torch.Tensor) -> torch.Tensor:
    return counts.max() / counts


def resumed(state, other):
    other.load_state_dict({name: value.clone() for name, value in state.state_dict().items()})
    return other


def test_ignored_and_invalid_voxels_count_for_no_class():
    label = torch.tensor([[[0, 0, 1, 2], [2, 2, 3, 3]]], dtype=torch.int16)  # 3 is ignored
    valid = torch.ones(1, 1, 2, 4, dtype=torch.bool)
    valid[..., 0] = False
    assert count_classes(label[None], 3, valid).tolist() == [1, 1, 2]
    assert count_classes(label[None], 3, torch.ones_like(valid)).tolist() == [2, 1, 3]


def test_an_absent_class_is_taken_for_the_rarest_present_one():
    assert absent_as_rarest(torch.tensor([7.0, 0.0, 3.0])).tolist() == [7, 3, 3]
    assert absent_as_rarest(torch.zeros(3)).tolist() == [1, 1, 1]


def test_the_least_known_class_is_always_sampled_and_a_perfect_one_never():
    assert sampling_rate(torch.tensor([1.0, 0.2, 0.8]), 0.5).tolist() == pytest.approx([0.0, 1.0, 0.5])
    assert sampling_rate(torch.ones(2), 0.5).tolist() == [0, 0]
    assert sampling_rate(torch.zeros(2), 2.5).tolist() == [1, 1]


def test_weights_average_over_the_batches_that_hold_a_class():
    state = ClassWeights(3, inverse, decay=0.9)
    state.start(SERIES[0])
    state.start(SERIES[1])  # the run has started
    expected = inverse(SERIES[0]).tolist()
    assert state.value.tolist() == pytest.approx(expected)
    for counts in SERIES[1:]:
        state.update(counts)
        for k, n in enumerate(counts.tolist()):
            if n:
                expected[k] = 0.9 * expected[k] + 0.1 * max(counts.tolist()) / n
    assert state.value.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("counts", [[0.0, 0.0, 0.0], [100.0, 0.0, 0.0]])
def test_a_batch_of_one_class_or_none_changes_no_weight(counts):
    state = ClassWeights(3, inverse)
    state.start(torch.tensor(counts))
    assert not state.started
    state.start(SERIES[0])
    before = state.value.clone()
    state.update(torch.tensor(counts))
    assert torch.equal(state.value, before)


def batches(count: int):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        label = torch.randint(0, 2, (2, 6), generator=generator)  # class 2 is absent until later
        yield torch.randn(2, 3, 6, generator=generator).softmax(1), label


def one_hot(label: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(label, 3).movedim(-1, 1).float()


def test_confidence_is_averaged_over_windows_and_waits_for_an_absent_class():
    bank, window, expected = ConfidenceBank(3, decay=0.8, every=2), [[], [], []], [0.0, 0.0, 0.0]
    for index, (probs, label) in enumerate(batches(6)):
        if index == 5:
            label[0, 0] = 2
        bank.update(probs, one_hot(label))
        for b in range(2):
            for v in range(6):
                window[label[b, v]].append(probs[b, label[b, v], v].item())
        if index % 2:
            for k, values in enumerate(window):
                if values:
                    mean = sum(values) / len(values)
                    expected[k] = mean if expected[k] == 0 else 0.8 * expected[k] + 0.2 * mean
            window = [[], [], []]
            assert bank.value.tolist() == pytest.approx(expected)
    assert bank.value[2] > 0


def test_counts_do_not_saturate():
    state = ClassCounts(2)
    state.update(torch.tensor([2.0**30, 1.0]))
    for _ in range(3):
        state.update(torch.tensor([1.0, 1.0]))
    assert state.value.tolist() == [2**30 + 3, 4]


@pytest.mark.parametrize("steps", [1, 3])
def test_all_resume_exactly(steps):
    weights, counts, bank = ClassWeights(3, inverse), ClassCounts(3), ConfidenceBank(3, every=2)
    labeled = list(batches(steps + 2))
    weights.start(SERIES[0])
    for row, (probs, label) in zip(SERIES[:steps], labeled[:steps], strict=True):
        weights.update(row), counts.update(row), bank.update(probs, one_hot(label))
    again = resumed(weights, ClassWeights(3, inverse)), resumed(counts, ClassCounts(3))
    other = resumed(bank, ConfidenceBank(3, every=2))
    again[0].start(SERIES[2])  # has started before
    for state in (weights, counts, *again):
        state.update(SERIES[3])
    for probs, label in labeled[steps:]:
        bank.update(probs, one_hot(label)), other.update(probs, one_hot(label))
    assert torch.equal(weights.value, again[0].value)
    assert torch.equal(counts.value, again[1].value)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in bank.state_dict().items())
