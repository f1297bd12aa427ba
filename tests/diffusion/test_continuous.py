"""Continuous-time diffusion: the published schedule, its step pairs, and what DDIM does at its ends."""

from __future__ import annotations

import math

import pytest
import torch

from nnssl.diffusion.continuous import T_MAX, ddim_step, diffuse, log_snr, rates, step_pairs


def published_gamma(t: float) -> float:
    """Return gamma as DDP writes it, in double precision."""
    ratio = math.cos(math.pi / 2 * (t + 0.0002) / 1.00025) ** -2 - 1
    return 1 / (1 + max(ratio, 1e-5))


@pytest.mark.parametrize(
    ("t", "gamma"),
    [(0.01, 0.9997), (0.1, 0.97545), (0.25, 0.8534), (0.5, 0.4999), (0.75, 0.1464), (0.9, 0.02448), (0.999, 2.72e-6)],
)
def test_gamma_has_its_published_values(t, gamma):
    alpha, sigma = rates(torch.tensor([t]))
    assert alpha.square().item() == pytest.approx(gamma, rel=5e-3, abs=5e-5 if gamma > 1e-3 else 0)
    assert alpha.square().item() == pytest.approx(published_gamma(t), rel=1e-3)
    assert (alpha.square() + sigma.square()).item() == pytest.approx(1, abs=1e-6)


def test_the_ends_are_almost_clean_and_almost_noise():
    alpha, sigma = rates(torch.tensor([0.0, 1.0]))
    assert sigma[0].item() == pytest.approx(0.00316, abs=1e-5)  # the floor
    assert alpha[1].square().item() == pytest.approx(published_gamma(1.0), rel=0.01)
    assert (log_snr(torch.linspace(0.01, T_MAX, 200)).diff() < 0).all()


def test_half_precision_times_are_computed_in_single_precision():
    times = torch.tensor([0.1, 0.7], dtype=torch.bfloat16)
    assert log_snr(times).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        z = diffuse(torch.full((1, 2, 3), 0.01), torch.tensor([0.3]), torch.ones(1, 2, 3))
    assert z.dtype == torch.float32


@pytest.mark.parametrize(
    ("steps", "pairs"),
    [
        (1, [(1, 0)]),
        (3, [(1, 1 / 3), (2 / 3, 0), (1 / 3, 0)]),
        (5, [(1, 0.6), (0.8, 0.4), (0.6, 0.2), (0.4, 0), (0.2, 0)]),
    ],
)
def test_step_pairs(steps, pairs):
    assert [value for pair in step_pairs(steps) for value in pair] == pytest.approx([v for p in pairs for v in p])


def test_without_asymmetry_each_step_starts_where_the_last_one_ended():
    pairs = step_pairs(4, difference=0)
    assert [t1 for _, t1 in pairs[:-1]] == [t0 for t0, _ in pairs[1:]]
    assert pairs[-1][1] == 0
    for wrong in ((0, 1.0), (3, -1.0)):
        with pytest.raises(ValueError, match="at least"):
            step_pairs(*wrong)


def test_a_ddim_step_along_the_truth_stays_on_its_noise():
    """With the clean signal as estimate, the step lands where the same noise leads at the later time."""
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 3, 4, 5, generator=generator)
    t0, t1 = torch.tensor([0.8, 0.5]), torch.tensor([0.3, 0.5])
    moved = ddim_step(diffuse(z, t0, noise), z, t0, t1)
    torch.testing.assert_close(moved, diffuse(z, t1, noise), rtol=1e-4, atol=1e-5)


def test_a_ddim_step_follows_its_formula():
    z_t, estimate = torch.tensor([[0.7]]), torch.tensor([[-0.2]])
    a0, a1 = math.sqrt(published_gamma(0.6)), math.sqrt(published_gamma(0.2))
    noise = (0.7 + 0.2 * a0) / math.sqrt(1 - a0**2)
    expected = -0.2 * a1 + math.sqrt(1 - a1**2) * noise
    assert ddim_step(z_t, estimate, torch.tensor([0.6]), torch.tensor([0.2])).item() == pytest.approx(
        expected, rel=1e-4
    )
