"""Heads on the features of single voxels, for contrast between voxels or with prototypes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """Per-voxel perceptron C_f -> d with LayerNorm and ReLU, then d -> d (F of Diff-CL, section 3.4).

    It works on sampled voxels, never on a whole map, and has no batch statistics. It runs in the precision of its
    weights with autocast off: its cosines decide by small differences, and in older torch autocast keeps the half
    copies of the weights from a pass without gradients (the bank's) for the pass that learns, which then gets none
    (pytorch issue 158232).

    Args:
        in_channels: C_f, channels of the feature map.
        dim: d, dimension of the projected features.
    """

    def __init__(self, in_channels: int, dim: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_channels, dim), nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, features: Tensor) -> Tensor:
        """Project features of voxels (M, C_f) to (M, d)."""
        with torch.autocast(features.device.type, enabled=False):
            return self.layers(features.to(self.layers[0].weight.dtype))


class Selector(nn.Module):
    """Per-voxel perceptron d -> d -> 1 and sigmoid: how much an embedding counts (SS-Net, arXiv 2203.01324).

    In the precision of its weights, for the reason that :class:`ProjectionHead` gives.

    Args:
        dim: d, dimension of the embeddings.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, dim), nn.LayerNorm(dim), nn.LeakyReLU(0.2), nn.Linear(dim, 1), nn.Sigmoid()
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return weights (M,) in (0, 1) of embeddings (M, d)."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.layers(embeddings.to(self.layers[0].weight.dtype))[:, 0]


class SeparationHeads(nn.Module):
    """Projector and predictor of SS-Net, and for each class selectors of embeddings and of prototypes.

    Args:
        in_channels: channels of the feature map.
        dim: dimension of the embeddings.
        classes: classes that have prototypes.
    """

    def __init__(self, in_channels: int, dim: int, classes: int) -> None:
        super().__init__()
        self.projector, self.predictor = ProjectionHead(in_channels, dim), ProjectionHead(dim, dim)
        self.embedding_selectors = nn.ModuleList(Selector(dim) for _ in range(classes))
        self.prototype_selectors = nn.ModuleList(Selector(dim) for _ in range(classes))
