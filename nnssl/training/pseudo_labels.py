"""Losses against hard pseudo-labels, for classes and for regions alike."""

from __future__ import annotations

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
