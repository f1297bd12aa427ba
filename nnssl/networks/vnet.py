"""V-Net as the semi-supervised literature uses it (UA-MT, MC-Net), in 2D and 3D.

Every convolution is followed by BatchNorm and ReLU; strided 2-voxel convolutions halve the resolution four times; the
decoder adds its skips. Weights start from torch's own initialization. Milletari et al. 2016 (arXiv 1606.04797) describe
the original.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nnssl.errors import UserError
from nnssl.networks.conditioning import EMBEDDING_DIM, TimeEmbedding
from nnssl.networks.high_frequency_mamba import build_hfm_modules

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
UP_CONV = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
DROPOUT = {2: nn.Dropout2d, 3: nn.Dropout3d}
ENCODER_CONVS = (1, 2, 3, 3, 3)  # blocks one to five
DECODER_CONVS = (3, 3, 2, 1)  # blocks six to nine
DIVISOR = 16


class VNet(nn.Module):
    """V-Net with optional time embedding and high-frequency Mamba modules.

    It has no deep supervision, hence no ``decoder`` attribute; a trainer that builds it must not toggle one. Patches
    must be divisible by 16. The time embedding is added as a per-channel constant, as in GenericSSL: after every
    strided and transposed convolution and every convolution of a block but its last. That is safe here only because
    the norm is BatchNorm, whose mean is over the batch and does not remove a constant of one sample.

    Args:
        input_channels: channels of the input, time-conditioned label channels included.
        num_classes: segmentation heads.
        n_filters: channels at full resolution.
        ndim: spatial axes, 2 or 3. ``conv_op`` (class or dotted path), if given, takes precedence.
        conv_op: convolution class as in nnU-Net's plans, for the number of axes only.
        dropout: rate after the bottleneck and before the output.
        deep_supervision: accepted for nnU-Net's builder and ignored.
        hfm: as for `PlannedUNet`; ``stages`` defaults to [3], block four.
        conditioning: build the time embedding.

    Raises:
        UserError: number of axes other than 2 or 3, unknown HFM stage, or (forward) a size not divisible by 16.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        n_filters: int = 16,
        ndim: int = 3,
        conv_op: Any = None,
        dropout: float = 0.5,
        deep_supervision: bool = False,
        hfm: dict[str, Any] | None = None,
        conditioning: bool = False,
    ) -> None:
        super().__init__()
        ndim = ndim if conv_op is None else int(getattr(conv_op, "__name__", str(conv_op))[-2])
        if ndim not in CONV:
            raise UserError("a V-Net has 2 or 3 spatial axes", got=ndim)
        widths = [n_filters * 2**i for i in range(5)]
        self.blocks = nn.ModuleList(
            _Block(ndim, w_in, w, n)
            for w_in, w, n in zip([input_channels, *widths[1:]], widths, ENCODER_CONVS, strict=True)
        )
        self.downs = nn.ModuleList(_unit(CONV[ndim](widths[i], widths[i + 1], 2, 2), ndim) for i in range(4))
        rising = widths[::-1]
        self.ups = nn.ModuleList(_unit(UP_CONV[ndim](rising[i], rising[i + 1], 2, 2), ndim) for i in range(4))
        self.up_blocks = nn.ModuleList(_Block(ndim, w, w, n) for w, n in zip(rising[1:], DECODER_CONVS, strict=True))
        self.bottleneck_dropout, self.output_dropout = DROPOUT[ndim](dropout), DROPOUT[ndim](dropout)
        self.seg_layer = CONV[ndim](n_filters, num_classes, 1)
        self.feature_channels = n_filters
        self.conditioning = conditioning
        with torch.random.fork_rng(devices=[]):
            self.hfm = build_hfm_modules(None if hfm is None else {"stages": [3], **hfm}, widths, ndim)
            if conditioning:
                self._build_time_sites(widths)

    def _build_time_sites(self, widths: list[int]) -> None:
        self.time_embedding = TimeEmbedding()
        rising = widths[::-1]
        per_block = [*zip(widths, ENCODER_CONVS, strict=True), *zip(rising[1:], DECODER_CONVS, strict=True)]
        self.block_sites = nn.ModuleList(
            nn.ModuleList(nn.Linear(EMBEDDING_DIM, width) for _ in range(n - 1)) for width, n in per_block
        )
        self.scale_sites = nn.ModuleList(nn.Linear(EMBEDDING_DIM, w) for w in (*widths[1:], *rising[1:]))

    def forward(self, x: Tensor, t: Tensor | None = None, features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits.

        Args:
            x: input, (b, channels, *spatial), spatial sizes divisible by 16.
            t: integer time steps, (b,); None leaves the embedding out.
            features: return (logits, output of block nine before the last dropout (b, n_filters, *spatial)).
        """
        if any(n % DIVISOR for n in x.shape[2:]):
            raise UserError(f"V-Net patches must be divisible by {DIVISOR}", got=tuple(x.shape[2:]))
        if t is not None and not self.conditioning:
            raise ValueError("a time step was given to a network that was built without conditioning")
        embedding = None if t is None else self.time_embedding(t)
        x = self._decode(self._encode(x, embedding), embedding)
        logits = self.seg_layer(self.output_dropout(x))
        return (logits, x) if features else logits

    def _encode(self, x: Tensor, embedding: Tensor | None) -> list[Tensor]:
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i:
                x = self._scale(self.downs[i - 1], x, i - 1, embedding)
            x = block(x, self._block_shifts(i, embedding))
            if str(i) in self.hfm:
                x = self.hfm[str(i)](x)
            skips.append(x)
        skips[-1] = self.bottleneck_dropout(skips[-1])
        return skips

    def _decode(self, skips: list[Tensor], embedding: Tensor | None) -> Tensor:
        x = skips[-1]
        for i, (up, block) in enumerate(zip(self.ups, self.up_blocks, strict=True)):
            x = self._scale(up, x, len(self.downs) + i, embedding) + skips[-2 - i]
            x = block(x, self._block_shifts(len(self.blocks) + i, embedding))
        return x

    def _scale(self, unit: nn.Module, x: Tensor, site: int, embedding: Tensor | None) -> Tensor:
        x = unit(x)
        return x if embedding is None else x + _constant(self.scale_sites[site], embedding, x)

    def _block_shifts(self, index: int, embedding: Tensor | None) -> list[Tensor]:
        return [] if embedding is None else [site(embedding) for site in self.block_sites[index]]


class _Block(nn.Module):
    """A run of 3-voxel convolutions, each followed by BatchNorm and ReLU."""

    def __init__(self, ndim: int, channels_in: int, channels: int, count: int) -> None:
        super().__init__()
        self.units = nn.ModuleList(
            _unit(CONV[ndim](channels if i else channels_in, channels, 3, padding=1), ndim) for i in range(count)
        )

    def forward(self, x: Tensor, shifts: list[Tensor]) -> Tensor:
        """Run the units; ``shifts`` (b, channels), none or one less than units, are added after all but the last."""
        for i, unit in enumerate(self.units):
            x = unit(x)
            if i < len(shifts):
                x = x + _over_space(shifts[i], x)
        return x


def _unit(conv: nn.Module, ndim: int) -> nn.Sequential:
    return nn.Sequential(conv, NORM[ndim](conv.out_channels), nn.ReLU(inplace=True))


def _constant(site: nn.Module, embedding: Tensor, x: Tensor) -> Tensor:
    return _over_space(site(embedding), x)


def _over_space(values: Tensor, x: Tensor) -> Tensor:
    return values.view(*values.shape, *[1] * (x.dim() - 2))
