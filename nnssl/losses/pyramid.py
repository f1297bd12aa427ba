"""Consistency of the predictions that a network makes at several resolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnssl.losses.precision import fp32
from nnssl.losses.segmentation import check_valid


@fp32
def kl_divergence(p: Tensor, q: Tensor, binary: bool = False) -> Tensor:
    """Return ``sum_c p_c ln(p_c / q_c)`` per voxel (b, 1, ...), in nats, with gradients to both.

    Args:
        p: probabilities (b, C, ...).
        q: probabilities (b, C, ...).
        binary: channels are independent regions, each with its complement.
    """
    terms = _relative(p, q)
    if binary:
        terms = terms + _relative(1 - p, 1 - q)
    return terms.sum(1, keepdim=True)


def _relative(p: Tensor, q: Tensor) -> Tensor:
    tiny = torch.finfo(torch.float32).eps  # bounds the gradient of the logarithm
    return p * (p.clamp_min(tiny).log() - q.clamp_min(tiny).log())


@fp32
def pyramid_consistency(probs: Sequence[Tensor], valid: Tensor, binary: bool = False) -> Tensor:
    """Compute the uncertainty rectified pyramid consistency of URPC (Luo et al. 2021, arXiv 2012.07042).

    With the mean ``m`` of the S predictions and ``D_s = KL(m, p_s)`` per voxel, which tells where p_s is uncertain::

        L = 1/S sum_s [ mean(exp(-D_s) (p_s - m)^2) / mean(exp(-D_s)) + mean(D_s) ]

    Means run over valid voxels (squares: classes too). Without the second term large D_s would switch voxels off.

    Args:
        probs: S predictions (b, C, ...) at full resolution; every one gets a gradient, also through their mean.
        valid: bool (b, 1, ...), True where a voxel counts.
        binary: channels are independent regions.

    Returns:
        A scalar of at least 0, and 0 where all predictions agree.
    """
    mean = torch.stack(list(probs)).mean(0)
    mask = check_valid(valid, mean)
    count = valid.sum().clamp_min(1)
    zero = mean.new_zeros(())
    total = zero
    for p in probs:
        divergence = kl_divergence(mean, p, binary)
        certainty = torch.exp(-divergence)
        weight = certainty if mask is None else certainty.where(mask, zero)
        rectified = (weight * (p - mean).square()).sum() / (mean.shape[1] * weight.sum().clamp_min(1e-8))
        total = total + rectified + (divergence if mask is None else divergence.where(mask, zero)).sum() / count
    return total / len(probs)
