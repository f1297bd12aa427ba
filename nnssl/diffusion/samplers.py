"""Sampling with few steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nnssl.diffusion.process import predict_noise
from nnssl.diffusion.schedule import NoiseSchedule


def spaced_timesteps(steps: int, count: int) -> list[int]:
    """Return ``count`` time steps spread evenly over 0..steps-1, both ends included, ascending."""
    if not 1 <= count <= steps:
        raise ValueError(f"count must lie in 1..{steps}, got {count}")
    if count == 1:
        return [steps - 1]
    return [round(i * (steps - 1) / (count - 1)) for i in range(count)]


@torch.no_grad()
def ddim_sample(
    model: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    timesteps: Sequence[int],
    schedule: NoiseSchedule,
) -> Tensor:
    """Run deterministic DDIM (eta = 0; Song et al. 2021, arXiv 2010.02502, eq. 12) with a model that predicts x0.

    ``Y_prev = sqrt(alpha_bar_prev) x0 + sqrt(1 - alpha_bar_prev) eps``, with alpha_bar_prev = 1 at the last step, so
    that the result is the model's last x0.

    Args:
        model: (Y_t (b, ...), t (b,)) -> x0 (b, ...).
        start: noise at the largest time step (b, ...).
        timesteps: time steps to visit, ascending.
        schedule: the noise schedule.
    """

    def step(y: Tensor, x0: Tensor, t: Tensor, before: Tensor) -> Tensor:
        noise, previous = predict_noise(y, t, x0, schedule), schedule.at(before, y)
        return previous.sqrt() * x0 + (1 - previous).sqrt() * noise

    return _walk(model, start, timesteps, step)


@torch.no_grad()
def ddpm_sample(
    model: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    timesteps: Sequence[int],
    schedule: NoiseSchedule,
) -> Tensor:
    """Run stochastic ancestral sampling (Ho et al. 2020, eqs. 6 and 7) over chosen steps with a model that predicts x0.

    The posterior between two visited steps takes their own alpha_bar, with ``alpha = alpha_bar_t / alpha_bar_prev``.

    Args:
        model: (Y_t (b, ...), t (b,)) -> x0 (b, ...).
        start: noise at the largest time step (b, ...).
        timesteps: time steps to visit, ascending.
        schedule: the noise schedule.

    Returns:
        The model's last x0.
    """

    def step(y: Tensor, x0: Tensor, t: Tensor, before: Tensor) -> Tensor:
        now, previous = schedule.at(t, y), schedule.at(before, y)
        beta = 1 - now / previous
        mean = previous.sqrt() * beta / (1 - now) * x0 + (1 - beta).sqrt() * (1 - previous) / (1 - now) * y
        return mean + (beta * (1 - previous) / (1 - now)).sqrt() * torch.randn_like(y)

    return _walk(model, start, timesteps, step)


def _walk(
    model: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    timesteps: Sequence[int],
    step: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Visit time steps downward and return the model's last x0; ``step(y, x0, t, before)`` leads to the next one."""
    y, x0 = start, start
    for index in reversed(range(len(timesteps))):
        t = torch.full((len(y),), timesteps[index], device=y.device)
        x0 = model(y, t)
        if index > 0:
            y = step(y, x0, t, torch.full_like(t, timesteps[index - 1]))
    return x0
