"""The U-Net of the semi-supervised literature (SSL4MIS) from parts that a time or guidance embedding can condition.

Two 3-voxel convolutions a level, max pooling down, 1-voxel convolution and linear interpolation up, skips
concatenated. The same encoder and decoder make DiffRect's rectifier. The original: Ronneberger et al. 2015 (arXiv
1505.04597).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl.errors import UserError
from nnssl.networks.conditioning import EMBEDDING_DIM, FiLM


class ChannelsLastConv3d(nn.Conv3d):
    """A 3D convolution that works channels-last on CPUs, on tensors that are not.

    With few channels it takes half the time there, copies apart (torch 2.13, AVX-512): the other layout pads 8 channels
    to 16. With the copies a rectifier of 8 channels takes three quarters of its time. Norms, interpolation and pooling
    are faster in the usual layout, which is why the convolution alone changes it; in 2D nothing is gained.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x (b, c, ...), contiguous."""
        if x.device.type != "cpu":
            return super().forward(x)
        layout = torch.channels_last_3d
        inner = x.contiguous(memory_format=layout)
        if inner.requires_grad and inner is not x:  # what comes before would run on two layouts, many times slower
            inner.register_hook(lambda gradient: gradient if gradient is None else gradient.contiguous())
        weight = self.weight.contiguous(memory_format=layout)
        return self._conv_forward(inner, weight, self.bias).contiguous()


CONV = {2: nn.Conv2d, 3: ChannelsLastConv3d}
POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INTERPOLATION = {2: "bilinear", 3: "trilinear"}
GROUPS = 8
SLOPE = 0.01
#: Channels and dropout of the levels of SSL4MIS's U-Net, in units of the first level's 16 channels.
LEVELS = 5
DROPOUT = (0.05, 0.1, 0.2, 0.3, 0.5)

STYLE_NORMS = ("batch", "instance", "group")
CONDITIONINGS = ("none", "film", "additive")


@dataclass(frozen=True)
class Style:
    """What all blocks of a network share.

    Args:
        ndim: spatial axes, 2 or 3.
        norm: normalization; "group" for maps that get too small for statistics of one channel.
        conditioning: "film" after each norm; "additive" as in DiffRect's code, after the first non-linearity, which
            only a batch norm lets through (an instance norm removes a channel's constant); or "none".

    Raises:
        ValueError: an unknown norm or conditioning, or an added embedding without batch norm.
    """

    ndim: int
    norm: str = "instance"
    conditioning: str = "none"

    def __post_init__(self) -> None:
        if self.norm not in STYLE_NORMS or self.conditioning not in CONDITIONINGS:
            raise ValueError(f"unknown norm {self.norm!r} or conditioning {self.conditioning!r}")
        if self.conditioning == "additive" and self.norm != "batch":
            raise ValueError("an added embedding survives batch normalization only; take film")

    def make_norm(self, channels: int) -> nn.Module:
        """Build the norm of one site."""
        if self.norm == "group":
            return nn.GroupNorm(GROUPS if channels % GROUPS == 0 else 1, channels)
        if self.norm == "instance":
            # one group a channel is an instance norm, in a third of its time on CPUs (torch 2.13, both directions)
            return nn.GroupNorm(channels, channels)
        return BATCH_NORM[self.ndim](channels)


class ConvBlock(nn.Module):
    """(Convolution, norm, LeakyReLU) twice with dropout between, conditioned on an embedding or not.

    Args:
        style: number of axes, norm, conditioning.
        channels_in: input channels.
        channels: output channels.
        kernel: kernel size, one number an axis or one for all; padded to keep the size.
        dropout: rate of the dropout of single values between the two convolutions.
    """

    def __init__(
        self, style: Style, channels_in: int, channels: int, kernel: int | Sequence[int] = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        kernel = [kernel] * style.ndim if isinstance(kernel, int) else list(kernel)
        padding = [k // 2 for k in kernel]
        self.conv1 = CONV[style.ndim](channels_in, channels, kernel, padding=padding)
        self.norm1 = style.make_norm(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CONV[style.ndim](channels, channels, kernel, padding=padding)
        self.norm2 = style.make_norm(channels)
        self.conditioning = style.conditioning
        if style.conditioning == "film":
            self.film1, self.film2 = FiLM(channels), FiLM(channels)
        elif style.conditioning == "additive":
            self.site = nn.Linear(EMBEDDING_DIM, channels)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Return (b, channels, ...) of x (b, channels_in, ...); ``embedding`` is SiLU-activated, (b, 512)."""
        film = self.conditioning == "film" and embedding is not None
        x = self.conv1(x)
        x = F.leaky_relu(self.film1(self.norm1, x, embedding) if film else self.norm1(x), SLOPE)
        if self.conditioning == "additive" and embedding is not None:
            x = x + self.site(embedding).view(*x.shape[:2], *[1] * (x.ndim - 2))
        x = self.conv2(self.dropout(x))
        return F.leaky_relu(self.film2(self.norm2, x, embedding) if film else self.norm2(x), SLOPE)


class Encoder(nn.Module):
    """A block a level, max pooling between levels.

    Args:
        style: number of axes, norm, conditioning.
        channels_in: input channels.
        widths: channels of each level.
        strides: pooling before each level but the first, one size an axis.
        kernels: kernel sizes of each level.
        dropout: rate of each level.
    """

    def __init__(
        self,
        style: Style,
        channels_in: int,
        widths: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernels: Sequence[Sequence[int]],
        dropout: Sequence[float],
    ) -> None:
        super().__init__()
        levels = zip([channels_in, *widths[:-1]], widths, kernels, dropout, strict=True)
        self.blocks = nn.ModuleList(ConvBlock(style, w_in, w, k, p) for w_in, w, k, p in levels)
        self.pools = nn.ModuleList(POOL[style.ndim](list(stride)) for stride in strides)

    def forward(
        self, x: Tensor, embedding: Tensor | None = None, fuse: Sequence[Tensor] | None = None, fusers: Any = None
    ) -> list[Tensor]:
        """Return the features of each level, full resolution first.

        Args:
            x: input (b, channels_in, ...).
            embedding: condition (b, 512).
            fuse: another encoder's features, joined with each level's before the next level sees them.
            fusers: one module a level that joins both after concatenation; None adds them.
        """
        features: list[Tensor] = []
        for level, block in enumerate(self.blocks):
            x = block(self.pools[level - 1](x) if level else x, embedding)
            if fuse is not None:
                x = x + fuse[level] if fusers is None else fusers[level](torch.cat([x, fuse[level]], 1))
            features.append(x)
        return features


class Up(nn.Module):
    """Reduce the channels, enlarge to the skip's size, concatenate, and run a block.

    Args:
        style: number of axes, norm, conditioning.
        channels_in: channels from below.
        channels: channels of the skip and of the output.
        kernel: kernel size of the block.
        skip: whether there is a skip connection (without, only its size is used).
    """

    def __init__(
        self, style: Style, channels_in: int, channels: int, kernel: int | Sequence[int] = 3, skip: bool = True
    ) -> None:
        super().__init__()
        self.reduce = CONV[style.ndim](channels_in, channels, 1)
        self.mode, self.skip = INTERPOLATION[style.ndim], skip
        self.block = ConvBlock(style, (1 + skip) * channels, channels, kernel)

    def forward(self, x: Tensor, skip: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Return (b, channels, *size of the skip)."""
        x = F.interpolate(self.reduce(x), size=skip.shape[2:], mode=self.mode, align_corners=True)
        return self.block(torch.cat([skip, x], 1) if self.skip else x, embedding)


class Decoder(nn.Module):
    """From an encoder's features to logits.

    Args:
        style: number of axes, norm, conditioning.
        widths: channels of the encoder's levels.
        kernels: kernel sizes of the encoder's levels.
        num_classes: output channels.
        skips: whether the encoder's finer levels reach the decoder.
    """

    def __init__(
        self,
        style: Style,
        widths: Sequence[int],
        kernels: Sequence[Sequence[int]],
        num_classes: int,
        skips: bool = True,
    ) -> None:
        super().__init__()
        steps = range(len(widths) - 2, -1, -1)
        self.ups = nn.ModuleList(Up(style, widths[i + 1], widths[i], kernels[i], skips) for i in steps)
        self.out = CONV[style.ndim](widths[0], num_classes, 3, padding=1)

    def forward(self, features: Sequence[Tensor], embedding: Tensor | None = None) -> Tensor:
        """Return logits (b, num_classes, ...) of the features, full resolution first."""
        x = features[-1]
        for up, skip in zip(self.ups, reversed(features[:-1]), strict=True):
            x = up(x, skip, embedding)
        return self.out(x)


class LiteratureUNet(nn.Module):
    """SSL4MIS's U-Net: five levels of 16 to 256 channels, batch norm, dropout, bilinear up-sampling.

    It has no deep supervision, hence no ``decoder.deep_supervision`` to toggle. Weights start from torch's own
    initialization, as in the code it follows.

    Args:
        input_channels: image channels.
        num_classes: segmentation heads.
        ndim: spatial axes, 2 or 3.
        width: channels at full resolution.
        norm: "batch" as published, or "instance".
        deep_supervision: accepted for nnU-Net's builder and ignored.

    Raises:
        UserError: number of axes other than 2 or 3, or (forward) a size below 16.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        ndim: int = 2,
        width: int = 16,
        norm: str = "batch",
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if ndim not in CONV:
            raise UserError("a U-Net has 2 or 3 spatial axes", got=ndim)
        style = Style(ndim, norm)
        widths = [width * 2**i for i in range(LEVELS)]
        kernels = [[3] * ndim] * LEVELS
        self.encoder = Encoder(style, input_channels, widths, [[2] * ndim] * (LEVELS - 1), kernels, DROPOUT)
        self.decoder = Decoder(style, widths, kernels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (b, num_classes, ...) of images (b, input_channels, ...)."""
        if min(x.shape[2:]) < 2 ** (LEVELS - 1):
            raise UserError("the U-Net needs 16 voxels an axis", got=tuple(x.shape[2:]))
        return self.decoder(self.encoder(x))
