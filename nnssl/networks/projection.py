"""Projection head of the contrastive term (Diff-CL, arXiv 2503.09408)."""

from __future__ import annotations

from torch import Tensor, nn

EMBEDDING_DIM = 64


class ProjectionHead(nn.Module):
    """Map voxel features to the space where cosines are compared: Linear, LayerNorm, ReLU, Linear.

    It is applied to sampled voxels only, gathered first, never to a full map. LayerNorm instead of BatchNorm: the
    result of a voxel does not depend on which others were drawn with it.

    Args:
        in_channels: C_f, channels of the feature map the voxels come from.
        dim: d, dimension of the embedding.
    """

    def __init__(self, in_channels: int, dim: int = EMBEDDING_DIM) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_channels, dim), nn.LayerNorm(dim), nn.ReLU(inplace=True), nn.Linear(dim, dim)
        )

    def forward(self, voxels: Tensor) -> Tensor:
        """Project voxel features (M, C_f) to (M, d)."""
        return self.layers(voxels)
