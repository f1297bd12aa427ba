"""Projection head for voxel-wise contrast."""

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
