"""Noise schedules: how much of a label is left at each time step.

Symbols follow Ho et al. 2020 (arXiv 2006.11239): beta_t variance of the noise added at step t, alpha_bar_t =
prod_(s <= t) (1 - beta_s) what is left of the signal's variance. Tables are computed in float64, kept in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class NoiseSchedule(nn.Module):
    """Table of alpha_bar over T time steps, 0-based.

    Args:
        alpha_bar: alpha_bar_0 .. alpha_bar_(T-1), float64 (T,), falling and within (0, 1).

    Raises:
        ValueError: if the table does not fall or leaves (0, 1).
    """

    alpha_bar: Tensor

    def __init__(self, alpha_bar: Tensor) -> None:
        super().__init__()
        inside = bool((alpha_bar > 0).all() and (alpha_bar < 1).all())
        if alpha_bar.ndim != 1 or not inside or not bool((alpha_bar.diff() < 0).all()):
            raise ValueError("alpha_bar must fall and stay within (0, 1)")
        self.register_buffer("alpha_bar", alpha_bar.float(), persistent=False)

    @classmethod
    def linear(cls, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Return the linear schedule: beta_t from ``beta_start`` to ``beta_end`` (Ho et al. 2020, section 4)."""
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        return cls(torch.cumprod(1 - betas, 0))

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
        """Return the cosine schedule of Nichol and Dhariwal 2021 (arXiv 2102.09672, eq. 17), betas clipped."""
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=max_beta)
        return cls(torch.cumprod(1 - betas, 0))

    @classmethod
    def scaled_linear(cls, steps: int = 1000) -> NoiseSchedule:
        """Return the linear schedule stretched over T steps: beta_t from 0.1/T to 20/T, for T of 21 or more.

        Raises:
            ValueError: T is so small that a beta reaches 1.
        """
        if steps <= 20:
            raise ValueError(f"a scaled linear schedule needs more than 20 steps, got {steps}")
        return cls.linear(steps, 0.1 / steps, 20 / steps)

    @property
    def steps(self) -> int:
        """T, the number of time steps."""
        return len(self.alpha_bar)

    def at(self, t: Tensor, like: Tensor) -> Tensor:
        """Return alpha_bar of integer time steps (b,), shaped to multiply ``like`` (b, ...)."""
        return self.alpha_bar[t].view(-1, *[1] * (like.ndim - 1))
