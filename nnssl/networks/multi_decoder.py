"""One encoder, several decoders that differ in how they go to the next higher resolution.

The network of MC-Net (Wu et al., MICCAI 2021, arXiv 2103.02911) and MC-Net+ (Medical Image Analysis 2022, arXiv
2109.09960) on nnU-Net's planned topology.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim
from torch import Tensor, nn

from nnssl.errors import UserError
from nnssl.networks.planned import PlannedUNet, locate_base, run_decoder

#: Up-samplings of auxiliary decoders; the planned decoder has nnU-Net's transposed convolutions.
UPSAMPLINGS = ("linear", "nearest", "transposed")


class MultiDecoderUNet(PlannedUNet):
    """Planned U-Net with auxiliary decoders on the same encoder, for training.

    ``encoder`` and ``decoder`` are the planned network, with its state-dict keys and starting weights, and alone run
    at prediction.

    Args:
        input_channels: channels of the input.
        num_classes: segmentation heads.
        base: dotted path of the planned class.
        upsampling: of each auxiliary decoder: "linear" or "nearest" after a 1-voxel convolution, or "transposed".
        deep_supervision: lower resolutions' logits too; ``decoder.deep_supervision`` switches all decoders.
        **base_kwargs: the planned class's own arguments.

    Raises:
        UserError: no such up-sampling.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        base: str,
        upsampling: Sequence[str] = ("linear",),
        deep_supervision: bool = False,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(input_channels, num_classes, base, deep_supervision, **base_kwargs)
        for mode in upsampling:
            if mode not in UPSAMPLINGS:
                raise UserError("an auxiliary decoder needs a known up-sampling", repr(mode), ", ".join(UPSAMPLINGS))
        ndim, base_class = convert_conv_op_to_dim(self.encoder.conv_op), locate_base(base)
        self.auxiliary = nn.ModuleList()
        with torch.random.fork_rng(devices=[]):  # they must not move the random numbers of what follows
            for mode in upsampling:
                decoder = base_class(1, num_classes=num_classes, deep_supervision=False, **base_kwargs).decoder
                del decoder.encoder  # a planned decoder keeps its encoder as a part and does not run it
                if mode != "transposed":
                    decoder.transpconvs = nn.ModuleList(upsampling_like(up, mode, ndim) for up in decoder.transpconvs)
                self.auxiliary.append(decoder)

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        features: bool = False,
        every: bool = False,
        gradients: Mapping[int, Tensor] | None = None,
    ) -> Any:
        """Return the planned decoder's output, or a list of the outputs of all decoders or some of them, it first.

        Args:
            x: input, (b, channels, *spatial).
            t: as in `PlannedUNet`.
            features: as in `PlannedUNet`, of each decoder that runs: a list of pairs (output, features).
            every: run all decoders.
            gradients: run these decoders, 0 the planned one, and multiply the gradient that each sends to the encoder
                by its factor, a scalar tensor; a negative one reverses it.
        """
        if not every and gradients is None:
            return super().forward(x, t, features)
        skips, deep = self._encode(x, None), self.decoder.deep_supervision
        decoders = (self.decoder, *self.auxiliary)
        if gradients is None:
            pairs = [run_decoder(decoder, skips, None, deep) for decoder in decoders]
        else:
            pairs = [
                run_decoder(decoders[i], [_ScaleGradient.apply(skip, factor) for skip in skips], None, deep)
                for i, factor in gradients.items()
            ]
        return pairs if features else [output for output, _ in pairs]


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a constant factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradient * factor.to(gradient.dtype), None


def upsampling_like(transposed: nn.Module, mode: str, ndim: int) -> nn.Module:
    """Return an up-sampling of the same channels and stride as a transposed convolution."""
    conv = (nn.Conv2d if ndim == 2 else nn.Conv3d)(
        transposed.in_channels, transposed.out_channels, 1, bias=transposed.bias is not None
    )
    scale = tuple(float(s) for s in transposed.stride)
    named = ("bilinear" if ndim == 2 else "trilinear") if mode == "linear" else mode
    return nn.Sequential(conv, nn.Upsample(scale_factor=scale, mode=named))
