"""DDIM against an exactly solvable model and against diffusers."""

import torch

from nnssl.diffusion.samplers import ddim_sample, spaced_timesteps
from nnssl.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()


def test_gaussian_data_keep_their_variance():
    """For data N(0, s^2) the best denoiser is linear; DDIM with every step maps N(0, 1) to N(0, s^2)."""
    s = 0.5

    def model(y, t):
        a = SCHEDULE.alpha_bar[t[0]]
        return y * a.sqrt() * s**2 / (a * s**2 + 1 - a)

    start = torch.randn(1, 1, 100, 100, generator=torch.Generator().manual_seed(0))
    got = ddim_sample(model, start, spaced_timesteps(1000, 1000), SCHEDULE)
    torch.testing.assert_close(got, start * s, rtol=0.02, atol=0.02)


def test_sampling_keeps_no_graph():
    weight = torch.ones(1, requires_grad=True)
    assert not ddim_sample(lambda y, t: y * weight, torch.randn(1, 1, 2, 2), [0, 999], SCHEDULE).requires_grad
