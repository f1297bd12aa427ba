"""Losses on signed distance maps z: scaled to [-1, 1], negative inside; see `nnssl.training.signed_distance`."""

from __future__ import annotations

import torch
from torch import Tensor

from nnssl.losses.precision import fp32
from nnssl.losses.segmentation import check_valid


@fp32
def distance_to_probability(distance: Tensor, sharpness: float) -> Tensor:
    """Return ``sigmoid(-k z)``, the smooth inverse of the distance transform (DTC, arXiv 2009.04448)."""
    return torch.sigmoid(-sharpness * distance)


@fp32
def dual_task_consistency(probs: Tensor, distance: Tensor, sharpness: float, valid: Tensor) -> Tensor:
    """Compute ``mean (sigmoid(-k z) - p)^2`` over valid voxels and channels, with gradients to both (L_DTC of DTC).

    Args:
        probs: p, foreground probabilities (b, K, ...).
        distance: z (b, K, ...).
        sharpness: k, above 0; the larger, the nearer to a step.
        valid: bool (b, 1, ...), True where a voxel counts.

    Returns:
        A scalar; 0, with a (zero) gradient, when no voxel is valid.

    Raises:
        ValueError: shapes differ.
    """
    if probs.shape != distance.shape:
        raise ValueError(f"probabilities and distances differ in shape: {tuple(probs.shape)}, {tuple(distance.shape)}")
    check_valid(valid, probs)
    return _mean((distance_to_probability(distance, sharpness) - probs).square(), valid.expand_as(probs))


@fp32
def distance_regression(distance: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Compute ``mean (z - z*)^2`` over the values that are known (DTC and SASSNet).

    Args:
        distance: z (b, K, ...).
        target: z* (b, K, ...).
        known: bool (b, K, ...).

    Returns:
        A scalar; 0, with a (zero) gradient, when nothing is known.

    Raises:
        ValueError: shapes differ.
    """
    if not distance.shape == target.shape == known.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (distance, target, known))
        raise ValueError(f"distances, their target and where it is known differ in shape: {shapes}")
    return _mean((distance - target).square(), known)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return values.where(counted, values.new_zeros(())).sum() / counted.sum().clamp_min(1)
