"""Dice and cross-entropy in which every class has a weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nnssl.losses.precision import fp32
from nnssl.losses.segmentation import SMALLEST_DENOMINATOR, check_valid, label_map


@fp32
def class_weighted_loss(
    logits: Tensor,
    target: Tensor,
    weights: Tensor,
    valid: Tensor | None = None,
    smooth: float = 1e-5,
    include_background: bool = False,
    batch_dice: bool = True,
) -> Tensor:
    """Compute ``sum W_y CE / sum W_y - mean_k W_k Dice_k``, y the label of a voxel.

    The difficulty-aware loss of A&D (arXiv 2310.11320) as its authors' code has it. With all weights 1 this is
    nnU-Net's loss, cross-entropy minus soft Dice. The weights of the Dice are not normalized, those of the
    cross-entropy are, by their sum over the voxels that count. Sums run over one process.

    Args:
        logits: (b, C, ...).
        target: integer labels (b, 1, ...) or (b, ...), in 0..C-1 where valid, anything elsewhere.
        weights: W (C,), at least 0, treated as constants; where every label has weight 0 the cross-entropy is 0.
        valid: bool (b, 1, ...), True where a voxel counts; None for all. With no valid voxel both parts are 0, with
            a zero gradient.
        smooth: smoothing of the Dice, in voxels (nnU-Net: 1e-5, the authors' code: 1).
        include_background: weight and count the Dice of class 0 too, as the paper prints.
        batch_dice: sum over batch and space; otherwise one Dice a sample, averaged.

    Returns:
        A scalar; below 0 for good predictions.

    Raises:
        ValueError: shapes do not fit.
    """
    if weights.shape != logits.shape[1:2]:
        raise ValueError(f"{len(weights)} weights for {logits.shape[1]} classes")
    labels, weights = label_map(target, logits), weights.detach().to(logits.dtype)
    mask = check_valid(valid, logits)
    inside = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask[:, 0]
    labels = labels.where(inside, labels.new_zeros(()))
    per_voxel = functional.cross_entropy(logits, labels, weight=weights, reduction="none")
    counted = weights[labels] * inside
    ce = (per_voxel * inside).sum() / counted.sum().clamp_min(SMALLEST_DENOMINATOR)

    first = 0 if include_background else 1
    classes = torch.arange(first, logits.shape[1], device=logits.device).view(1, -1, *[1] * (logits.ndim - 2))
    voxels = inside[:, None].to(logits.dtype)
    probs, onehot = logits.softmax(1)[:, first:] * voxels, (labels[:, None] == classes) * voxels
    axes = ([0] if batch_dice else []) + list(range(2, logits.ndim))
    total = probs.sum(axes) + onehot.sum(axes)
    dice = (2 * (probs * onehot).sum(axes) + smooth) / (total + smooth).clamp_min(SMALLEST_DENOMINATOR)
    if mask is not None:
        dice = dice * inside.any()
    return ce - (weights[first:] * dice).mean()


@torch.no_grad()
def voxel_weights(weights: Tensor, label: Tensor, valid: Tensor) -> Tensor:
    """Return ``W_y / mean W_y`` for the label y of each voxel, the mean over valid voxels.

    The mean over voxels of a loss times these is ``sum W_y loss / sum W_y``. Where every label has weight 0 the
    result is 0.

    Args:
        weights: W (C,), at least 0.
        label: integer map (b, 1, ...) in 0..C-1 where valid.
        valid: bool (b, 1, ...), True where a voxel counts.

    Returns:
        (b, 1, ...); 0 where a voxel does not count.
    """
    own = weights[label.where(valid, label.new_zeros(())).long()] * valid
    mean = own.sum() / valid.sum().clamp_min(1)
    return own / mean.clamp_min(SMALLEST_DENOMINATOR)
