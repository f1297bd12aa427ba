"""The prototype losses: floors, masked columns, constants, and the published formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nnssl.losses.prototype import inter_loss, intra_loss, weighted_cosine_distance

C, K, D = 4, 3, 16


def case(n: int = 20, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    embeddings = F.normalize(torch.randn(n, D, generator=generator), dim=1).requires_grad_()
    labels = torch.randint(0, C, (n,), generator=generator)
    assigned = torch.randint(0, K, (n,), generator=generator)
    prototypes = F.normalize(torch.randn(C, K, D, generator=generator), dim=2)
    return embeddings, labels, assigned, prototypes


def test_inter_loss_is_the_published_sum():
    embeddings, labels, assigned, p = case()
    total = 0.0
    for i, c, k in zip(embeddings.tolist(), labels.tolist(), assigned.tolist(), strict=True):
        dot = {
            (cc, kk): math.exp(sum(a * b for a, b in zip(i, p[cc, kk].tolist(), strict=True)) / 0.1)
            for cc in range(C)
            for kk in range(K)
        }
        others = sum(value for (cc, _), value in dot.items() if cc != c)
        total -= math.log(dot[c, k] / (dot[c, k] + others)) / len(labels)
    assert inter_loss(embeddings, labels, assigned, p, 0.1).item() == pytest.approx(total, rel=1e-4)


def test_prototypes_of_the_same_class_are_no_negatives():
    embeddings, labels, assigned, p = case()
    labels = torch.ones_like(labels)
    assigned = torch.zeros_like(assigned)
    changed = p.clone()
    changed[1, 1:] = F.normalize(torch.randn(K - 1, D, generator=torch.Generator().manual_seed(9)), dim=1)
    same, other = (inter_loss(embeddings, labels, assigned, x) for x in (p, changed))
    assert same.item() == other.item()
    changed[2, 0] = changed[1, 1]
    assert inter_loss(embeddings, labels, assigned, changed).item() != same.item()


@pytest.mark.parametrize(("tau", "floor"), [(0.1, 0.0027), (1.0, 3.14)])
def test_floor_with_embeddings_on_their_prototypes_and_orthogonal_negatives(tau, floor):
    p = torch.eye(70).view(7, 10, 70)
    labels, assigned = torch.arange(7).repeat_interleave(10), torch.arange(10).repeat(7)
    on_top = p.flatten(0, 1)
    assert intra_loss(on_top, labels, assigned, p).item() == pytest.approx(0, abs=1e-10)
    value = inter_loss(on_top, labels, assigned, p, tau).item()
    assert value == pytest.approx(floor, abs=0.006)
    assert value == pytest.approx(math.log(1 + 60 * math.exp(-1 / tau)), rel=1e-4)


def test_intra_loss_is_the_squared_distance_of_cosines():
    embeddings, labels, assigned, p = case()
    embeddings = embeddings.detach()
    expected = [(1 - float(e @ p[c, k])) ** 2 for e, c, k in zip(embeddings, labels, assigned, strict=True)]
    assert intra_loss(embeddings, labels, assigned, p).item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_prototypes_are_constants_and_embeddings_learn():
    embeddings, labels, assigned, p = case()
    p.requires_grad_()
    (inter_loss(embeddings, labels, assigned, p) + intra_loss(embeddings, labels, assigned, p)).backward()
    assert p.grad is None
    assert (embeddings.grad.abs().sum(1) > 0).all()


def test_a_class_that_was_never_seen_is_no_negative():
    embeddings, labels, assigned, p = case()
    labels = labels.clamp_max(C - 2)
    active = torch.tensor([True] * (C - 1) + [False])
    without = inter_loss(embeddings, labels, assigned, p[:-1])
    assert inter_loss(embeddings, labels, assigned, p, active=active).item() == pytest.approx(without.item(), rel=1e-5)
    alone = torch.zeros(C, dtype=torch.bool)
    assert inter_loss(embeddings, torch.zeros_like(labels), assigned, p, active=alone).item() == 0


def test_without_cells_the_losses_are_zero_with_a_gradient():
    embeddings, labels, assigned, p = case(0)
    loss = inter_loss(embeddings, labels, assigned, p) + intra_loss(embeddings, labels, assigned, p)
    assert loss.item() == 0
    loss.backward()
    assert embeddings.grad is not None


def test_half_precision_inputs_are_raised():
    embeddings, labels, assigned, p = case()
    half = inter_loss(embeddings.detach().half(), labels, assigned, p, 0.05)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(inter_loss(embeddings, labels, assigned, p, 0.05).item(), rel=2e-2)


def test_shapes_and_temperature_are_checked():
    embeddings, labels, assigned, p = case()
    with pytest.raises(ValueError, match="tau"):
        inter_loss(embeddings, labels, assigned, p, 0)
    with pytest.raises(ValueError, match="prototypes"):
        intra_loss(embeddings, labels, assigned, p[..., :-1])
    with pytest.raises(ValueError, match="assigned"):
        intra_loss(embeddings, labels, assigned[1:], p)


def test_weighted_distance_pair_by_pair_and_what_it_moves():
    generator = torch.Generator().manual_seed(0)
    e, m = (torch.randn(n, D, generator=generator).requires_grad_() for n in (5, 3))
    w, v = (torch.rand(n, generator=generator).requires_grad_() for n in (5, 3))
    total = 0.0
    for i in range(5):
        for j in range(3):
            share = w[i] / w.sum() * v[j] / v.sum()  # a mean of 1 over n, then the mean over n
            total += float(share * (1 - torch.dot(e[i], m[j]) / e[i].norm() / m[j].norm()))
    loss = weighted_cosine_distance(e, m, w, v)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    loss.backward()
    assert m.grad is None
    assert all(x.grad.abs().sum() > 0 for x in (e, w, v))
    equal = weighted_cosine_distance(e, m, torch.full((5,), 0.3))
    assert equal.item() == pytest.approx((1 - F.normalize(e, dim=1) @ F.normalize(m, dim=1).T).mean().item(), rel=1e-5)


def test_weights_learn_to_prefer_what_is_near():
    m = torch.eye(D)[:1]
    e = torch.stack([m[0], -m[0]])
    w = torch.ones(2, requires_grad=True)
    (gradient,) = torch.autograd.grad(weighted_cosine_distance(e, m, w), w)
    assert gradient[0] < 0 < gradient[1]
