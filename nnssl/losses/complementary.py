"""The complementary loss of SSL4MIS's FixMatch: learn which class a voxel is surely not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nnssl.losses.precision import fp32
from nnssl.losses.segmentation import check_valid, cross_entropy


@fp32
def spatial_certainty(probs: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return ``1 - mean_(b, c) H_bc / ln N``, with H_bc the entropy of a class map over its N voxels, scaled to sum 1.

    Computed in single precision: a background map sums to more than half precision holds.

    Args:
        probs: (b, C, ...).
        valid: bool (b, 1, ...), True where a voxel counts; None for all.

    Returns:
        A scalar in [0, 1], differentiable; 0 for uniform maps.
    """
    mask = check_valid(valid, probs)
    maps = probs if mask is None else probs.where(mask, probs.new_zeros(()))
    maps = maps.flatten(2)
    tiny = torch.finfo(maps.dtype).tiny
    maps = maps / maps.sum(2, keepdim=True).clamp_min(tiny)
    entropy = -(maps * maps.clamp_min(tiny).log()).sum(2)
    every = maps.new_full((len(maps), 1), maps.shape[2])
    count = every if mask is None else mask.flatten(1).sum(1, keepdim=True).to(maps.dtype)
    return 1 - (entropy / count.clamp_min(math.e).log()).mean()


@fp32
def complementary_loss(probs: Tensor, reference: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return ``CE(softmax(1 - p), argmin_c q)``: the least likely class of q must be unlikely in p too.

    Args:
        probs: p, probabilities of the prediction that learns (b, C, ...).
        reference: q, probabilities of the better view (b, C, ...), treated as a constant.
        valid: bool (b, 1, ...), True where a voxel counts; None for all.
    """
    return cross_entropy(1 - probs, reference.detach().argmin(1, keepdim=True), valid)


def weighted_complementary_loss(probs: Tensor, reference: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return ``w^2`` times the complementary loss, w the spatial certainty of ``probs`` (with its gradient)."""
    return spatial_certainty(probs, valid).square() * complementary_loss(probs, reference, valid)
