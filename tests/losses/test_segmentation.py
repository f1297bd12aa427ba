import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from nnssl.losses.segmentation import cross_entropy, dice_and_cross_entropy, soft_cross_entropy, soft_dice_loss

SHAPES = [(7, 6), (4, 5, 3)]


def toy(space, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, *space, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, (2, 1, *space), generator=generator)
    valid = torch.rand(2, 1, *space, generator=generator) > 0.4
    return logits, target, valid


def dice_by_loops(probs, labels, valid, smooth, classes):
    """Equation 8 voxel by voxel, over the whole batch."""
    losses = []
    for c in classes:
        overlap = total = 0.0
        for p, y, v in zip(probs[:, c].flatten(), labels.flatten(), valid.flatten(), strict=True):
            if v:
                overlap += float(p) * (int(y) == c)
                total += float(p) + (int(y) == c)
        losses.append(1 - (2 * overlap + smooth) / (total + smooth))
    return sum(losses) / len(losses)


def onehot_of(target, classes):
    return torch.nn.functional.one_hot(target[:, 0], classes).movedim(-1, 1)


@pytest.mark.parametrize("space", SHAPES)
@pytest.mark.parametrize("include_background", [False, True])
def test_dice_equals_the_literal_sums(space, include_background):
    logits, target, valid = toy(space)
    probs = logits.softmax(1)
    expected = dice_by_loops(probs, target, valid, 1.0, range(0 if include_background else 1, 3))
    got = soft_dice_loss(probs, onehot_of(target, 3), valid, include_background=include_background)
    assert float(got) == pytest.approx(expected, rel=1e-12)


def test_sample_dice_is_the_mean_of_single_sample_losses():
    logits, target, valid = toy((7, 6))
    probs, onehot = logits.softmax(1), onehot_of(target, 3)
    single = [soft_dice_loss(probs[i : i + 1], onehot[i : i + 1], valid[i : i + 1]) for i in range(2)]
    got = soft_dice_loss(probs, onehot, valid, batch_dice=False)
    assert float(got) == pytest.approx(float(sum(single) / 2), rel=1e-12)
    assert float(soft_dice_loss(probs, onehot, valid)) != pytest.approx(float(got), rel=1e-6)


@pytest.mark.parametrize("space", SHAPES)
@pytest.mark.parametrize("include_background", [False, True])
def test_squared_dice_has_squares_in_its_denominator(space, include_background):
    logits, target, valid = toy(space)
    probs, onehot = logits.softmax(1), onehot_of(target, 3)
    p, y, v = (x.movedim(1, 0).flatten(1).numpy() for x in (probs, onehot.double(), valid))
    p, y = p[:, v[0]], y[:, v[0]]
    dice = (2 * np.einsum("cn,cn->c", p, y) + 1e-5) / (np.linalg.norm(p, axis=1) ** 2 + y.sum(1) + 1e-5)
    expected = 1 - dice[0 if include_background else 1 :].mean()
    settings = {"smooth": 1e-5, "include_background": include_background}
    assert float(soft_dice_loss(probs, onehot, valid, squared=True, **settings)) == pytest.approx(expected, rel=1e-9)
    assert float(soft_dice_loss(probs, onehot, valid, **settings)) > expected + 1e-3
    hard = onehot_of(target.flip(0), 3).double()  # a hard map is its own square
    squared, linear = (float(soft_dice_loss(hard, onehot, valid, squared=s)) for s in (True, False))
    assert squared == pytest.approx(linear, rel=1e-12)


def test_dice_is_zero_at_agreement_and_symmetric():
    _, target, _ = toy((7, 6))
    onehot = onehot_of(target, 3).double()
    other = onehot_of(target.flip(0), 3).double()
    assert float(soft_dice_loss(onehot, onehot)) == pytest.approx(0, abs=1e-12)
    assert float(soft_dice_loss(onehot, other)) == pytest.approx(float(soft_dice_loss(other, onehot)), rel=1e-12)


def test_dice_of_a_target_without_foreground_has_a_bounded_gradient():
    probs = torch.full((1, 2, 4, 4), 1e-6, requires_grad=True)
    onehot = torch.zeros(1, 2, 4, 4)
    loss = soft_dice_loss(probs, onehot)
    loss.backward()
    assert 0 <= float(loss.detach()) < 1e-4
    assert probs.grad.abs().max() <= 1


@pytest.mark.parametrize("space", SHAPES)
def test_cross_entropy_equals_the_literal_mean(space):
    logits, target, valid = toy(space)
    terms = []
    for i in range(2):
        for voxel in torch.cartesian_prod(*map(torch.arange, space)).tolist():
            at = (i, slice(None), *voxel)
            if valid[(i, 0, *voxel)]:
                scores = logits[at].tolist()
                wanted = scores[int(target[(i, 0, *voxel)])]
                terms.append(math.log(sum(math.exp(s) for s in scores)) - wanted)
    expected = sum(terms) / len(terms)
    assert float(cross_entropy(logits, target, valid)) == pytest.approx(expected, rel=1e-12)
    assert float(cross_entropy(logits, target[:, 0], valid)) == pytest.approx(expected, rel=1e-12)


def losses_with_mask(logits, target, valid):
    onehot = onehot_of(target, 3)
    return {
        "dice": soft_dice_loss(logits.softmax(1), onehot, valid),
        "ce": cross_entropy(logits, target, valid),
        "both": dice_and_cross_entropy(logits, target, 0.3, valid),
    }


