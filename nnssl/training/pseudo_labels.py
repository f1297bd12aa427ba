"""Hard pseudo-labels: rules that make them, and losses against them, for classes and for regions alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nnssl.losses.consistency import cross_pseudo_supervision
from nnssl.losses.precision import fp32
from nnssl.training.label_space import LabelSpace


def pseudo_label_loss(space: LabelSpace, logits: Tensor, hard: Tensor, valid: Tensor) -> Tensor:
    """Return the cross entropy of logits with a hard pseudo-label, averaged over valid voxels.

    Args:
        space: what the heads mean; regions take the binary cross entropy of every region.
        logits: (b, C, ...).
        hard: pseudo-label in the layout of a target, see ``LabelSpace.harden``.
        valid: bool (b, 1, ...), True where a voxel counts.
    """
    if not space.regions:
        return cross_pseudo_supervision(logits, hard, valid)
    return _binary_cross_entropy(logits, hard, valid)


@fp32
def _binary_cross_entropy(logits: Tensor, hard: Tensor, valid: Tensor) -> Tensor:
    per_voxel = functional.binary_cross_entropy_with_logits(logits, hard.to(logits.dtype), reduction="none")
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
