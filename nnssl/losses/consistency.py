"""Losses between two predictions of the same voxels: consistency and cross pseudo-supervision."""

from __future__ import annotations

from torch import Tensor

from nnssl.losses.precision import fp32
from nnssl.losses.segmentation import check_valid, cross_entropy


@fp32
def probability_mse(student_probs: Tensor, teacher_probs: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute the mean squared difference of two probability maps over valid voxels and channels.

    The consistency cost of the mean teacher (Tarvainen and Valpola 2017, arXiv 1703.01780). Channels may be classes
    of a softmax or regions of a sigmoid. No gradient reaches the teacher.

    Args:
        student_probs: (b, C, ...).
        teacher_probs: (b, C, ...), treated as a constant.
        valid: bool (b, 1, ...), True where a voxel counts; None for all.

    Returns:
        A scalar; 0, with a (zero) gradient, when no voxel is valid.

    Raises:
        ValueError: shapes differ.
    """
    if student_probs.shape != teacher_probs.shape:
        raise ValueError(
            f"student and teacher differ in shape: {tuple(student_probs.shape)} and {tuple(teacher_probs.shape)}"
        )
    squared = (student_probs - teacher_probs.detach()).square()
    mask = check_valid(valid, squared)
    if mask is None:
        return squared.mean()
    count = mask.sum().clamp_min(1) * squared.shape[1]
    return squared.where(mask, squared.new_zeros(())).sum() / count


@fp32
def softmax_mse(student_logits: Tensor, teacher_probs: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute :func:`probability_mse` of ``softmax(student_logits)`` and the teacher's probabilities.

    Args:
        student_logits: (b, C, ...).
        teacher_probs: (b, C, ...), treated as a constant.
        valid: bool (b, 1, ...), True where a voxel counts; None for all.

    Returns:
        A scalar.
    """
    return probability_mse(student_logits.softmax(1), teacher_probs, valid)


@fp32
def cross_pseudo_supervision(logits: Tensor, hard_target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute the cross entropy of one network's logits with the other's hard pseudo-label.

    Chen et al. 2021 (arXiv 2106.01226), one of its two directions, restricted to the valid voxels.

    Args:
        logits: (b, C, ...) of the network that learns.
        hard_target: integer pseudo-label (b, 1, ...) or (b, ...) of the other network.
        valid: bool (b, 1, ...), True where a voxel counts; None for all.

    Returns:
        A scalar; 0, with a (zero) gradient, when no voxel is valid.
    """
    return cross_entropy(logits, hard_target.detach(), valid)
