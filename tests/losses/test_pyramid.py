"""URPC's loss against its formula, and its laws."""

import pytest
import torch
from torch.distributions import Categorical
from torch.distributions import kl_divergence as torch_kl

from nnssl.losses.pyramid import kl_divergence, pyramid_consistency


def predictions(count, seed=0, classes=3):
    generator = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(2, classes, 5, 6, generator=generator)).softmax(1) for _ in range(count)]


def everywhere(probs):
    return torch.ones_like(probs[:, :1], dtype=torch.bool)


def test_divergence_is_torchs():
    p, q = predictions(2)
    expected = torch_kl(Categorical(p.movedim(1, -1)), Categorical(q.movedim(1, -1)))
    assert torch.allclose(kl_divergence(p, q)[:, 0], expected, atol=1e-5)


def test_binary_divergence_of_one_region_is_that_of_two_classes():
    p, q = (x[:, :1] for x in predictions(2, classes=2))
    two = kl_divergence(torch.cat([p, 1 - p], 1), torch.cat([q, 1 - q], 1))
    assert torch.allclose(kl_divergence(p, q, binary=True), two, atol=1e-6)


def test_loss_voxel_by_voxel():
    probs = predictions(3)
    valid = torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(1)) < 0.7
    total = 0.0
    for p in probs:
        squares, weights, divergences = [], [], []
        for b, i, j in valid[:, 0].nonzero().tolist():
            mean = sum(x[b, :, i, j].double() for x in probs) / 3
            own = p[b, :, i, j].double()
            divergences.append((mean * (mean / own).log()).sum())
            weights.append(torch.exp(-divergences[-1]))
            squares.append(weights[-1] * (own - mean).square().mean())
        total += (sum(squares) / sum(weights) + sum(divergences) / len(divergences)).item()
    assert pyramid_consistency(probs, valid).item() == pytest.approx(total / 3, rel=1e-5)


def test_zero_at_agreement_and_symmetric():
    one = predictions(1)[0]
    assert pyramid_consistency([one, one.clone(), one.clone()], everywhere(one)).item() == pytest.approx(0, abs=1e-6)
    a, b, c = predictions(3)
    loss = pyramid_consistency([a, b, c], everywhere(a))
    assert loss > 0
    assert torch.allclose(loss, pyramid_consistency([c, a, b], everywhere(a)))


@pytest.mark.parametrize("binary", [False, True])
def test_the_gradient_is_that_of_the_whole_formula(binary):
    """Also through the mean and the weights: nothing in it is a constant."""
    probs = [p.double().requires_grad_() for p in predictions(3)]
    valid = everywhere(probs[0])
    valid[0, :, 1] = False
    assert torch.autograd.gradcheck(lambda *p: pyramid_consistency(p, valid, binary), probs, fast_mode=True)


def test_voxels_that_do_not_count_have_no_gradient_and_certain_zeros_are_finite():
    probs = [p.requires_grad_() for p in predictions(2)]
    valid = everywhere(probs[0])
    valid[:, :, :2] = False
    pyramid_consistency(probs, valid).backward()
    assert not probs[0].grad[:, :, :2].any()
    hard = [torch.eye(3)[i].view(1, 3, 1, 1).requires_grad_() for i in (0, 2)]
    loss = pyramid_consistency(hard, everywhere(hard[0]))
    loss.backward()
    assert loss.isfinite()
    assert hard[0].grad.isfinite().all()
    empty = torch.zeros_like(valid)
    assert pyramid_consistency(predictions(2), empty).item() == 0
