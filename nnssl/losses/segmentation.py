"""Soft Dice and cross entropy with a per-voxel mask, for any number of spatial axes.

The formulas are equations 8, 9, 20 and 21 of Diff-CL (Guo et al. 2025, arXiv 2503.09408).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nnssl.losses.precision import fp32

SMALLEST_DENOMINATOR = 1e-8


@fp32
def soft_dice_loss(
    probs: Tensor,
    onehot: Tensor,
    valid: Tensor | None = None,
    smooth: float = 1.0,
    include_background: bool = False,
    batch_dice: bool = True,
    squared: bool = False,
) -> Tensor:
    """Compute the soft Dice loss ``1 - (2 sum p y + s) / (sum p + sum y + s)``, averaged over classes.

    Equations 8 and 20 of Diff-CL (linear denominator), with a smoothing s that keeps the gradient bounded when a
    pseudo-label has no foreground. Sums run over the voxels of one process only.

    Args:
        probs: probabilities (b, C, ...).
        onehot: one-hot or region target (b, C, ...), any type.
        valid: bool (b, 1, ...), True where a voxel counts; None for all. With no valid voxel the loss is 0
            (for s > 0).
        smooth: s, in voxels, at least 0.
        include_background: count channel 0; needed for regions, which have no background channel.
        batch_dice: sum over batch and space; otherwise one Dice per sample, averaged.
        squared: square p and y in the denominator, as V-Net's Dice and SSL4MIS do.

    Returns:
        A float32 scalar (float64 for float64 inputs).

    Raises:
        ValueError: shapes differ, ``smooth`` is negative, or no class is left without the background.
    """
    if probs.shape != onehot.shape:
        raise ValueError(f"probs and onehot differ in shape: {tuple(probs.shape)} and {tuple(onehot.shape)}")
    if smooth < 0:
        raise ValueError(f"smooth must be at least 0, got {smooth}")
    if not include_background:
        if probs.shape[1] < 2:
            raise ValueError("one channel only: pass include_background=True (regions have no background channel)")
        probs, onehot = probs[:, 1:], onehot[:, 1:]
    mask = check_valid(valid, probs)
    onehot = onehot.to(probs.dtype)
    if mask is not None:
        probs, onehot = probs.where(mask, probs.new_zeros(())), onehot.where(mask, onehot.new_zeros(()))
    axes = ([0] if batch_dice else []) + list(range(2, probs.ndim))
    overlap = (probs * onehot).sum(axes)
    total = (probs.square() if squared else probs).sum(axes) + onehot.sum(axes)
    dice = (2 * overlap + smooth) / (total + smooth).clamp_min(SMALLEST_DENOMINATOR)
    return 1 - dice.mean()


@fp32
def cross_entropy(logits: Tensor, target: Tensor, valid: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Compute the cross entropy ``-log softmax(logits)[target]``, averaged over the valid voxels.

    Equations 9 and 21 of Diff-CL; every class counts, the background included.

    Args:
        logits: (b, C, ...).
        target: integer labels (b, 1, ...) or (b, ...), in 0..C-1 where valid, anything elsewhere.
        valid: bool (b, 1, ...), True where a voxel counts; None for all.
        weight: of each item (b,), or of each voxel (b, 1, ...), for masks of unknown quality; None: 1. The sum is
            divided by the number of voxels, not of weights: a batch of low weights counts less.

    Returns:
        A scalar; 0, with a (zero) gradient, when no voxel is valid.

    Raises:
        ValueError: shapes do not fit.
    """
    labels = label_map(target, logits)
    mask = check_valid(valid, logits)
    if mask is None and weight is None:
        return functional.cross_entropy(logits, labels)
    mask = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask[:, 0]
    per_voxel = functional.cross_entropy(logits, labels.where(mask, labels.new_zeros(())), reduction="none")
    if weight is not None:
        per_voxel = per_voxel * _of_voxels(weight, logits)
    return per_voxel.where(mask, per_voxel.new_zeros(())).sum() / mask.sum().clamp_min(1)


