"""The head that predicts signed distance maps from a segmentation network's last features."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DistanceHead(nn.Module):
    """A convolution of one voxel and tanh, as in DTC (arXiv 2009.04448) and SASSNet (arXiv 2007.10732).

    It runs in the precision of its weights with autocast off: ``sigmoid(-1500 z)`` turns half precision's steps of z
    into jumps.

    Args:
        in_channels: channels of the features.
        channels: K, distance maps to predict.
        ndim: spatial axes, 2 or 3.
    """

    def __init__(self, in_channels: int, channels: int, ndim: int) -> None:
        super().__init__()
        self.layer = (nn.Conv2d if ndim == 2 else nn.Conv3d)(in_channels, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return distances (b, K, ...) in (-1, 1) of features (b, in_channels, ...)."""
        with torch.autocast(features.device.type, enabled=False):
            return self.layer(features.to(self.layer.weight.dtype)).tanh()
