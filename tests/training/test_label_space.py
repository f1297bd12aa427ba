import math

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnssl.training.label_space import LabelSpace

CLASSES = {"background": 0, "a": 1, "b": 2}
REGIONS = {"background": 0, "whole": (1, 2), "core": 2}


def test_label_managers_are_read():
    assert LabelSpace.from_label_manager(LabelManager(CLASSES, None)) == LabelSpace(3, False, None)
    assert LabelSpace.from_label_manager(LabelManager({**CLASSES, "ignore": 3}, None)) == LabelSpace(3, False, 3)
    assert LabelSpace.from_label_manager(LabelManager(REGIONS, [1, 2])) == LabelSpace(2, True, None)
    assert LabelSpace.from_label_manager(LabelManager({**REGIONS, "ignore": 3}, [1, 2])) == LabelSpace(2, True, 3)


@pytest.mark.parametrize("space", [(4, 5), (3, 4, 5)])
def test_softmax_layouts(space):
    labels, logits = LabelSpace(3), torch.randn(2, 3, *space)
    probs = labels.probs(logits)
    torch.testing.assert_close(probs, logits.exp() / logits.exp().sum(1, keepdim=True))
    hard = labels.harden(probs)
    assert hard.shape == (2, 1, *space)
    assert hard.dtype == torch.int64
    assert torch.equal(hard[:, 0], logits.argmax(1))
    assert torch.equal(labels.confidence(probs), probs.gather(1, hard))
    assert torch.equal(labels.one_hot(hard).argmax(1, keepdim=True), hard)
    assert torch.equal(labels.one_hot(hard).sum(1), torch.ones(2, *space))
    assert labels.valid(hard).all()


@pytest.mark.parametrize("space", [(4, 5), (3, 4, 5)])
def test_region_layouts(space):
    labels, logits = LabelSpace(2, True), torch.randn(2, 2, *space)
    probs = labels.probs(logits)
    torch.testing.assert_close(probs, 1 / (1 + (-logits).exp()))
    hard = labels.harden(probs)
    assert hard.shape == (2, 2, *space)
    assert hard.dtype == torch.bool
    assert torch.equal(hard, logits > 0)
    assert torch.equal(labels.one_hot(hard), hard.float())
    assert labels.valid(hard).shape == labels.confidence(probs).shape == (2, 1, *space)
    certain = probs.clone()
    certain[:, 0] = 0.999
    expected = torch.maximum(certain[:, 1:], 1 - certain[:, 1:]).clamp_max(0.999)
    torch.testing.assert_close(labels.confidence(certain), expected)


def test_ignored_voxels_are_zero_in_every_channel_and_not_valid():
    labels = LabelSpace(3, ignore_label=3)
    target = torch.tensor([0, 1, 2, 3], dtype=torch.int16).view(1, 1, 2, 2)
    assert labels.valid(target).flatten().tolist() == [True, True, True, False]
    assert labels.one_hot(target).flatten(2)[0].T.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert labels.foreground(target).flatten().tolist() == [False, True, True, False]


def test_regions_carry_the_ignore_mask_in_the_last_channel():
    labels = LabelSpace(2, True, 3)
    segmentation = torch.tensor([0, 1, 2, 3]).view(1, 1, 2, 2)
    # nnU-Net's ConvertSegmentationToRegionsTransform with regions [(1, 2), 2, ignore label]
    target = torch.cat([(segmentation == 1) | (segmentation == 2), segmentation == 2, segmentation == 3], 1)
    assert labels.valid(target).flatten().tolist() == [True, True, True, False]
    assert labels.one_hot(target).flatten(2)[0].T.tolist() == [[0, 0], [1, 0], [1, 1], [0, 0]]
    assert labels.foreground(target).flatten().tolist() == [False, True, True, False]
    assert torch.equal(labels.valid(target.to(torch.int16)), labels.valid(target))
    target[:, :2] = True  # the ignore mask wins over a region
    assert labels.one_hot(target).flatten(2)[0].T.tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]


def test_region_mask_is_the_one_nnunet_trains_with():
    labels = LabelSpace(2, True, 3)
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, 3, 4, 4, generator=generator) > 0.5
    target[:, :2] &= ~target[:, 2:]
    logits = torch.randn(2, 2, 4, 4, generator=generator)
    theirs = DC_and_BCE_loss(
        {}, {"batch_dice": True, "do_bg": True, "ddp": False}, weight_dice=0, use_ignore_label=True
    )
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.one_hot(target), reduction="none")
    mask = labels.valid(target)
    expected = (bce * mask).sum() / mask.sum()
    torch.testing.assert_close(theirs(logits, target), expected)


def test_a_hardened_prediction_is_a_target_without_ignored_voxels():
    for labels in (LabelSpace(3, ignore_label=3), LabelSpace(2, True, 3)):
        hard = labels.harden(labels.probs(torch.randn(1, labels.num_heads, 4, 4)))
        assert labels.valid(hard).all()
        assert labels.one_hot(hard).shape == (1, labels.num_heads, 4, 4)


@pytest.mark.parametrize("labels", [LabelSpace(4), LabelSpace(3, True)])
def test_entropy_is_zero_when_certain_and_largest_when_undecided(labels):
    undecided = labels.probs(torch.zeros(1, labels.num_heads, 2, 2))
    certain = labels.probs(torch.tensor([200.0, *[-200.0] * (labels.num_heads - 1)]).view(1, -1, 1, 1))
    torch.testing.assert_close(labels.entropy(undecided), torch.full((1, 1, 2, 2), labels.max_entropy))
    assert labels.max_entropy == pytest.approx(math.log(4) if not labels.regions else math.log(2))
    assert float(labels.entropy(certain)) == 0


def test_entropy_equals_torchs_distributions():
    logits = torch.randn(2, 3, 4)
    classes, regions = LabelSpace(3), LabelSpace(3, True)
    expected = torch.distributions.Categorical(logits=logits.movedim(1, -1)).entropy()
    torch.testing.assert_close(classes.entropy(classes.probs(logits))[:, 0], expected)
    expected = torch.distributions.Bernoulli(logits=logits).entropy().amax(1)
    torch.testing.assert_close(regions.entropy(regions.probs(logits))[:, 0], expected)


@pytest.mark.parametrize("labels", [LabelSpace(3), LabelSpace(3, True)])
def test_half_precision_logits_give_finite_single_precision(labels):
    logits = (torch.randn(1, 3, 4, 4) * 1e4).half().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probs = labels.probs(logits)
        entropy = labels.entropy(probs)
    entropy.sum().backward()
    assert probs.dtype == entropy.dtype == torch.float32
    assert torch.isfinite(entropy).all()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: LabelSpace(1),
        lambda: LabelSpace(3, ignore_label=2),
        lambda: LabelSpace(3).probs(torch.zeros(1, 2, 4)),
        lambda: LabelSpace(3).one_hot(torch.zeros(1, 3, 4)),
        lambda: LabelSpace(2, True).valid(torch.zeros(1, 3, 4)),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(ValueError, match=r"heads|channels|ignore label"):
        call()
