"""Semantic coloring: label maps as images, with one color a class (DiffRect's label context calibration)."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

#: The paper's colors, then the other corners of the cube. For four classes they are one-hot in red, green and blue.
PUBLISHED = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1))
SCHEMES = ("published", "distant", "onehot", "gray")


def color_table(classes: int, scheme: str = "published") -> Tensor:
    """Return one color a class, float32 (classes, channels) in [0, 1]; class 0 is black.

    Args:
        classes: C, background included.
        scheme: "published" takes the paper's colors up to 4 classes, cube corners up to 8, then the farthest points of
            a grid; "distant" the farthest of corners and such points from the start; "onehot" one channel a foreground
            class; "gray" one channel of evenly spaced grey values, a label map as it is stored.

    Raises:
        ValueError: fewer than two classes, or an unknown scheme.
    """
    if classes < 2 or scheme not in SCHEMES:
        raise ValueError(f"need two classes or more and one of {SCHEMES}, got {classes} and {scheme!r}")
    if scheme == "onehot":
        return torch.eye(classes)[:, 1:]
    if scheme == "gray":
        return torch.linspace(0, 1, classes)[:, None]
    if scheme == "published" and classes == 2:
        return torch.tensor([PUBLISHED[0], PUBLISHED[4]], dtype=torch.float32)  # black and white
    if scheme == "published" and classes <= len(PUBLISHED):
        return torch.tensor(PUBLISHED[:classes], dtype=torch.float32)
    return _most_distant(classes) if scheme == "distant" else _farthest_points(classes)


def _most_distant(count: int) -> Tensor:
    """Return what has the largest smallest distance: the farthest points, or black and other corners of the cube."""
    corners = [torch.tensor([PUBLISHED[0], *c]).float() for c in itertools.combinations(PUBLISHED[1:], count - 1)]
    return max([_farthest_points(count), *corners], key=lambda table: torch.pdist(table).min().item())


def _farthest_points(count: int) -> Tensor:
    """Choose points of a regular grid in the unit cube, each farthest from those before it; ties go to the first."""
    side = math.ceil(count ** (1 / 3)) + 1
    axis = torch.linspace(0, 1, side)
    grid = torch.tensor(list(itertools.product(axis.tolist(), repeat=3)))
    chosen = [0]
    distance = torch.full((len(grid),), math.inf)
    while len(chosen) < count:
        distance = torch.minimum(distance, (grid - grid[chosen[-1]]).square().sum(1))
        chosen.append(int(distance.argmax()))
    return grid[chosen]


def colorize(labels: Tensor, table: Tensor) -> Tensor:
    """Return the colors (b, channels, ...) of an integer label map (b, 1, ...).

    Args:
        labels: classes; values outside 0 .. C-1 (the ignore label) take the background's color.
        table: what `color_table` returns.
    """
    labels = labels[:, 0].long()
    labels = labels.where((labels >= 0) & (labels < len(table)), torch.zeros_like(labels))
    return table[labels].movedim(-1, 1)
