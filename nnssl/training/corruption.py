"""Damaged label maps, for a network that learns to mend labels from a network that has few errors left to show it."""

from __future__ import annotations

import torch
from torch import Tensor

#: Boxes pasted into an item at most; each is drawn with probability one half, one of them for certain.
BOXES = 3
#: Side of a box as a fraction of the crop's.
SIDES = (0.125, 0.5)


@torch.no_grad()
def paste_boxes(labels: Tensor, donors: Tensor, probability: float) -> Tensor:
    """Return label maps into which boxes of other items' maps are pasted (CutMix of labels alone).

    A box of background takes a structure away, a box of foreground puts one where the image has none. Draws come from
    torch's generator; nothing waits for the device.

    Args:
        labels: hard label maps (b, 1, ...), left as they are.
        donors: hard label maps (m, 1, ...) of the same spatial size; item i takes from item i + k, k drawn in 1..m - 1.
        probability: that an item is damaged.
    """
    if probability == 0 or len(donors) < 2:
        return labels
    b, size, device = len(labels), labels.shape[2:], labels.device
    low, high = SIDES
    sides = low + (high - low) * torch.rand(b, BOXES, len(size), device=device)
    starts = torch.rand(b, BOXES, len(size), device=device) * (1 - sides)
    inside = torch.rand(b, BOXES, device=device) < 0.5
    inside[:, 0] = True
    for axis, n in enumerate(size):
        middle = (torch.arange(n, device=device) + 0.5) / n
        start, side = starts[..., axis, None], sides[..., axis, None]
        along = (middle >= start) & (middle < start + side)  # (b, boxes, n)
        inside = inside.unsqueeze(-1) & along.view(b, BOXES, *[1] * axis, n)
    damaged = torch.rand(b, device=device) < probability
    pasted = inside.any(1, keepdim=True) & damaged.view(b, *[1] * (labels.ndim - 1))
    shift = torch.randint(1, len(donors), (), device=device)
    taken = donors[(torch.arange(b, device=device) + shift) % len(donors)]
    return taken.where(pasted, labels)
