"""DDIM and DDPM against an exactly solvable model and against Bayes' rule."""

import pytest
import torch

from nnssl.diffusion.samplers import ddim_sample, ddpm_sample, spaced_timesteps
from nnssl.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()


SPREAD = 0.5


def best(y, t):
    """For data N(0, s^2) the best denoiser is linear."""
    a = SCHEDULE.alpha_bar[t[0]]
    return y * a.sqrt() * SPREAD**2 / (a * SPREAD**2 + 1 - a)


def test_gaussian_data_keep_their_variance():
    """DDIM with every step and the best denoiser maps N(0, 1) to N(0, s^2)."""
    start = torch.randn(1, 1, 100, 100, generator=torch.Generator().manual_seed(0))
    got = ddim_sample(best, start, spaced_timesteps(1000, 1000), SCHEDULE)
    torch.testing.assert_close(got, start * SPREAD, rtol=0.02, atol=0.02)


def test_ancestral_samples_have_the_datas_variance_and_forget_their_start():
    torch.manual_seed(0)
    start = torch.randn(1, 1, 100, 100)
    got = ddpm_sample(best, start, spaced_timesteps(1000, 1000), SCHEDULE)
    assert got.std().item() == pytest.approx(SPREAD, rel=0.03)
    assert abs((got * start).mean().item()) < 0.03


@pytest.mark.parametrize("steps", [(0, 9), (3, 7)])
def test_ancestral_steps_draw_from_the_posterior_that_bayes_gives(steps):
    """A prior N(sqrt(a) x0, 1 - a) at the earlier step times the likelihood of the later value, in one number."""
    schedule, (early, late) = NoiseSchedule.cosine(10), steps
    x0, value, drawn = 0.7, -1.3, []

    def oracle(y, t):
        drawn.append(y)
        return torch.full_like(y, x0)

    torch.manual_seed(0)
    ddpm_sample(oracle, torch.full((1, 400_000), value), steps, schedule)
    before, after = (schedule.alpha_bar[t].item() for t in (early, late))
    kept = after / before  # of the earlier value's variance
    precision = 1 / (1 - before) + kept / (1 - kept)
    mean = (before**0.5 * x0 / (1 - before) + kept**0.5 * value / (1 - kept)) / precision
    assert drawn[1].mean().item() == pytest.approx(mean, abs=5 * (precision * 400_000) ** -0.5)
    assert drawn[1].var().item() == pytest.approx(1 / precision, rel=0.02)


@pytest.mark.parametrize("sampler", [ddim_sample, ddpm_sample])
def test_the_result_is_the_models_last_x0(sampler):
    truth, seen = torch.randn(2, 3, 4), []

    def oracle(_, t):
        seen.append(t.tolist())
        return truth

    assert torch.equal(sampler(oracle, torch.randn(2, 3, 4), [0, 500, 999], SCHEDULE), truth)
    assert seen == [[999, 999], [500, 500], [0, 0]]


@pytest.mark.parametrize("sampler", [ddim_sample, ddpm_sample])
def test_sampling_keeps_no_graph(sampler):
    weight = torch.ones(1, requires_grad=True)
    assert not sampler(lambda y, t: y * weight, torch.randn(1, 1, 2, 2), [0, 999], SCHEDULE).requires_grad
