"""Virtual adversarial perturbations."""

import pytest
import torch

from nnssl.losses.consistency import dice_distance
from nnssl.training.adversarial import unit, virtual_adversarial_perturbation


def test_it_finds_the_worst_direction_of_a_quadratic_form():
    """``|A r|^2`` grows most along the first right singular vector of A; power iterations converge to it."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(12, 12, generator=generator)
    x = torch.randn(3, 1, 3, 4, generator=generator)

    def distance(changed):
        return ((changed - x).flatten(1) @ a.T).square().sum()

    r = virtual_adversarial_perturbation(x, distance, xi=1.0, epsilon=2.0, iterations=60)
    worst = torch.linalg.svd(a).Vh[0]
    for item in r:
        assert item.norm().item() == pytest.approx(2.0, rel=1e-5)
        assert abs(torch.dot(item.flatten() / 2, worst).item()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("ndim", [2, 3])
def test_it_moves_the_output_more_than_noise_of_the_same_norm_and_no_weight(ndim):
    torch.manual_seed(0)
    conv = (torch.nn.Conv2d, torch.nn.Conv3d)[ndim - 2]
    network = torch.nn.Sequential(conv(1, 8, 3, padding=1), torch.nn.Tanh(), conv(8, 3, 3, padding=1))
    x = torch.randn(2, 1, *[6] * ndim)
    reference = network(x).softmax(1).detach()

    def distance(changed):
        return dice_distance(network(changed).softmax(1), reference)

    r = virtual_adversarial_perturbation(x, distance, xi=1.0, epsilon=1.0)
    assert r.flatten(1).norm(dim=1).tolist() == pytest.approx([1, 1], rel=1e-5)
    assert not r.requires_grad
    assert all(p.grad is None for p in network.parameters())
    moved = distance(x + r).item()
    assert all(moved > 1.5 * distance(x + unit(torch.randn_like(x))).item() for _ in range(20))


def test_a_prediction_that_nothing_moves_gives_a_finite_zero():
    x = torch.randn(2, 1, 4, 4)
    r = virtual_adversarial_perturbation(x, lambda changed: (changed * 0).sum())
    assert not r.any()
    with torch.no_grad():  # it makes its own gradients
        r = virtual_adversarial_perturbation(x, lambda changed: changed.square().sum(), epsilon=3.0)
    assert r.flatten(1).norm(dim=1).tolist() == pytest.approx([3, 3])
