"""Diff-VNet as published: a V-Net with batch norm, two stems and three decoders, in 2D and 3D.

Wang and Li, NeurIPS 2023 (arXiv 2310.11320), with the layer details of the authors' public
code. A stage is convolution, ReLU, BatchNorm, channel dropout, in this order; decoders add their skips. The activated
time embedding is added as a constant of each channel after every strided and transposed convolution and every stage of
a block but its last. That is safe here because BatchNorm's mean is over the batch; see `nnssl.networks.conditioning`.
The code also builds linear layers for the last stages and a second embedding, 1.10 million weights which never run;
they do not exist here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl.errors import UserError
from nnssl.networks.conditioning import EMBEDDING_DIM, TimeEmbedding
from nnssl.networks.diff_vnet import DecoderModes

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
UP_CONV = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
DROPOUT = {2: nn.Dropout2d, 3: nn.Dropout3d}
STAGE_DROPOUT, END_DROPOUT = 0.1, 0.5
ENCODER_STAGES = (2, 3, 3, 3)  # blocks two to five; the stems are block one
DECODER_STAGES = (3, 3, 2, 1)  # blocks six to nine
DIVISOR = 16


class DiffVNet(DecoderModes):
    """The paper's network; patches must be divisible by 16. It has no deep supervision.

    Args:
        input_channels: channels of the image.
        num_classes: K, segmentation heads with the background.
        n_filters: channels at full resolution (the paper: 32).
        ndim: spatial axes, 2 or 3.
        dropout: drop whole channels, 0.1 after every stage, 0.5 at the bottleneck and before the output.
        batch_statistics: "image" keeps diffusion passes and passes without gradient out of the running statistics;
            "all" counts every pass, as the authors' code does.
        deep_supervision: accepted for nnU-Net's builder and ignored.

    Raises:
        UserError: number of axes other than 2 or 3, or (forward) a size not divisible by 16.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        n_filters: int = 32,
        ndim: int = 3,
        dropout: bool = True,
        batch_statistics: str = "image",
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if ndim not in CONV:
            raise UserError("a Diff-VNet has 2 or 3 spatial axes", got=ndim)
        self.shares_features, self.frozen_statistics = not dropout, batch_statistics == "image"
        rates = (STAGE_DROPOUT, END_DROPOUT) if dropout else (0.0, 0.0)
        self.image_stem = _Stage(ndim, input_channels, n_filters, rates[0])
        self.diffusion_stem = _Stage(ndim, input_channels + num_classes, n_filters, rates[0])
        self.encoder = _Encoder(ndim, n_filters, rates)
        self.theta = _Decoder(ndim, n_filters, num_classes, rates, conditioned=False)
        self.psi = _Decoder(ndim, n_filters, num_classes, rates, conditioned=False)
        self.xi = _Decoder(ndim, n_filters, num_classes, rates, conditioned=True)
        self.time_embedding = TimeEmbedding()

    @property
    def decoders(self) -> dict[str, nn.Module]:
        return {"theta": self.theta, "psi": self.psi, "xi": self.xi}

    def encode_image(self, x: Tensor) -> list[Tensor]:
        return self.encoder(self._stem(self.image_stem, x), None)

    def decode(self, name: str, features: list[Tensor]) -> Tensor:
        return self.decoders[name](features, None)

    def denoise(self, x: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        embedding = self.time_embedding(t)
        stem = self._stem(self.diffusion_stem, torch.cat([x, noisy.to(x.dtype)], 1))
        return self.xi(self.encoder(stem, embedding), embedding)

    @staticmethod
    def _stem(stem: nn.Module, x: Tensor) -> Tensor:
        if any(n % DIVISOR for n in x.shape[2:]):
            raise UserError(f"Diff-VNet patches must be divisible by {DIVISOR}", got=tuple(x.shape[2:]))
        return stem(x)


class _Stage(nn.Module):
    """A 3-voxel convolution, ReLU, BatchNorm, channel dropout."""

    def __init__(self, ndim: int, channels_in: int, channels: int, rate: float) -> None:
        super().__init__()
        self.unit = _Unit(CONV[ndim](channels_in, channels, 3, padding=1), ndim)
        self.dropout = DROPOUT[ndim](rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.unit(x))


class _Unit(nn.Module):
    """A convolution, ReLU, BatchNorm."""

    def __init__(self, conv: nn.Module, ndim: int) -> None:
        super().__init__()
        self.conv, self.norm = conv, NORM[ndim](conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.conv(x)))


class _Block(nn.Module):
    """A change of resolution, the skip, and a run of stages; the embedding enters after each but the last stage."""

    def __init__(self, ndim: int, scale: nn.Module, count: int, rate: float, conditioned: bool) -> None:
        super().__init__()
        channels: Any = scale.out_channels
        self.scale = _Unit(scale, ndim)
        self.stages = nn.ModuleList(_Stage(ndim, channels, channels, rate) for _ in range(count))
        self.sites = nn.ModuleList(nn.Linear(EMBEDDING_DIM, channels) for _ in range(count if conditioned else 0))

    def forward(self, x: Tensor, embedding: Tensor | None, skip: Tensor | None = None) -> Tensor:
        x = self._inject(0, self.scale(x), embedding)
        if skip is not None:
            x = x + skip
        for index, stage in enumerate(self.stages, 1):
            x = stage(x)
            if index < len(self.stages):
                x = self._inject(index, x, embedding)
        return x

    def _inject(self, site: int, x: Tensor, embedding: Tensor | None) -> Tensor:
        if embedding is None:
            return x
        constant = self.sites[site](embedding)
        return x + constant.view(*constant.shape, *[1] * (x.ndim - 2))


class _Encoder(nn.Module):
    """Blocks two to five, shared by image and diffusion passes."""

    def __init__(self, ndim: int, width: int, rates: tuple[float, float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _Block(ndim, CONV[ndim](width * 2**i, width * 2 ** (i + 1), 2, 2), count, rates[0], conditioned=True)
            for i, count in enumerate(ENCODER_STAGES)
        )
        self.dropout = DROPOUT[ndim](rates[1])

    def forward(self, x: Tensor, embedding: Tensor | None) -> list[Tensor]:
        features = [x]
        for block in self.blocks:
            features.append(block(features[-1], embedding))
        features[-1] = self.dropout(features[-1])
        return features


class _Decoder(nn.Module):
    """Blocks six to nine and the output layer."""

    def __init__(self, ndim: int, width: int, classes: int, rates: tuple[float, float], conditioned: bool) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(len(ENCODER_STAGES), -1, -1)]
        self.blocks = nn.ModuleList(
            _Block(ndim, UP_CONV[ndim](w_in, w, 2, 2), count, rates[0], conditioned)
            for w_in, w, count in zip(widths, widths[1:], DECODER_STAGES, strict=False)
        )
        self.dropout = DROPOUT[ndim](rates[1])
        self.seg_layer = CONV[ndim](width, classes, 1)

    def forward(self, features: list[Tensor], embedding: Tensor | None) -> Tensor:
        x = features[-1]
        for block, skip in zip(self.blocks, reversed(features[:-1]), strict=True):
            x = block(x, embedding, skip)
        return self.seg_layer(self.dropout(x))
