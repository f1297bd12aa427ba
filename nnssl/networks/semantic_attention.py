"""Queries of classes that look at several resolutions of a decoder, for training (INCL, MIDL 2023).

A query is what a class looks like; its attention over the positions of a feature map says where the class is, and what
it finds there moves it on to the next resolution. Both modules of INCL have this form; one of them looks with what the
queries of the other became on labeled crops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Widening of the perceptron that follows the attention.
WIDENING = 4


def scale_grids(
    patch_size: Sequence[int], strides: Sequence[Sequence[int] | int], scales: int, tokens: int
) -> dict[int, tuple[int, ...]]:
    """Return which resolutions of a planned decoder are read, and the grid of positions of each.

    Neighboring resolutions, of which the highest has at most ``tokens`` positions. Where the lowest resolutions already
    have more, these are taken, and their grid is halved, the longest axis first, until it has that few.

    Args:
        patch_size: training patch, voxels.
        strides: per encoder stage, as in the plan.
        scales: resolutions wanted; fewer if the decoder has fewer.
        tokens: most positions of a grid.

    Returns:
        By index of the decoder's stage, lowest resolution first, the grid.
    """
    size, sizes = list(patch_size), []
    for stride in strides:
        steps = [stride] * len(size) if isinstance(stride, int) else stride
        size = [-(-n // s) for n, s in zip(size, steps, strict=True)]
        sizes.append(size)
    sizes = sizes[-2::-1]  # a decoder's stage has the size of its skip connection
    fitting = sum(math.prod(size) <= tokens for size in sizes)
    stop = min(max(fitting, scales), len(sizes))
    return {stage: _halved(sizes[stage], tokens) for stage in range(max(0, stop - scales), stop)}


def _halved(size: Sequence[int], tokens: int) -> tuple[int, ...]:
    grid = list(size)
    while math.prod(grid) > tokens:
        axis = grid.index(max(grid))
        grid[axis] = -(-grid[axis] // 2)
    return tuple(grid)


def pool(values: Tensor, grid: Sequence[int]) -> Tensor:
    """Return the means of values (b, c, ...) over the cells of a grid, (b, c, *grid)."""
    if values.shape[2:] == torch.Size(grid):
        return values
    pooling = functional.adaptive_avg_pool2d if len(grid) == 2 else functional.adaptive_avg_pool3d
    return pooling(values, tuple(grid))


class ScaleAttention(nn.Module):
    """Attention of class embeddings over the positions of one resolution.

    Its scores pass a perceptron over all positions, N -> N -> N for N positions, which is what ties it to one grid.

    Args:
        channels: of the features.
        grid: positions along each axis; features of another size are averaged over its cells.
        dim: of the embeddings, a multiple of ``heads``.
        heads: of the attention.
        moves: the embeddings are read further; False: nobody does, so they stay as they are.
    """

    def __init__(self, channels: int, grid: Sequence[int], dim: int, heads: int, moves: bool = True) -> None:
        super().__init__()
        self.grid, self.heads, self.moves, n = tuple(grid), heads, moves, math.prod(grid)
        self.query, self.key, self.mix = nn.Linear(dim, dim), nn.Linear(channels, dim), nn.Linear(heads, 1)
        self.positions = nn.Sequential(nn.Linear(n, n), nn.ReLU(), nn.Linear(n, n))
        if not moves:
            return
        self.value, self.join = nn.Linear(channels, dim), nn.Linear(dim, dim)
        self.perceptron = nn.Sequential(nn.Linear(dim, WIDENING * dim), nn.ReLU(), nn.Linear(WIDENING * dim, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))

    def forward(self, embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings (b, C, dim) after this resolution, and maps of the classes (b, C, *grid), logits.

        Args:
            embeddings: (b, C, dim).
            features: (b, channels, ...).
        """
        tokens = pool(features, self.grid).flatten(2).transpose(1, 2)
        q, k = self._split(self.query(embeddings)), self._split(self.key(tokens))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])  # (b, heads, C, N)
        scores = scores + self.positions(scores)
        maps = self.mix(scores.movedim(1, -1))[..., 0].unflatten(2, self.grid)
        if self.moves:
            read = (scores.softmax(3) @ self._split(self.value(tokens))).transpose(1, 2).flatten(2)
            embeddings = self.norms[0](embeddings + self.join(read))
            embeddings = self.norms[1](embeddings + self.perceptron(embeddings))
        return embeddings, maps

    def _split(self, values: Tensor) -> Tensor:
        """Return values (b, n, dim) by head, (b, heads, n, dim / heads)."""
        return values.unflatten(2, (self.heads, -1)).transpose(1, 2)


class SemanticAttention(nn.Module):
    """Class embeddings that read some resolutions of a decoder, the lowest first.

    Learned ones go from each resolution to the next. A taught module has none of its own: at every resolution it looks
    with those that it is given for it.

    In single precision with autocast off, since the softmax runs over positions.

    Args:
        channels: of the features of each resolution that is read, by index of the decoder's stage.
        grids: their grids, see :func:`scale_grids`.
        classes: C.
        dim: of the embeddings.
        heads: of the attention.
        taught: whether the embeddings are given.
    """

    def __init__(
        self,
        channels: dict[int, int],
        grids: dict[int, tuple[int, ...]],
        classes: int,
        dim: int,
        heads: int,
        taught: bool = False,
    ) -> None:
        super().__init__()
        self.stages = list(grids)
        if not taught:
            self.embeddings = nn.Parameter(torch.randn(classes, dim))
        self.layers = nn.ModuleList(
            ScaleAttention(channels[s], grid, dim, heads, not taught) for s, grid in grids.items()
        )

    def forward(
        self, scales: Sequence[Tensor] | Mapping[int, Tensor], given: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return maps and embeddings of the classes at each resolution that is read.

        Args:
            scales: features (b, channels, ...) by index of the decoder's stage, lowest resolution first.
            given: embeddings (C, dim) of each resolution that is read, if the module is taught.

        Returns:
            (maps (b, C, *grid), logits; embeddings (b, C, dim), what they are after that resolution).
        """
        maps, after = [], []
        first = scales[self.stages[0]]
        with torch.autocast(first.device.type, enabled=False):
            embeddings = None if given is not None else self.embeddings.expand(len(first), -1, -1)
            for i, (stage, layer) in enumerate(zip(self.stages, self.layers, strict=True)):
                if given is not None:
                    embeddings = given[i].expand(len(first), -1, -1)
                embeddings, logits = layer(embeddings, scales[stage].float())
                maps.append(logits)
                after.append(embeddings)
        return maps, after
