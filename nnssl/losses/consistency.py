"""Losses between predictions of the same voxels: consistency, mutual consistency, cross pseudo-supervision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnssl.losses.precision import fp32
from nnssl.losses.segmentation import check_valid, cross_entropy


@fp32
def probability_mse(
    student_probs: Tensor, teacher_probs: Tensor, valid: Tensor | None = None, detach: bool = True
) -> Tensor:
    """Compute the mean squared difference of two probability maps over valid voxels and channels.

    The consistency cost of the mean teacher (Tarvainen and Valpola 2017, arXiv 1703.01780). Channels may be classes
    of a softmax or regions of a sigmoid.

    Args:
        student_probs: (b, C, ...).
        teacher_probs: (b, C, ...).
        valid: bool (b, 1, ...), True where a voxel counts; None for all.
        detach: treat the teacher as a constant; False lets the gradient reach both.

    Returns:
        A scalar; 0, with a (zero) gradient, when no voxel is valid.

    Raises:
        ValueError: shapes differ.
    """
    if student_probs.shape != teacher_probs.shape:
        raise ValueError(
            f"student and teacher differ in shape: {tuple(student_probs.shape)} and {tuple(teacher_probs.shape)}"
        )
    return _mean_square(student_probs - (teacher_probs.detach() if detach else teacher_probs), valid)


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


@fp32
def sharpen(probs: Tensor, temperature: float, binary: bool = False) -> Tensor:
    """Return ``p_c^(1/T) / sum_k p_k^(1/T)``, a soft pseudo-label that is nearer to its arg max for T < 1.

    MC-Net (Wu et al. 2021, arXiv 2103.02911) for any number of classes; its formula is that of two.

    Args:
        probs: (b, C, ...).
        temperature: T, above 0; 1 changes nothing.
        binary: every channel against its complement, ``p^(1/T) / (p^(1/T) + (1 - p)^(1/T))``: for regions, and what
            the authors' code does for any C. The channels of more than two classes then need not sum to 1.

    Raises:
        ValueError: the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"a temperature is above 0, got {temperature}")
    tiny = torch.finfo(torch.float32).tiny  # powers as logarithms: 0.1^10 and below would lose their ratio
    logs = probs.clamp_min(tiny).log() / temperature
    if binary:
        return torch.sigmoid(logs - (1 - probs).clamp_min(tiny).log() / temperature)
    return logs.softmax(1)


@fp32
def mutual_consistency(
    probs: Sequence[Tensor],
    temperature: float,
    valid: Tensor | None = None,
    binary: bool = False,
    detach: bool = True,
) -> Tensor:
    """Compute ``sum_(i != j) mean (p_i - sharpen(p_j))^2`` over valid voxels and channels, of MC-Net.

    Args:
        probs: two or more predictions (b, C, ...).
        temperature: of the sharpening.
        valid: bool (b, 1, ...), True where a voxel counts; None for all.
        binary: see :func:`sharpen`.
        detach: sharpened predictions are constants; False lets the gradient through them too, as the authors' code.

    Returns:
        A scalar; above 0 also where all agree, unless they are hard.
    """
    soft = [sharpen(p.detach() if detach else p, temperature, binary) for p in probs]
    total = probs[0].new_zeros(())
    for i, p in enumerate(probs):
        for j, target in enumerate(soft):
            if i != j:
                total = total + _mean_square(p - target, valid)
    return total


def _mean_square(difference: Tensor, valid: Tensor | None) -> Tensor:
    squared = difference.square()
    mask = check_valid(valid, squared)
    if mask is None:
        return squared.mean()
    return squared.where(mask, squared.new_zeros(())).sum() / (mask.sum().clamp_min(1) * squared.shape[1])


@fp32
def dice_distance(probs: Tensor, reference: Tensor, valid: Tensor | None = None, smooth: float = 1e-5) -> Tensor:
    """Compute ``mean_c 1 - (2 sum p q + s) / (sum p^2 + sum q^2 + s)`` of two probability maps, 0 where they are equal.

    The distance of SS-Net's 2D code (arXiv 2203.01324); with linear sums in the denominator it would be above 0 at
    agreement and pull towards hard predictions.

    Args:
        probs: p (b, C, ...).
        reference: q (b, C, ...), treated as a constant.
        valid: bool (b, 1, ...), True where a voxel counts; None for all.
        smooth: s.

    Returns:
        A scalar in [0, 1]; 0 when no voxel is valid.
    """
    p, q = probs, reference.detach()
    mask = check_valid(valid, p)
    if mask is not None:
        p, q = (x.where(mask, x.new_zeros(())) for x in (p, q))
    axes = [0, *range(2, p.ndim)]
    overlap, total = (p * q).sum(axes), (p.square() + q.square()).sum(axes)
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean()
