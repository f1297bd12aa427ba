"""Rules that turn probabilities into hard pseudo-labels."""

import pytest
import torch

from nnssl.training.label_space import LabelSpace
from nnssl.training.pseudo_labels import confident_label, pseudo_label_loss, relative_label


def probabilities(count, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(count, classes, 7, 6, generator=generator)).softmax(1)


@pytest.mark.parametrize(
    ("probs", "label"),
    [
        ((0.25, 0.25, 0.26, 0.24), 0),
        ((0.1, 0.3, 0.35, 0.25), 0),  # largest n is 0.714
        ((0.05, 0.3, 0.35, 0.30), 2),  # largest n is 0.857
        ((0.01, 0.02, 0.49, 0.48), 2),
        ((0.49, 0.48, 0.02, 0.01), 0),
        ((0.08, 0.45, 0.47), 2),
        ((0.2, 0.35, 0.45), 0),
    ],
)
def test_relative_rule_on_the_cases_of_the_fact_sheet(probs, label):
    assert relative_label(torch.tensor(probs).view(1, -1, 1, 1)).item() == label


@pytest.mark.parametrize("threshold", [0.5, 0.8])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_relative_rule_voxel_by_voxel(classes, threshold):
    probs = probabilities(2, classes)
    got = relative_label(probs, threshold)
    assert got.shape == (2, 1, 7, 6)
    for row, label in zip(probs.movedim(1, -1).reshape(-1, classes).tolist(), got.flatten().tolist(), strict=True):
        passing = [c for c in range(classes) if (row[c] - min(row)) / max(row) > threshold]
        assert label == (max(passing, key=lambda c: row[c]) if passing else 0)


def test_relative_rule_of_two_classes_is_a_foreground_threshold():
    p = torch.linspace(0.001, 0.999, 999)
    labels = relative_label(torch.stack([1 - p, p])[None, :, :, None], 0.8)
    assert torch.equal(labels.flatten().bool(), p > 1 / 1.2)


def test_confident_rule_marks_what_reaches_the_threshold():
    probs = probabilities(2, 3)
    label, sure = confident_label(probs, 0.7)
    assert torch.equal(label[:, 0], probs.argmax(1))
    assert torch.equal(sure[:, 0], (probs >= 0.7).any(1))
    assert 0 < sure.float().mean() < 1
    assert confident_label(probs, 0.0)[1].all()
    exact = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1)
    assert confident_label(exact, 0.75)[1].all()


def test_pseudo_labels_carry_no_gradient():
    probs = probabilities(1, 3).requires_grad_()
    label, sure = confident_label(probs)
    assert not any(tensor.requires_grad for tensor in (relative_label(probs), label, sure))


@pytest.mark.parametrize("regions", [False, True])
def test_weights_scale_each_voxel_and_not_the_number_of_voxels(regions):
    """The loss is linear in the weights, and a 0/1 weight gives the mean over the kept voxels times their share."""
    generator = torch.Generator().manual_seed(5)
    space, logits = LabelSpace(3, regions), torch.randn(2, 3, 7, 6, generator=generator)
    hard = space.harden(space.probs(torch.randn(2, 3, 7, 6, generator=generator)))
    valid = torch.rand(2, 1, 7, 6, generator=generator) < 0.8
    kept = torch.rand(2, 1, 7, 6, generator=generator) < 0.5
    plain = pseudo_label_loss(space, logits, hard, valid)
    assert pseudo_label_loss(space, logits, hard, valid, 0.3 * torch.ones(2, 1, 7, 6)) == pytest.approx(0.3 * plain)
    share = (kept & valid).sum() / valid.sum()
    among_kept = pseudo_label_loss(space, logits, hard, valid & kept)
    assert pseudo_label_loss(space, logits, hard, valid, kept.float()).item() == pytest.approx(
        (share * among_kept).item(), rel=1e-5
    )


@pytest.mark.parametrize("regions", [False, True])
def test_the_dice_sees_kept_voxels_only(regions):
    space, logits = LabelSpace(3, regions), torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(6))
    hard = space.harden(space.probs(-logits))
    valid, kept = torch.ones(1, 1, 6, 6, dtype=torch.bool), torch.zeros(1, 1, 6, 6)
    kept[..., :3] = 1
    dice = [
        pseudo_label_loss(space, z, hard, valid, kept, dice_weight=w) - pseudo_label_loss(space, z, hard, valid, kept)
        for z, w in ((logits, 1.0), (logits, 2.0), (logits.masked_fill(kept == 0, 0.0), 1.0))
    ]
    assert 0 < dice[0] < 1
    assert dice[1].item() == pytest.approx(2 * dice[0].item(), rel=1e-4)
    assert dice[2].item() == pytest.approx(dice[0].item(), rel=1e-4)  # rejected logits play no part in it
