"""The blend of parameters equals its closed form and touches nothing else."""

import pytest
import torch
from torch import nn

from nnssl.training.transfer import blend


def networks(seed: int):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def test_repeated_blends_follow_the_closed_form():
    """After n blends with constant sources: theta_n = m + keep^n (theta_0 - m), m the sources' mean."""
    theta, xi, psi = (networks(seed) for seed in range(3))
    start = [p.detach().clone() for p in theta.parameters()]
    sources = [[p.detach().clone() for p in n.parameters()] for n in (xi, psi)]
    for _ in range(7):
        pairs = zip(theta.parameters(), zip(xi.parameters(), psi.parameters(), strict=True), strict=True)
        blend(pairs, 0.9)
    for p, first, a, b in zip(theta.parameters(), start, *sources, strict=True):
        mean = (a + b) / 2
        torch.testing.assert_close(p.detach(), mean + 0.9**7 * (first - mean))
    for network, before in zip((xi, psi), sources, strict=True):
        assert all(torch.equal(a, p) for a, p in zip(before, network.parameters(), strict=True))


def test_optimizer_state_and_running_statistics_stay():
    theta, xi = networks(0), networks(1)
    optimizer = torch.optim.SGD(theta.parameters(), 0.1, momentum=0.9)
    theta(torch.randn(2, 1, 5, 5)).square().mean().backward()
    optimizer.step()
    state = {k: v["momentum_buffer"].clone() for k, v in optimizer.state_dict()["state"].items()}
    buffers = [b.clone() for b in theta.buffers()]
    blend(((p, (q,)) for p, q in zip(theta.parameters(), xi.parameters(), strict=True)), 0.0)
    assert all(torch.equal(p, q) for p, q in zip(theta.parameters(), xi.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(buffers, theta.buffers(), strict=True))
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[k]["momentum_buffer"], v) for k, v in state.items())


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        blend([(nn.Parameter(torch.zeros(2)), (nn.Parameter(torch.zeros(3)),))], 0.9)
