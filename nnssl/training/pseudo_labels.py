"""Hard pseudo-labels: rules that make them, and losses against them, for classes and for regions alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nnssl.losses.precision import fp32
from nnssl.losses.segmentation import cross_entropy, soft_dice_loss
from nnssl.training.label_space import LabelSpace


def pseudo_label_loss(
    space: LabelSpace,
    logits: Tensor,
    hard: Tensor,
    valid: Tensor,
    weight: Tensor | None = None,
    dice_weight: float = 0.0,
) -> Tensor:
    """Return the cross entropy of logits with a hard pseudo-label, averaged over valid voxels, and its Dice if asked.

    Args:
        space: what the heads mean; regions take the binary cross entropy of every region.
        logits: (b, C, ...).
        hard: pseudo-label in the layout of a target, see ``LabelSpace.harden``.
        valid: bool (b, 1, ...), True where a voxel counts.
        weight: of each voxel (b, 1, ...), at least 0; None: 1. The sum is divided by the number of valid voxels, not
            by the weights: a pseudo-label of which little is kept counts little.
        dice_weight: weight of the soft Dice over the valid voxels whose weight is above 0.
    """
    if not space.regions:
        loss = cross_entropy(logits, hard.detach(), valid, weight)
    else:
        loss = _binary_cross_entropy(logits, hard, valid, weight)
    if dice_weight == 0:
        return loss
    counted = valid if weight is None else valid & (weight > 0)
    onehot = space.one_hot(hard)
    dice = soft_dice_loss(space.probs(logits), onehot, counted, include_background=space.regions)
    return loss + dice_weight * dice


@fp32
def _binary_cross_entropy(logits: Tensor, hard: Tensor, valid: Tensor, weight: Tensor | None) -> Tensor:
    per_voxel = functional.binary_cross_entropy_with_logits(logits, hard.to(logits.dtype), reduction="none")
    if weight is not None:
        per_voxel = per_voxel * weight
    counted = valid.expand_as(per_voxel)
    return per_voxel.where(counted, per_voxel.new_zeros(())).sum() / counted.sum().clamp_min(1)


@torch.no_grad()
def relative_label(probs: Tensor, threshold: float = 0.8) -> Tensor:
    """Return SSL4MIS's hard label (b, 1, ...): arg max of ``n_c = (p_c - min p) / max p`` among n_c > threshold.

    A voxel where no class passes becomes background; it is not ignored. For two classes the rule reads "foreground if
    p > 1 / (2 - threshold)", otherwise background.

    Args:
        probs: (b, C, ...).
        threshold: in [0, 1).
    """
    low, high = probs.amin(1, keepdim=True), probs.amax(1, keepdim=True)
    relative = (probs - low) / high
    kept = probs.where(relative > threshold, probs.new_zeros(()))
    return kept.argmax(1, keepdim=True)


@torch.no_grad()
def confident_label(probs: Tensor, threshold: float = 0.95) -> tuple[Tensor, Tensor]:
    """Return FixMatch's hard pseudo-label (b, 1, ...) and where its probability reaches the threshold (bool)."""
    confidence, label = probs.max(1, keepdim=True)
    return label, confidence >= threshold
