"""Laws of the schedules, the forward process and the sampler."""

import math

import pytest
import torch

from nnssl.diffusion.process import predict_noise, predict_x0, q_sample
from nnssl.diffusion.samplers import ddim_sample, spaced_timesteps
from nnssl.diffusion.schedule import NoiseSchedule


@pytest.mark.parametrize(
    ("t", "value", "digits"),
    [(0, 0.9999, 4), (100, 0.895, 3), (200, 0.656, 3), (500, 0.0778, 4), (700, 0.0069, 4), (999, 4.0e-5, 6)],
)
def test_linear_alpha_bar_has_its_published_values(t, value, digits):
    assert NoiseSchedule.linear().alpha_bar[t].item() == pytest.approx(value, abs=0.6 * 10**-digits)


def test_linear_alpha_bar_is_the_running_product_in_double_precision():
    running = 1.0
    for t in range(1000):
        running *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
    assert NoiseSchedule.linear().alpha_bar[-1].item() == pytest.approx(running, rel=1e-5)


def test_cosine_alpha_bar_follows_its_closed_form_where_betas_are_not_clipped():
    schedule = NoiseSchedule.cosine(1000)

    def f(x):
        return math.cos((x + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 10, 400, 900):
        assert schedule.alpha_bar[t].item() == pytest.approx(f((t + 1) / 1000) / f(0), rel=1e-4)


def test_cosine_alpha_bar_of_ten_steps_has_its_published_values():
    """DiffRect's schedule; its last beta is clipped."""
    published = [0.972093, 0.898706, 0.786911, 0.647478, 0.493844, 0.340810, 0.203121, 0.094046, 0.024092, 2.41e-5]
    assert NoiseSchedule.cosine(10).alpha_bar.tolist() == pytest.approx(published, rel=1e-5, abs=6e-7)
    assert spaced_timesteps(10, 2) == [0, 9]


def test_the_scaled_linear_schedule_is_the_linear_one_at_a_thousand_steps_and_as_strong_at_others():
    assert torch.equal(NoiseSchedule.scaled_linear(1000).alpha_bar, NoiseSchedule.linear(1000).alpha_bar)
    for steps in (21, 50, 200):
        alpha_bar = NoiseSchedule.scaled_linear(steps).alpha_bar
        assert alpha_bar[0].item() == pytest.approx(1 - 0.1 / steps)
        assert (1 - alpha_bar[-1] / alpha_bar[-2]).item() == pytest.approx(20 / steps, rel=1e-4)


@pytest.mark.parametrize("steps", [1, 10, 20])
def test_a_scaled_linear_schedule_of_few_steps_is_refused(steps):
    with pytest.raises(ValueError, match="more than 20 steps"):
        NoiseSchedule.scaled_linear(steps)


def test_a_schedule_must_fall():
    with pytest.raises(ValueError, match="must fall"):
        NoiseSchedule(torch.tensor([0.5, 0.6], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 2, 8, 8), (3, 2, 4, 4, 4)])
def test_conversions_invert_the_forward_process(shape):
    schedule, t = NoiseSchedule.linear(), torch.tensor([0, 300, 900])
    y0, noise = torch.randn(shape), torch.randn(shape)
    y_t = q_sample(y0, t, noise, schedule)
    assert torch.allclose(predict_noise(y_t, t, y0, schedule), noise, atol=1e-3)
    assert torch.allclose(predict_x0(y_t, t, noise, schedule)[:2], y0[:2], atol=1e-3)


def test_the_forward_process_keeps_unit_variance_and_mixes_by_alpha_bar():
    schedule = NoiseSchedule.linear()
    y0, noise = torch.randn(1, 100_000), torch.randn(1, 100_000)
    y_t = q_sample(y0, torch.tensor([300]), noise, schedule)
    assert y_t.var().item() == pytest.approx(1, abs=0.02)
    assert (y_t * y0).mean().item() == pytest.approx(math.sqrt(schedule.alpha_bar[300].item()), abs=0.02)


def test_half_precision_labels_are_noised_in_float32():
    y_t = q_sample(torch.ones(1, 4).half(), torch.tensor([999]), torch.zeros(1, 4).half(), NoiseSchedule.linear())
    assert y_t.dtype == torch.float32


def test_spaced_timesteps_hold_both_ends():
    assert spaced_timesteps(1000, 10) == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert spaced_timesteps(5, 5) == [0, 1, 2, 3, 4]
    assert spaced_timesteps(5, 1) == [4]
    with pytest.raises(ValueError, match="count"):
        spaced_timesteps(5, 6)


def test_ddim_returns_what_a_perfect_model_knows_and_visits_states_on_its_path():
    schedule, truth = NoiseSchedule.linear(), torch.randn(2, 3, 4)
    noise = torch.randn_like(truth)
    visited = {}

    def perfect(y, t):
        visited[int(t[0])] = y
        return truth

    steps = spaced_timesteps(1000, 4)
    start = q_sample(truth, torch.tensor([999, 999]), noise, schedule)
    assert torch.equal(ddim_sample(perfect, start, steps, schedule), truth)
    for step in steps:  # with the exact x0, DDIM keeps the one noise it started from
        expected = q_sample(truth, torch.tensor([step, step]), noise, schedule)
        assert torch.allclose(visited[step], expected, atol=1e-4)
