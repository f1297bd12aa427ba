"""The class-weighted loss: nnU-Net's own without weights, and a sum written by hand with them."""

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnssl.losses.class_weighted import class_weighted_loss, voxel_weights
from nnssl.losses.segmentation import cross_entropy

IGNORE = 4


def scene(space=(6, 5), classes=4, ignored=False):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, classes, *space, generator=generator)
    target = torch.randint(0, classes, (2, 1, *space), generator=generator)
    if ignored:
        target[torch.rand(target.shape, generator=generator) < 0.3] = IGNORE
    return logits, target, (target != IGNORE) if ignored else None


def by_hand(logits, target, weights, valid, smooth, background, batch_dice):
    """Loops over voxels and classes, in float64."""
    p = logits.double().softmax(1).movedim(1, -1).numpy()
    y = target[:, 0].numpy()
    inside = np.ones(y.shape, bool) if valid is None else valid[:, 0].numpy()
    w = weights.double().numpy()
    ce = -sum(w[k] * np.log(p[..., k][(y == k) & inside]).sum() for k in range(len(w)))
    ce /= sum(w[k] * ((y == k) & inside).sum() for k in range(len(w)))
    groups = [slice(None)] if batch_dice else [slice(i, i + 1) for i in range(len(y))]
    dice = []
    for group in groups:
        for k in range(0 if background else 1, len(w)):
            probs, label = p[group][..., k][inside[group]], (y[group] == k)[inside[group]]
            dice.append(w[k] * (2 * (probs * label).sum() + smooth) / (probs.sum() + label.sum() + smooth))
    return ce - np.mean(dice)


@pytest.mark.parametrize("space", [(6, 5), (4, 3, 5)])
@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("ignored", [True, False])
def test_without_weights_it_is_nnunets_loss(space, batch_dice, ignored):
    logits, target, valid = scene(space, ignored=ignored)
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
    label = IGNORE if ignored else None
    stock = DC_and_CE_loss(dice, {}, ignore_label=label, dice_class=MemoryEfficientSoftDiceLoss)
    ours = class_weighted_loss(logits, target, torch.ones(4), valid, batch_dice=batch_dice)
    torch.testing.assert_close(ours, stock(logits, target))


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("ignored", [True, False])
def test_weights_enter_as_the_formula_says(batch_dice, background, ignored):
    logits, target, valid = scene(ignored=ignored)
    weights = torch.tensor([0.2, 3.0, 0.7, 5.0])
    got = class_weighted_loss(logits, target, weights, valid, 1.0, background, batch_dice)
    assert got.item() == pytest.approx(by_hand(logits, target, weights, valid, 1.0, background, batch_dice), rel=1e-5)


def test_ignored_voxels_and_weights_get_no_gradient():
    logits, target, valid = scene(ignored=True)
    logits.requires_grad_()
    weights = torch.ones(4, requires_grad=True)
    class_weighted_loss(logits, target, weights, valid).backward()
    assert weights.grad is None
    assert logits.grad.where(valid, 0).abs().sum() > 0
    assert logits.grad.where(~valid, 0).abs().sum() == 0
    changed = logits.detach().where(valid, 50.0)
    torch.testing.assert_close(
        class_weighted_loss(changed, target, weights, valid), class_weighted_loss(logits, target, weights, valid)
    )


def test_nothing_valid_is_zero_with_zero_gradient():
    logits, target, _ = scene()
    logits.requires_grad_()
    loss = class_weighted_loss(logits, target, torch.ones(4), torch.zeros_like(target, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().sum() == 0


def test_half_precision_is_computed_in_single():
    logits, target, _ = scene()
    half = logits.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = class_weighted_loss(half, target, torch.ones(4))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, class_weighted_loss(half.float(), target, torch.ones(4)))


def test_shapes_are_checked():
    logits, target, _ = scene()
    with pytest.raises(ValueError, match="3 weights"):
        class_weighted_loss(logits, target, torch.ones(3))


@pytest.mark.parametrize("ignored", [False, True])
def test_weights_of_voxels_make_the_mean_a_weighted_one(ignored):
    logits, target, valid = scene(ignored=ignored)
    valid = torch.ones_like(target, dtype=torch.bool) if valid is None else valid
    weights = torch.tensor([0.0, 1.0, 2.5, 0.5])
    got = cross_entropy(logits, target, valid, voxel_weights(weights, target, valid))
    expected = torch.nn.functional.cross_entropy(logits, target[:, 0], weights, ignore_index=IGNORE)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


def test_labels_without_weight_or_voxels_that_do_not_count_give_zero():
    label, valid = torch.zeros(1, 1, 4, dtype=torch.int64), torch.ones(1, 1, 4, dtype=torch.bool)
    assert voxel_weights(torch.tensor([0.0, 1.0]), label, valid).tolist() == [[[0, 0, 0, 0]]]
    assert voxel_weights(torch.tensor([2.0, 1.0]), label, ~valid).tolist() == [[[0, 0, 0, 0]]]
