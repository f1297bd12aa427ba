"""Laws of damaged label maps."""

from __future__ import annotations

import pytest
import torch

from nnssl.training.corruption import BOXES, SIDES, paste_boxes


def maps(size, items=4):
    """Return items whose every voxel holds the item's number."""
    return torch.arange(items).view(-1, 1, *[1] * len(size)).expand(items, 1, *size).clone()


@pytest.mark.parametrize("size", [(40, 24), (16, 24, 8)])
def test_every_damaged_item_takes_boxes_from_one_other_item(size):
    labels = maps(size)
    for seed in range(20):
        torch.manual_seed(seed)
        out = paste_boxes(labels, labels, 1.0)
        shifts = set()
        for item, row in enumerate(out):
            taken = set(row.unique().tolist()) - {item}
            assert len(taken) == 1  # at least one box, of a single other item
            shifts.add((taken.pop() - item) % len(labels))
            share = (row != item).float().mean().item()
            assert 0 < share <= BOXES * SIDES[1] ** len(size)
        assert len(shifts) == 1
        assert 0 not in shifts


def test_boxes_are_boxes():
    torch.manual_seed(3)
    labels = maps((32, 32), 2)
    single = 0
    for _ in range(50):
        for item, row in enumerate(paste_boxes(labels, labels, 1.0)):
            pasted = row[0] != item
            rows, columns = pasted.any(1), pasted.any(0)
            single += bool((pasted == rows[:, None] & columns[None]).all() and rows.sum() <= 17 and columns.sum() <= 17)
    assert single >= 10  # one box alone has probability 1/4, and is a product of intervals


def test_the_share_of_damaged_items_is_the_probability():
    torch.manual_seed(0)
    labels = maps((8, 8), 2)
    damaged = sum(int((row != i).any()) for _ in range(500) for i, row in enumerate(paste_boxes(labels, labels, 0.3)))
    assert damaged / 1000 == pytest.approx(0.3, abs=0.05)


def test_nothing_changes_without_probability_or_donors_nor_in_place():
    labels = maps((8, 8))
    assert paste_boxes(labels, labels, 0.0) is labels
    assert paste_boxes(labels[:1], labels[:1], 1.0) is not None
    assert torch.equal(paste_boxes(labels[:1], labels[:1], 1.0), labels[:1])
    before = labels.clone()
    paste_boxes(labels, labels, 1.0)
    assert torch.equal(labels, before)
