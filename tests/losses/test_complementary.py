"""The complementary loss and its weight against loops over voxels."""

import math

import pytest
import torch

from nnssl.losses.complementary import complementary_loss, spatial_certainty, weighted_complementary_loss

SHAPES = [(7, 6), (4, 5, 3)]


def toy(space, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, 2, classes, *space, generator=generator, dtype=torch.float64)
    valid = torch.rand(2, 1, *space, generator=generator) > 0.4
    valid[1, :, :2] = False  # items differ in their number of voxels
    p, q = logits.softmax(2)
    return p, q, valid


def voxels(probs, valid):
    """Yield the probability vectors of an item's valid voxels."""
    rows = probs.flatten(1).T.tolist()
    return [row for row, counts in zip(rows, valid.flatten().tolist(), strict=True) if counts]


def certainty_by_loops(probs, valid):
    entropies = []
    for item, mask in zip(probs, valid, strict=True):
        for values in zip(*voxels(item, mask), strict=True):
            shares = [v / sum(values) for v in values]
            entropies.append(-sum(s * math.log(s) for s in shares) / math.log(len(values)))
    return 1 - sum(entropies) / len(entropies)


def loss_by_loops(p, q, valid):
    terms = []
    for learner, better, mask in zip(p, q, valid, strict=True):
        for mine, theirs in zip(voxels(learner, mask), voxels(better, mask), strict=True):
            scores = [math.exp(1 - v) for v in mine]
            terms.append(-math.log(scores[theirs.index(min(theirs))] / sum(scores)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("space", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_certainty_equal_the_loops(space, masked):
    p, q, valid = toy(space)
    every = valid if masked else torch.ones_like(valid)
    mask = valid if masked else None
    certainty, loss = certainty_by_loops(p, every), loss_by_loops(p, q, every)
    assert float(spatial_certainty(p, mask)) == pytest.approx(certainty, rel=1e-9)
    assert float(complementary_loss(p, q, mask)) == pytest.approx(loss, rel=1e-9)
    assert float(weighted_complementary_loss(p, q, mask)) == pytest.approx(certainty**2 * loss, rel=1e-9)


def test_certainty_is_0_for_uniform_maps_and_1_for_single_voxels():
    uniform = torch.full((2, 3, 8, 8), 1 / 3)
    assert float(spatial_certainty(uniform)) == pytest.approx(0, abs=1e-6)
    assert float(weighted_complementary_loss(uniform, uniform)) == pytest.approx(0, abs=1e-6)
    point = torch.zeros(1, 2, 8, 8)
    point[0, 0, 3, 4] = point[0, 1, 1, 6] = 1
    assert float(spatial_certainty(point)) == pytest.approx(1)


def test_masked_voxels_have_no_influence_and_no_gradient():
    p, q, valid = toy((7, 6))
    poisoned = torch.where(valid, p, torch.rand_like(p)).requires_grad_()
    loss = weighted_complementary_loss(poisoned, torch.where(valid, q, q.flip(1)), valid)
    assert float(loss.detach()) == pytest.approx(float(weighted_complementary_loss(p, q, valid)), rel=1e-12)
    loss.backward()
    outside = ~valid.expand_as(p)
    assert poisoned.grad[outside].abs().max() == 0
    assert poisoned.grad[~outside].abs().max() > 0


def test_without_a_valid_voxel_the_loss_is_zero_and_differentiable():
    p, q, valid = toy((7, 6))
    p.requires_grad_()
    loss = weighted_complementary_loss(p, q, torch.zeros_like(valid))
    loss.backward()
    assert float(loss.detach()) == 0
    assert p.grad.abs().max() == 0


def test_loss_and_weight_learn_and_the_reference_does_not():
    p, q, _ = toy((7, 6))
    p.requires_grad_(), q.requires_grad_()
    weight, loss = spatial_certainty(p), complementary_loss(p, q)
    (of_weight,), (of_loss,) = (torch.autograd.grad(value, p, retain_graph=True) for value in (weight, loss))
    assert of_weight.abs().max() > 0
    assert of_loss.abs().max() > 0
    weighted_complementary_loss(p, q).backward()
    expected = (weight**2 * of_loss + 2 * weight * loss * of_weight).detach()  # the rule for products
    torch.testing.assert_close(p.grad, expected)
    assert q.grad is None


def test_half_precision_gives_finite_single_precision():
    """At 320 squared a map of ones sums to more than half precision holds."""
    probs = torch.zeros(1, 2, 320, 320, dtype=torch.float16)
    probs[:, 0] = 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        certainty, loss = spatial_certainty(probs), complementary_loss(probs, probs)
    assert certainty.dtype == loss.dtype == torch.float32
    # the background's map is uniform, the absent class has no entropy
    assert float(certainty) == pytest.approx(0.5, abs=1e-5)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-5)


def test_ill_shaped_masks_are_refused():
    p, q, valid = toy((7, 6))
    with pytest.raises(ValueError, match="valid"):
        weighted_complementary_loss(p, q, valid[:, 0])
