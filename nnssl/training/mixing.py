"""Mixing of crops: interpolation and boxes, with image, target and valid mask kept aligned.

Draws come from torch's generators, so that a step's randomness follows from its seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nnssl.training.label_space import LabelSpace


def partners_of(count: int) -> Tensor:
    """Return the item that each of ``count`` items is mixed with: the one k places on, k drawn in 1..count - 1.

    No item is its own partner, each is the partner of one. A single item has itself.
    """
    shift = int(torch.randint(1, count, ())) if count > 1 else 0
    return (torch.arange(count) + shift) % count


def draw_mixup(alpha: float) -> float:
    """Return lambda ~ Beta(alpha, alpha) of mixup (Zhang et al. 2018, arXiv 1710.09412); alpha above 0."""
    concentration = torch.tensor(float(alpha))
    return float(torch.distributions.Beta(concentration, concentration).sample())


def mixup(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Return ``share a + (1 - share) b`` in the type of ``a`` (images or probabilities of one shape).

    Raises:
        ValueError: shapes differ, or the share lies outside [0, 1].
    """
    if a.shape != b.shape:
        raise ValueError(f"mixed tensors have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if not 0 <= share <= 1:
        raise ValueError(f"a share lies in [0, 1], got {share}")
    return share * a + (1 - share) * b


def random_box(size: Sequence[int], share: float, device: torch.device | str = "cpu") -> Tensor:
    """Return bool (1, 1, *size), True in a box of ``round(share n)`` voxels along each axis, at a uniform place.

    The mask of bidirectional copy-paste (Bai et al. 2023, arXiv 2305.00673), one for the whole batch.

    Args:
        size: spatial size of the crop, voxels.
        share: side of the box as a fraction of the crop's, in (0, 1].
        device: where the mask is wanted.
    """
    inside = torch.zeros(1, 1, *size, dtype=torch.bool)
    sides = [max(1, round(share * n)) for n in size]
    starts = [int(torch.randint(0, n - side + 1, ())) for n, side in zip(size, sides, strict=True)]
    inside[(..., *(slice(start, start + side) for start, side in zip(starts, sides, strict=True)))] = True
    return inside.to(device)


def paste(inside: Tensor, outside: Tensor, box: Tensor) -> Tensor:
    """Return ``inside`` where the box is and ``outside`` elsewhere: images, targets or masks (b, c, ...).

    Args:
        inside: what the box shows.
        outside: what surrounds it, of the same shape.
        box: bool (1, 1, ...) at full resolution; tensors of a lower resolution (targets of deep supervision) take the
            voxel of the box that lies nearest.

    Raises:
        ValueError: shapes differ.
    """
    if inside.shape != outside.shape:
        raise ValueError(f"pasted tensors have one shape, got {tuple(inside.shape)} and {tuple(outside.shape)}")
    return torch.where(box_at(box, inside.shape[2:]), inside, outside)


def box_at(box: Tensor, size: Sequence[int]) -> Tensor:
    """Return a bool mask (1, 1, ...) at another resolution, by the nearest voxel."""
    if tuple(box.shape[2:]) == tuple(size):
        return box
    return functional.interpolate(box.float(), size=tuple(size), mode="nearest-exact").bool()


def ignore_outside(space: LabelSpace, target: Tensor, region: Tensor) -> Tensor:
    """Return a target in which everything outside a region is ignored.

    Args:
        space: what the targets mean; it must have an ignore label.
        target: label map (b, 1, ...), or regions (b, R, ...) with or without the mask of ignored voxels at their end.
        region: bool (1, 1, ...) at full resolution, True where the target stays.

    Raises:
        ValueError: the label space has no ignore label.
    """
    if space.ignore_label is None:
        raise ValueError("voxels can only be ignored in a label space that has an ignore label")
    kept = box_at(region, target.shape[2:])
    if not space.regions:
        return torch.where(kept, target, torch.full_like(target, space.ignore_label))
    masks, dropped = target[:, : space.num_heads], ~(kept & space.valid(target))
    return torch.cat([masks, dropped.to(target.dtype)], 1)
