"""Reparameterize and Smooth (RS) of A&D: what the diffusion branch says, softened before it votes.

Wang and Li, NeurIPS 2023 (arXiv 2310.11320), equation 7, with the authors' code where the two differ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from nnssl.losses.precision import fp32

SMALLEST_PROBABILITY = 1e-6


@fp32
def gaussian_smooth(x: Tensor, sigma: float = 1.0) -> Tensor:
    """Smooth maps (b, C, ...) by a normalized Gaussian of 3 voxels an axis; outside is 0.

    Args:
        x: maps.
        sigma: of the Gaussian, voxels; 0 leaves the maps as they are.
    """
    if sigma == 0:
        return x
    side = math.exp(-0.5 / sigma**2)
    center, side = 1 / (1 + 2 * side), side / (1 + 2 * side)
    for axis in range(2, x.ndim):
        before, after = x.narrow(axis, 0, x.shape[axis] - 1), x.narrow(axis, 1, x.shape[axis] - 1)
        smooth = center * x
        smooth.narrow(axis, 1, x.shape[axis] - 1).add_(before, alpha=side)
        smooth.narrow(axis, 0, x.shape[axis] - 1).add_(after, alpha=side)
        x = smooth
    return x


@torch.no_grad()
@fp32
def reparameterize_and_smooth(values: Tensor, tau: float = 1.0, sigma: float = 1.0) -> Tensor:
    """Return ``Smooth(softmax((values + Gumbel noise) / tau))``, the vote of the diffusion branch.

    Fresh noise for every voxel and class, from the global generator.

    Args:
        values: unnormalized log-probabilities (b, K, ...). The authors' code gives the sampled x0 itself, in -1..1, so
            that even a certain branch votes with .80 for K = 2, .57 for K = 4 and .25 for K = 14.
        tau: temperature.
        sigma: of the smoothing, voxels; 0 = none.
    """
    return gaussian_smooth(functional.gumbel_softmax(values, tau, hard=False, dim=1), sigma)


def log_probabilities(x0: Tensor) -> Tensor:
    """Return ``ln((x0 + 1) / 2)`` of a label map scaled to -1..1, bounded below."""
    return ((x0 + 1) / 2).clamp_min(SMALLEST_PROBABILITY).log()
