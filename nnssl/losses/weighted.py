"""Cross-entropy where items or voxels count by a weight of their own, for masks of unknown quality."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from nnssl.losses.precision import fp32
from nnssl.losses.segmentation import check_valid, label_map


@fp32
def weighted_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute ``sum w_n CE_n / N`` over the N valid voxels.

    The sum is divided by the number of voxels, not of weights: a batch of low weights counts less.

    Args:
        logits: (b, C, ...).
        target: integer labels (b, 1, ...) or (b, ...), in 0..C-1 where valid, anything elsewhere.
        weight: of each item (b,), or of each voxel (b, 1, ...).
        valid: bool (b, 1, ...), True where a voxel counts; None for all.

    Returns:
        A scalar; 0, with a (zero) gradient, when no voxel is valid.

    Raises:
        ValueError: shapes do not fit.
    """
    labels = label_map(target, logits)
    if weight.ndim == 1:
        weight = weight.view(-1, *[1] * (logits.ndim - 1))
    if weight.ndim != logits.ndim or weight.shape[:2] != (logits.shape[0], 1):
        raise ValueError(f"weight must have shape (b,) or (b, 1, ...), got {tuple(weight.shape)}")
    mask = check_valid(valid, logits)
    if mask is not None:
        labels = labels.where(mask[:, 0], labels.new_zeros(()))
    per_voxel = functional.cross_entropy(logits, labels, reduction="none") * weight[:, 0]
    if mask is None:
        return per_voxel.mean()
    return per_voxel.where(mask[:, 0], per_voxel.new_zeros(())).sum() / mask.sum().clamp_min(1)
