"""Losses on signed distances against their formulas, and their laws."""

import numpy as np
import pytest
import torch

from nnssl.losses.signed_distance import distance_regression, distance_to_probability, dual_task_consistency


def maps(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_probability_is_the_smooth_step():
    z = torch.tensor([-1.0, -0.001, 0.0, 0.001, 1.0], dtype=torch.float64)
    expected = 1 / (1 + np.exp(np.minimum(1500 * z.numpy(), 700)))
    np.testing.assert_allclose(distance_to_probability(z, 1500).numpy(), expected, atol=1e-12)


def test_consistency_voxel_by_voxel_and_its_gradient():
    p, z = maps(2)
    z = (z - 0.5) / 10
    valid = torch.rand(2, 1, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    squares = [
        (1 / (1 + np.exp(20 * z[b, c, i, j].item())) - p[b, c, i, j].item()) ** 2
        for b, _, i, j in valid.nonzero().tolist()
        for c in range(3)
    ]
    assert dual_task_consistency(p, z, 20, valid).item() == pytest.approx(np.mean(squares))
    both = [p.requires_grad_(), z.requires_grad_()]
    assert torch.autograd.gradcheck(lambda a, b: dual_task_consistency(a, b, 20, valid), both)


def test_regression_counts_what_is_known():
    z, target = maps(2)
    known = torch.rand(z.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    expected = ((z - target)[known] ** 2).mean()
    assert distance_regression(z, target, known).item() == pytest.approx(expected.item())


def test_nothing_that_counts_is_a_finite_zero_with_a_gradient():
    p, z = (x.requires_grad_() for x in maps(2))
    nowhere = torch.zeros(p.shape, dtype=torch.bool)
    loss = dual_task_consistency(p, z, 1500, nowhere[:, :1]) + distance_regression(z, p.detach(), nowhere)
    loss.backward()
    assert loss.item() == 0
    assert not z.grad.any()
    with pytest.raises(ValueError, match="differ in shape"):
        dual_task_consistency(p[:, :2], z, 1500, nowhere[:, :1])
    with pytest.raises(ValueError, match="differ in shape"):
        distance_regression(z, p, nowhere[:, :1])