@fp32
def soft_cross_entropy(logits: Tensor, shares: Tensor, valid: Tensor, binary: bool = False) -> Tensor:
    """Compute ``- sum_c y_c log p_c`` for targets y that are shares of classes, averaged over valid voxels.

    Args:
        logits: (b, C, ...).
        shares: y (b, C, ...), in 0..1; they sum to 1 over the classes of a softmax.
        valid: bool (b, 1, ...), True where a voxel counts.
        binary: channels are regions, p their sigmoids; the mean binary cross entropy of all regions.

    Returns:
        A scalar; 0, with a (zero) gradient, when no voxel is valid.
    """
    if binary:
        per_voxel = functional.binary_cross_entropy_with_logits(logits, shares, reduction="none").mean(1, keepdim=True)
    else:
        per_voxel = -(shares * logits.log_softmax(1)).sum(1, keepdim=True)
    check_valid(valid, logits)
    return per_voxel.where(valid, per_voxel.new_zeros(())).sum() / valid.sum().clamp_min(1)


def _of_voxels(weight: Tensor, logits: Tensor) -> Tensor:
    """Return the weights of items or voxels in a shape that multiplies a map (b, ...)."""
    if weight.ndim == 1:
        weight = weight.view(-1, *[1] * (logits.ndim - 1))
    if weight.ndim != logits.ndim or weight.shape[:2] != (logits.shape[0], 1):
        raise ValueError(f"weight must have shape (b,) or (b, 1, ...), got {tuple(weight.shape)}")
    return weight[:, 0]


@fp32
def dice_and_cross_entropy(
    logits: Tensor,
    target: Tensor,
    ce_weight: float | Tensor,
    valid: Tensor | None = None,
    smooth: float = 1.0,
    include_background: bool = False,
    batch_dice: bool = True,
    squared: bool = False,
    dice_weight: float = 1.0,
) -> Tensor:
    """Compute ``dice_weight * D(softmax(logits), target) + ce_weight * E(logits, target)``.

    The form that L_s and L_p of Diff-CL share (equations 7 and 19), with Dice D and cross entropy E as above.

    Args:
        logits: (b, C, ...), C >= 2 channels of a softmax.
        target: integer labels (b, 1, ...) or (b, ...).
        ce_weight: weight of the cross entropy (beta or lambda).
        valid: bool (b, 1, ...), True where a voxel counts; None for all.
        smooth: smoothing of the Dice, in voxels.
        include_background: count the background in the Dice.
        batch_dice: sum the Dice over the batch.
        squared: square the Dice's denominator.
        dice_weight: weight of the Dice; 0 leaves it out.

    Returns:
        A scalar.
    """
    loss = ce_weight * cross_entropy(logits, target, valid)
    if dice_weight == 0:
        return loss
    labels = label_map(target, logits)
    classes = torch.arange(logits.shape[1], device=logits.device).view(1, -1, *[1] * (logits.ndim - 2))
    probs, onehot = logits.softmax(1), labels[:, None] == classes
    return loss + dice_weight * soft_dice_loss(probs, onehot, valid, smooth, include_background, batch_dice, squared)


def label_map(target: Tensor, logits: Tensor) -> Tensor:
    """Return an integer target of shape (b, 1, ...) or (b, ...) as int64 (b, ...) that fits ``logits`` (b, C, ...).

    Raises:
        ValueError: the target is no integer map or does not fit the logits.
    """
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"the target must hold integer labels, got {target.dtype}")
    wanted = (logits.shape[0], *logits.shape[2:])
    if target.ndim == logits.ndim and target.shape[1] == 1:
        target = target[:, 0]
    if target.shape != wanted:
        raise ValueError(f"the target {tuple(target.shape)} does not fit the logits {tuple(logits.shape)}")
    return target.long()


def check_valid(valid: Tensor | None, voxels: Tensor) -> Tensor | None:
    """Return the mask if it is bool of shape (b, 1, ...) for ``voxels`` (b, C, ...), or None for None.

    Raises:
        ValueError: it is not.
    """
    if valid is None:
        return None
    wanted = (voxels.shape[0], 1, *voxels.shape[2:])
    if valid.dtype != torch.bool or valid.shape != wanted:
        raise ValueError(f"valid must be bool of shape {wanted}, got {valid.dtype} of shape {tuple(valid.shape)}")
    return valid