@pytest.mark.parametrize("name", ["dice", "ce", "both"])
def test_masked_voxels_have_no_influence_and_no_gradient(name):
    logits, target, valid = toy((7, 6))
    poisoned = torch.where(valid, logits, torch.full_like(logits, 50.0)).requires_grad_()
    before = losses_with_mask(logits, target, valid)[name]
    after = losses_with_mask(poisoned, torch.where(valid, target, 0), valid)[name]
    assert float(after) == pytest.approx(float(before), rel=1e-12)
    after.backward()
    assert poisoned.grad[~valid.expand_as(poisoned)].abs().max() == 0
    assert poisoned.grad[valid.expand_as(poisoned)].abs().max() > 0


@pytest.mark.parametrize("name", ["dice", "ce", "both"])
def test_without_a_valid_voxel_the_loss_is_zero_and_differentiable(name):
    logits, target, valid = toy((7, 6))
    logits.requires_grad_()
    loss = losses_with_mask(logits, target, torch.zeros_like(valid))[name]
    loss.backward()
    assert float(loss) == 0
    assert logits.grad.abs().max() == 0


def test_an_all_true_mask_changes_nothing():
    logits, target, valid = toy((4, 5, 3))
    for name, loss in losses_with_mask(logits, target, torch.ones_like(valid)).items():
        assert float(loss) == pytest.approx(float(losses_with_mask(logits, target, None)[name]), rel=1e-12)


def test_ignore_labels_may_stay_in_the_target_where_it_is_not_valid():
    logits, target, valid = toy((7, 6))
    marked = torch.where(valid, target, 3)
    for loss in (cross_entropy, lambda *a: dice_and_cross_entropy(a[0], a[1], 0.5, a[2])):
        assert float(loss(logits, marked, valid)) == pytest.approx(float(loss(logits, target, valid)), rel=1e-12)


def test_combined_loss_is_the_weighted_sum():
    logits, target, valid = toy((7, 6))
    parts = losses_with_mask(logits, target, valid)
    assert float(parts["both"]) == pytest.approx(float(parts["dice"] + 0.3 * parts["ce"]), rel=1e-12)
    squared = soft_dice_loss(
        logits.softmax(1), onehot_of(target, 3), valid, 1e-5, include_background=True, squared=True
    )
    coded = {"smooth": 1e-5, "include_background": True, "squared": True}
    for weight in (0.0, 0.5, 2.0):
        got = dice_and_cross_entropy(logits, target, 0.3, valid, dice_weight=weight, **coded)
        assert float(got) == pytest.approx(float(weight * squared + 0.3 * parts["ce"]), rel=1e-12)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_gives_finite_single_precision(half):
    logits, target, valid = toy((7, 6))
    big = (logits * 1000).to(half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for loss in losses_with_mask(big, target.to(torch.int16).long(), valid).values():
            assert loss.dtype == torch.float32
            assert torch.isfinite(loss)


def test_nnunet_dice_with_the_same_smoothing_agrees():
    dice = pytest.importorskip("nnunetv2.training.loss.dice")
    logits, target, valid = toy((4, 5, 3))
    theirs = dice.SoftDiceLoss(
        apply_nonlin=lambda x: x.softmax(1), batch_dice=True, do_bg=False, smooth=0.5, ddp=False
    )(logits, target, loss_mask=valid)
    # their smoothing enters the numerator and the denominator once each, like ours
    ours = soft_dice_loss(logits.softmax(1), onehot_of(target, 3), valid, smooth=0.5)
    assert float(ours) == pytest.approx(1 + float(theirs), rel=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: soft_dice_loss(torch.rand(1, 2, 3), torch.rand(1, 3, 3)),
        lambda: soft_dice_loss(torch.rand(1, 1, 3), torch.rand(1, 1, 3)),
        lambda: soft_dice_loss(torch.rand(1, 2, 3), torch.rand(1, 2, 3), smooth=-1),
        lambda: soft_dice_loss(torch.rand(1, 2, 3), torch.rand(1, 2, 3), valid=torch.ones(1, 1, 3)),
        lambda: cross_entropy(torch.rand(1, 2, 3), torch.zeros(1, 4, dtype=torch.long)),
        lambda: cross_entropy(torch.rand(1, 2, 3), torch.zeros(1, 1, 3)),
        lambda: cross_entropy(torch.rand(1, 2, 3), torch.zeros(1, 3).long(), torch.ones(1, 3, dtype=torch.bool)),
    ],
)
def test_ill_shaped_arguments_are_refused(call):
    with pytest.raises(ValueError, match=r"shape|fit|channel|smooth|labels|valid"):
        call()


def test_soft_cross_entropy_of_hard_shares_is_the_cross_entropy_and_of_others_their_mean():
    generator = torch.Generator().manual_seed(0)
    logits, label = torch.randn(2, 3, 5, generator=generator), torch.randint(0, 3, (2, 5), generator=generator)
    valid = torch.rand(2, 1, 5, generator=generator) < 0.7
    onehot = functional.one_hot(label, 3).movedim(-1, 1).float()
    hard = soft_cross_entropy(logits, onehot, valid)
    assert hard.item() == pytest.approx(cross_entropy(logits, label, valid).item(), rel=1e-5)
    even = soft_cross_entropy(logits, torch.full_like(onehot, 1 / 3), valid)
    expected = -logits.log_softmax(1).mean(1, keepdim=True)[valid].mean()
    assert even.item() == pytest.approx(expected.item(), rel=1e-5)
    assert soft_cross_entropy(logits, onehot, valid & False) == 0


def test_soft_cross_entropy_of_regions_is_the_binary_one():
    logits, shares = torch.randn(2, 3, 5), torch.rand(2, 3, 5)
    valid = torch.ones(2, 1, 5, dtype=torch.bool)
    p = logits.double().sigmoid()
    expected = -(shares * p.log() + (1 - shares) * (1 - p).log()).mean()
    assert soft_cross_entropy(logits, shares, valid, binary=True).item() == pytest.approx(expected.item(), rel=1e-5)
