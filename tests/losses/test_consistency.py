import pytest
import torch

from nnssl.losses.consistency import (
    cross_pseudo_supervision,
    dice_distance,
    mutual_consistency,
    probability_mse,
    sharpen,
    softmax_mse,
)


def toy(seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    valid = torch.rand(2, 1, 4, 5, generator=generator) > 0.5
    return a, b, valid


def test_mse_equals_the_literal_mean_over_valid_voxels_and_channels():
    a, b, valid = toy()
    p, q = a.sigmoid(), b.sigmoid()
    terms = [
        (float(p[i, c, y, x]) - float(q[i, c, y, x])) ** 2
        for i in range(2)
        for c in range(3)
        for y in range(4)
        for x in range(5)
        if valid[i, 0, y, x]
    ]
    assert float(probability_mse(p, q, valid)) == pytest.approx(sum(terms) / len(terms), rel=1e-12)
    assert float(probability_mse(p, q)) == pytest.approx(float(torch.nn.functional.mse_loss(p, q)), rel=1e-12)


def test_softmax_mse_is_the_mse_of_the_softmax():
    a, b, valid = toy()
    p, q = (x.exp() / x.exp().sum(1, keepdim=True) for x in (a, b))
    assert float(softmax_mse(a, q, valid)) == pytest.approx(float(probability_mse(p, q, valid)), rel=1e-12)


def test_mse_is_symmetric_and_zero_only_at_agreement():
    a, b, valid = toy()
    p, q = a.softmax(1), b.softmax(1)
    assert float(probability_mse(p, p, valid)) == 0
    assert float(probability_mse(p, q, valid)) > 0
    assert float(probability_mse(p, q, valid)) == pytest.approx(float(probability_mse(q, p, valid)), rel=1e-12)


def test_no_gradient_reaches_the_teacher():
    a, b, valid = toy()
    a.requires_grad_()
    b.requires_grad_()
    softmax_mse(a, b.softmax(1), valid).backward()
    assert b.grad is None
    assert a.grad[~valid.expand_as(a)].abs().max() == 0
    assert a.grad[valid.expand_as(a)].abs().max() > 0


def test_without_a_valid_voxel_losses_are_zero_and_differentiable():
    a, b, valid = toy()
    a.requires_grad_()
    nothing = torch.zeros_like(valid)
    loss = softmax_mse(a, b.softmax(1), nothing) + cross_pseudo_supervision(a, b.argmax(1), nothing)
    loss.backward()
    assert float(loss) == 0
    assert a.grad.abs().max() == 0


def test_cross_pseudo_supervision_rewards_agreement():
    a, _, valid = toy()
    own, other = a.argmax(1, keepdim=True), a.argmin(1, keepdim=True)
    log_probs = a.log_softmax(1).gather(1, own)[valid]
    assert float(cross_pseudo_supervision(a, own, valid)) == pytest.approx(-float(log_probs.mean()), rel=1e-12)
    assert cross_pseudo_supervision(a, own, valid) < cross_pseudo_supervision(a, other, valid)


def test_half_precision_gives_finite_single_precision():
    a, b, valid = toy()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = softmax_mse((a * 1e4).half(), b.softmax(1).bfloat16(), valid)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shape"):
        probability_mse(torch.rand(1, 2, 3), torch.rand(1, 1, 3))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_sharpening_is_the_power_formula(temperature):
    p = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).softmax(1)
    powers = p ** (1 / temperature)
    assert torch.allclose(sharpen(p, temperature), powers / powers.sum(1, keepdim=True))
    others = (1 - p) ** (1 / temperature)
    assert torch.allclose(sharpen(p, temperature, binary=True), powers / (powers + others))
    assert torch.equal(sharpen(p, temperature).argmax(1), p.argmax(1))


def test_sharpening_of_two_classes_is_one_formula():
    p = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(4))
    p = torch.cat([p, 1 - p], 1)
    assert torch.allclose(sharpen(p, 0.1), sharpen(p, 0.1, binary=True), atol=1e-5)
    with pytest.raises(ValueError, match="temperature"):
        sharpen(p, 0)


def test_mutual_consistency_pair_by_pair():
    generator = torch.Generator().manual_seed(5)
    probs = [torch.randn(2, 3, 4, 5, generator=generator).softmax(1) for _ in range(3)]
    valid = torch.rand(2, 1, 4, 5, generator=generator) < 0.6
    keep = valid[:, 0]
    expected = sum(
        (probs[i] - sharpen(probs[j], 0.1)).square().movedim(1, -1)[keep].mean()
        for i in range(3)
        for j in range(3)
        if i != j
    )
    assert torch.allclose(mutual_consistency(probs, 0.1, valid), expected)
    hard = torch.eye(3)[torch.randint(0, 3, (2, 4, 5), generator=generator)].movedim(-1, 1)
    assert mutual_consistency([hard, hard], 0.1, valid).item() == pytest.approx(0, abs=1e-12)


def test_only_undetached_targets_have_a_gradient():
    generator = torch.Generator().manual_seed(6)
    for detach in (True, False):
        a, b = (torch.randn(1, 3, 4, 4, generator=generator).softmax(1).requires_grad_() for _ in range(2))
        mutual_consistency([a, b], 0.5, detach=detach).backward()
        constant = 2 * (a - sharpen(b, 0.5)).detach() / a.numel()
        assert torch.allclose(a.grad, constant, atol=1e-7) == detach


def test_dice_distance_class_by_class():
    a, b, valid = toy()
    p, q = a.softmax(1), b.softmax(1)
    terms = []
    for c in range(3):
        x, y = (t[:, c][valid[:, 0]] for t in (p, q))
        terms.append(1 - (2 * (x * y).sum() + 1e-5) / ((x**2).sum() + (y**2).sum() + 1e-5))
    assert float(dice_distance(p, q, valid)) == pytest.approx(float(sum(terms)) / 3, rel=1e-12)


def test_dice_distance_is_least_at_agreement_and_finite_without_voxels():
    a, b, valid = toy()
    p, q = a.softmax(1).requires_grad_(), b.softmax(1)
    same = dice_distance(p, p.detach(), valid)
    (gradient,) = torch.autograd.grad(same, p)
    assert float(same) == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12
    assert 0 < float(dice_distance(p, q, valid)) < 1
    assert float(dice_distance(p, q, torch.zeros_like(valid))) == 0
    (gradient,) = torch.autograd.grad(dice_distance(p, q, valid), p)
    assert torch.equal(gradient.abs().sum(1, keepdim=True) > 0, valid)


@pytest.mark.parametrize("detach", [True, False])
def test_the_gradient_of_the_squared_difference_reaches_the_teacher_if_asked(detach):
    p, q = torch.rand(1, 2, 5, requires_grad=True), torch.rand(1, 2, 5, requires_grad=True)
    probability_mse(p, q, detach=detach).backward()
    assert p.grad.any()
    assert (q.grad is None) == detach
