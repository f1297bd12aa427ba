import math

import pytest
import torch

from nnssl.losses.contrastive import correlation_consistency, label_propagation_loss


def toy(q=14, d=5, counts=(6, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(q, d, generator=generator, dtype=torch.float64)
    bank = {c: torch.randn(p, d, generator=generator, dtype=torch.float64) for c, p in enumerate(counts)}
    return b, bank


def cosine(b, a):
    return (b * a).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def by_loops(b, bank, k, tau, k_per_class=None):
    """Equations 11 to 15 as they are printed, with b_j in P and the mean over all terms."""
    terms = []
    for c, features in bank.items():
        k_class = min(k, (k_per_class or {}).get(c, k))
        if not k_class:
            continue
        similarity = [float(sum(cosine(x, a) for a in features)) for x in b.detach()]
        dissimilarity = [float(sum(1 - cosine(x, a) for a in features)) for x in b.detach()]
        ranked = sorted(range(len(b)), key=similarity.__getitem__, reverse=True)
        positives = ranked[:k_class]
        negatives = sorted(range(len(b)), key=dissimilarity.__getitem__, reverse=True)[:k_class]
        for a in features:
            against = sum(torch.exp(cosine(b[n], a) / tau) for n in negatives)
            for j in positives:
                own = torch.exp(cosine(b[j], a) / tau)
                terms.append(-torch.log(own / (own + against)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("k_per_class", [None, {1: 2}, {0: 0}])
@pytest.mark.parametrize(("k", "tau"), [(1, 0.1), (3, 0.1), (7, 0.5)])
def test_value_and_gradient_equal_the_literal_loops(k, tau, k_per_class):
    b, bank = toy()
    fast, slow = b.clone().requires_grad_(), b.clone().requires_grad_()
    ours = label_propagation_loss(fast, bank, k, tau, k_per_class)
    theirs = by_loops(slow, bank, k, tau, k_per_class)
    ours.backward()
    theirs.backward()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-12)
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-10, atol=1e-14)


def test_gradcheck():
    b, bank = toy(q=8, d=3, counts=(3, 2))
    assert torch.autograd.gradcheck(lambda x: label_propagation_loss(x, bank, 2, 0.5), b.requires_grad_())


def test_the_loss_ignores_the_order_and_the_scale_of_features():
    b, bank = toy()
    reference = float(label_propagation_loss(b, bank, 3, 0.1))
    shuffled = {1: bank[1].flip(0) * 7, 0: bank[0].flip(0) * 0.1}
    assert float(label_propagation_loss(b.flip(0) * 3, shuffled, 3, 0.1)) == pytest.approx(reference, rel=1e-10)
    assert float(label_propagation_loss(b, [bank[0], bank[1]], 3, 0.1)) == pytest.approx(reference, rel=1e-12)


def test_equal_features_give_the_logarithm_of_one_plus_k():
    b = torch.ones(10, 4, dtype=torch.float64)
    loss = label_propagation_loss(b, {0: torch.ones(3, 4, dtype=torch.float64)}, 4, 0.1)
    assert float(loss) == pytest.approx(math.log(1 + 4), rel=1e-12)


def test_opposite_clusters_cost_almost_nothing():
    b = torch.tensor([[1.0, 0.0]] * 5 + [[-1.0, 0.0]] * 5)
    bank = {0: torch.tensor([[1.0, 0.0]]), 1: torch.tensor([[-1.0, 0.0]])}
    expected = math.log1p(5 * math.exp(-2 / 0.1))
    assert float(label_propagation_loss(b, bank, 5, 0.1)) == pytest.approx(expected, rel=1e-3)


def test_a_step_down_the_gradient_lowers_the_loss():
    b, bank = toy()
    b.requires_grad_()
    loss = label_propagation_loss(b, bank, 3, 0.5)
    (gradient,) = torch.autograd.grad(loss, b)
    assert label_propagation_loss(b - 0.01 * gradient, bank, 3, 0.5) < loss


def test_no_gradient_reaches_the_bank():
    b, bank = toy()
    bank = {c: a.requires_grad_() for c, a in bank.items()}
    label_propagation_loss(b.requires_grad_(), bank, 3, 0.1).backward()
    assert all(a.grad is None for a in bank.values())
    assert b.grad.abs().max() > 0


@pytest.mark.parametrize("bank", [{}, {0: torch.zeros(0, 5)}])
def test_without_a_usable_class_the_loss_is_zero_and_differentiable(bank):
    b = torch.randn(6, 5, requires_grad=True)
    loss = label_propagation_loss(b, bank, 2, 0.1)
    loss.backward()
    assert float(loss) == 0
    assert b.grad.abs().max() == 0


def test_zero_vectors_and_half_precision_stay_finite():
    b = torch.zeros(6, 5, dtype=torch.float16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = label_propagation_loss(b, {0: torch.zeros(3, 5, dtype=torch.bfloat16)}, 3, 0.07)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(b.grad).all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"k": 8}, "2 k"),
        ({"k": 0}, "at least 1"),
        ({"tau": 0.0}, "tau"),
        ({"bank": {0: torch.rand(3, 4)}}, "shape"),
        ({"b": torch.rand(14)}, "shape"),
        ({"k_per_class": {0: -1}}, "at least 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, match):
    b, bank = toy()
    with pytest.raises(ValueError, match=match):
        label_propagation_loss(**{"b": b, "bank": bank, "k": 3, "tau": 0.1, **arguments})


def test_correlations_voxel_by_voxel():
    generator = torch.Generator().manual_seed(0)
    v, a = (torch.randn(4, 5, generator=generator) for _ in range(2))
    bank = {2: torch.randn(3, 5, generator=generator), 0: torch.randn(2, 5, generator=generator)}
    total = 0.0
    for i in range(4):
        scores = [[math.exp(float(torch.dot(x[i], m)) / 2) for m in torch.cat([bank[0], bank[2]])] for x in (v, a)]
        c_v, c_a = ([s / sum(row) for s in row] for row in scores)
        total -= sum(p * math.log(q) for p, q in zip(c_a, c_v, strict=True))
    assert correlation_consistency(v, a, bank, 2.0).item() == pytest.approx(total / 4, rel=1e-5)


def test_correlations_have_their_least_value_at_agreement_and_are_finite_without_a_bank():
    v = torch.randn(6, 5, requires_grad=True)
    bank = {0: torch.randn(3, 5)}
    loss = correlation_consistency(v, v.detach(), bank, 1.0)
    (gradient,) = torch.autograd.grad(loss, v)
    assert gradient.abs().max() < 1e-6
    assert correlation_consistency(v, torch.randn(6, 5), bank, 1.0).item() >= 0
    for features, stored in ((v, {}), (v[:0], bank)):
        empty = correlation_consistency(features, features, stored, 1.0)
        assert empty.item() == 0
        assert not torch.autograd.grad(empty, v)[0].any()
    with pytest.raises(ValueError, match="tau"):
        correlation_consistency(v, v, bank, 0.0)
    with pytest.raises(ValueError, match="one shape"):
        correlation_consistency(v, v[:2], bank, 1.0)


@pytest.mark.parametrize("detach", [True, False])
def test_correlations_in_chunks_are_those_at_once_and_keep_less(monkeypatch, detach):
    generator = torch.Generator().manual_seed(0)
    v, a = (torch.randn(23, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    bank = {c: torch.randn(7, 5, generator=generator, dtype=torch.float64) for c in range(3)}
    values, gradients, largest = [], [], []
    for limit in (2**24, 4 * 21):  # all 23 * 21 at once, or four rows
        monkeypatch.setattr("nnssl.losses.contrastive.MOST_CORRELATIONS", limit)
        sizes, inputs = [], [x.clone().requires_grad_() for x in (v, a)]
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            loss = correlation_consistency(*inputs, bank, 0.3, detach)
        loss.backward()
        values.append(loss.item())
        gradients.append([x.grad for x in inputs])
        largest.append(max(sizes))
    assert values[1] == pytest.approx(values[0], rel=1e-12)
    for whole, chunked in zip(*gradients, strict=True):
        assert (whole is None) == (chunked is None)
        if whole is not None:
            torch.testing.assert_close(whole, chunked, rtol=1e-10, atol=1e-14)
    assert largest[0] == 23 * 21
    assert largest[1] <= 23 * 5  # the features themselves
