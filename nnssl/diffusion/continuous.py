"""Diffusion in continuous time: cosine schedule, forward process and asymmetric DDIM steps, in float32.

Symbols follow Ji et al. 2023 (DDP, arXiv 2303.17559), which label-embedding diffusion builds on: t in [0, 1] time,
lambda log-SNR, gamma = sigmoid(lambda) what is left of the signal's variance, alpha = sqrt(gamma) signal rate,
sigma = sqrt(1 - gamma) noise rate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nnssl.losses.precision import fp32

#: Largest time drawn in training.
T_MAX = 0.999
#: Offsets that keep the schedule away from its ends, and the smallest noise-to-signal ratio.
OFFSET, STRETCH, FLOOR = 0.0002, 1.00025, 1e-5
#: Keeps the division by sigma finite at t = 0.
SIGMA_MIN = 1e-8


@fp32
def log_snr(t: Tensor) -> Tensor:
    """Return ``lambda(t) = -ln max(tan^2(pi/2 (t + 0.0002) / 1.00025), 1e-5)`` of times in [0, 1].

    The published form has ``cos^-2 - 1`` in place of the equal ``tan^2``.
    """
    noise_to_signal = torch.tan(math.pi / 2 * (t + OFFSET) / STRETCH).square()
    return -noise_to_signal.clamp_min(FLOOR).log()


@fp32
def rates(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return (alpha, sigma) of times; ``alpha^2 + sigma^2 = 1``."""
    snr = log_snr(t)
    return torch.sigmoid(snr).sqrt(), torch.sigmoid(-snr).sqrt()


@fp32
def diffuse(z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return ``z_t = alpha(t) z + sigma(t) eps``.

    Args:
        z: clean signal (b, ...).
        t: times (b,).
        noise: eps, standard normal, of z's shape.
    """
    alpha, sigma = (rate.view(-1, *[1] * (z.ndim - 1)) for rate in rates(t))
    return alpha * z + sigma * noise


def step_pairs(steps: int, difference: float = 1.0) -> list[tuple[float, float]]:
    """Return the (t0, t1) of each sampling step: ``t0 = 1 - k/S``, ``t1 = max(1 - (k + 1 + td)/S, 0)``.

    With td > 0 a step noises its estimate less than the next step is told: the asymmetric time intervals of Chen et
    al. 2023 (arXiv 2208.04202). td = 0 gives ordinary DDIM steps.

    Args:
        steps: S.
        difference: td, in steps.

    Raises:
        ValueError: no step, or a negative difference.
    """
    if steps < 1 or difference < 0:
        raise ValueError(f"steps must be at least 1 and the difference at least 0, got {steps} and {difference}")
    return [(1 - k / steps, max(1 - (k + 1 + difference) / steps, 0.0)) for k in range(steps)]


@fp32
def ddim_step(z_t: Tensor, estimate: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
    """Go from z at time t0 to time t1 along an estimate of the clean signal (deterministic DDIM).

    ``eps = (z_t - alpha(t0) z) / max(sigma(t0), 1e-8)``, then ``alpha(t1) z + sigma(t1) eps``.

    Args:
        z_t: noised signal (b, ...).
        estimate: estimated clean signal, of z_t's shape.
        t0: times z_t is taken to be at (b,).
        t1: times to go to (b,).
    """
    alpha, sigma = (rate.view(-1, *[1] * (z_t.ndim - 1)) for rate in rates(t0))
    return diffuse(estimate, t1, (z_t - alpha * estimate) / sigma.clamp_min(SIGMA_MIN))
