"""Weighted cross-entropy against the unweighted one and against sums by hand."""

from __future__ import annotations

import pytest
import torch

from nnssl.losses.segmentation import cross_entropy


def case():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, 6, generator=generator, requires_grad=True)
    target = torch.randint(0, 4, (3, 1, 5, 6), generator=generator)
    return logits, target, torch.rand(3, 1, 5, 6, generator=generator) > 0.3


def test_unit_weights_give_the_cross_entropy():
    logits, target, valid = case()
    for mask in (None, valid):
        weighted = cross_entropy(logits, target, mask, torch.ones(3))
        assert weighted.item() == pytest.approx(cross_entropy(logits, target, mask).item(), rel=1e-6)


def test_weights_of_items_and_of_voxels_scale_the_loss_without_being_divided_out():
    logits, target, valid = case()
    item = torch.tensor([0.5, 0.0, 2.0])
    counts = valid.flatten(1).sum(1)
    by_item = [cross_entropy(logits[i : i + 1], target[i : i + 1], valid[i : i + 1]).item() for i in range(3)]
    expected = sum(float(w * n) * v for w, n, v in zip(item, counts, by_item, strict=True)) / int(counts.sum())
    assert cross_entropy(logits, target, valid, item).item() == pytest.approx(expected, rel=1e-5)
    voxels = item.view(3, 1, 1, 1).expand(3, 1, 5, 6)
    assert cross_entropy(logits, target, valid, voxels).item() == pytest.approx(expected, rel=1e-5)


def test_invalid_voxels_get_no_gradient_whatever_their_label():
    logits, target, valid = case()
    target = target.where(valid, torch.tensor(77))
    cross_entropy(logits, target, valid, torch.ones(3)).backward()
    assert (logits.grad.abs().sum(1, keepdim=True) > 0).equal(valid)
    none = cross_entropy(logits, target, torch.zeros_like(valid), torch.ones(3))
    assert none.item() == 0


def test_other_shapes_of_weights_are_refused():
    logits, target, _ = case()
    with pytest.raises(ValueError, match="weight"):
        cross_entropy(logits, target, weight=torch.ones(3, 5, 6))
