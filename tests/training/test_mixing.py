"""Mixing keeps what belongs together together."""

import math

import pytest
import torch

from nnssl.training.label_space import LabelSpace
from nnssl.training.mixing import box_at, draw_mixup, ignore_outside, mixup, partners_of, paste, random_box


def test_every_item_meets_another_one_exactly_once():
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):
        partner = partners_of(4).tolist()
        assert sorted(partner) == [0, 1, 2, 3]
        assert all(p != i for i, p in enumerate(partner))
        seen.add(tuple(partner))
    assert len(seen) == 3  # every shift is drawn
    assert partners_of(1).tolist() == [0]


def test_mixup_is_the_convex_combination_and_keeps_probabilities():
    a, b = torch.rand(2, 3, 4, 5).softmax(1), torch.rand(2, 3, 4, 5).softmax(1)
    assert torch.equal(mixup(a, b, 1.0), a)
    assert torch.allclose(mixup(a, b, 0.25), b + 0.25 * (a - b))
    assert torch.allclose(mixup(a, b, 0.3).sum(1), torch.ones(2, 4, 5))
    with pytest.raises(ValueError, match="share"):
        mixup(a, b, 1.1)
    with pytest.raises(ValueError, match="shape"):
        mixup(a, b[:1], 0.5)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_shares_have_the_moments_of_the_beta_distribution(alpha):
    torch.manual_seed(1)
    drawn = torch.tensor([draw_mixup(alpha) for _ in range(4000)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert drawn.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(variance / 4000))
    assert drawn.var().item() == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("size", [(9, 12), (6, 9, 10)])
def test_boxes_have_their_size_and_reach_every_voxel(size):
    torch.manual_seed(2)
    hits = torch.zeros(size)
    for _ in range(200):
        box = random_box(size, 2 / 3)[0, 0]
        hits += box
        for axis, n in enumerate(size):
            along = box.any(dim=tuple(a for a in range(len(size)) if a != axis))
            assert along.sum() == round(2 * n / 3)
            assert (along.int().diff().abs().sum() + along[0] + along[-1]) <= 2  # one piece
        assert box.sum() == math.prod(round(2 * n / 3) for n in size)
    assert (hits > 0).all()
    assert random_box((4, 4), 1.0).all()


def test_image_target_and_mask_are_pasted_alike():
    torch.manual_seed(3)
    box = random_box((8, 8), 0.5)
    label_in, label_out = torch.randint(0, 3, (2, 1, 8, 8)), torch.randint(0, 3, (2, 1, 8, 8))
    image = paste(label_in.float() * 10, label_out.float() * 10, box)
    target, valid = paste(label_in, label_out, box), paste(label_in == 1, label_out == 1, box)
    assert torch.equal(image, target.float() * 10)
    assert torch.equal(valid, target == 1)
    back = paste(label_out, label_in, ~box)
    assert torch.equal(back, target)  # the complement of the box is the other direction
    with pytest.raises(ValueError, match="shape"):
        paste(label_in, label_out[:1], box)


def test_lower_resolutions_follow_the_box():
    box = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    box[..., 4:, :4] = True
    low = paste(torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), box)
    expected = torch.zeros(1, 1, 4, 4)
    expected[..., 2:, :2] = 1
    assert torch.equal(low, expected)
    assert box_at(box, (8, 8)) is box


def test_everything_outside_a_region_is_ignored():
    region = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    region[..., :2] = True
    target = torch.tensor([0, 1, 2, 3]).repeat(2, 1, 4, 1).to(torch.int16)  # 3 is ignored already
    space = LabelSpace(3, ignore_label=3)
    got = ignore_outside(space, target, region)
    assert got.dtype == target.dtype
    assert torch.equal(space.valid(got), region.expand_as(got))
    assert torch.equal(got[..., :2], target[..., :2])
    with pytest.raises(ValueError, match="ignore label"):
        ignore_outside(LabelSpace(3), target, region)


@pytest.mark.parametrize("with_ignored", [False, True])
def test_regions_outside_a_region_are_ignored(with_ignored):
    region = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    region[..., :2] = True
    space = LabelSpace(2, regions=True, ignore_label=3)
    masks = torch.rand(2, 2, 4, 4) > 0.5
    ignored = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    ignored[..., 0] = True
    got = ignore_outside(space, torch.cat([masks, ignored], 1) if with_ignored else masks, region)
    assert torch.equal(got[:, :2], masks)
    assert torch.equal(space.valid(got), region & ~ignored if with_ignored else region.expand_as(ignored))
