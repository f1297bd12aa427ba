"""Projection head for voxel-wise contrast."""

from __future__ import annotations

from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """Per-voxel perceptron C_f -> d with LayerNorm and ReLU, then d -> d (F of Diff-CL, section 3.4).

    It works on sampled voxels, never on a whole map, and has no batch statistics.

    Args:
        in_channels: C_f, channels of the feature map.
        dim: d, dimension of the projected features.
    """

    def __init__(self, in_channels: int, dim: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_channels, dim), nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, features: Tensor) -> Tensor:
        """Project features of voxels (M, C_f) to (M, d)."""
        return self.layers(features)
