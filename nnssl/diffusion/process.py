"""The forward process and its conversions, for any number of dimensions, in float32 with autocast off."""

from __future__ import annotations

from torch import Tensor

from nnssl.diffusion.schedule import NoiseSchedule
from nnssl.losses.precision import fp32


@fp32
def q_sample(y0: Tensor, t: Tensor, noise: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return ``Y_t = sqrt(alpha_bar_t) Y_0 + sqrt(1 - alpha_bar_t) eps`` (Diff-CL eq. 5; Ho et al. 2020 eq. 4).

    Args:
        y0: clean signal (b, ...).
        t: integer time steps (b,), 0..T-1.
        noise: eps, standard normal, of y0's shape.
        schedule: the noise schedule.
    """
    alpha_bar = schedule.at(t, y0)
    return alpha_bar.sqrt() * y0 + (1 - alpha_bar).sqrt() * noise


@fp32
def predict_noise(y_t: Tensor, t: Tensor, x0: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return the eps that leads from ``x0`` to ``y_t``: ``(Y_t - sqrt(alpha_bar_t) x0) / sqrt(1 - alpha_bar_t)``."""
    alpha_bar = schedule.at(t, y_t)
    return (y_t - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()


@fp32
def predict_x0(y_t: Tensor, t: Tensor, noise: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return the x0 that ``noise`` leads to ``y_t`` from, the inverse of :func:`q_sample` in its first argument."""
    alpha_bar = schedule.at(t, y_t)
    return (y_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
