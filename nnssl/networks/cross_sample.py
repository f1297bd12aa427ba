"""The second network of CAML: attention within and across the samples of a batch, for training.

Gao et al., "Correlation-Aware Mutual Learning for Semi-supervised Medical Image Segmentation", MICCAI 2023 (arXiv
2307.06312), on nnU-Net's planned topology.
"""

from __future__ import annotations

from typing import Any

from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim
from torch import Tensor, nn

from nnssl.networks.multi_decoder import upsampling_like
from nnssl.networks.planned import PlannedUNet

#: Most heads of the attention, its dropout, and the widening of its perceptron.
HEADS, DROPOUT, WIDENING = 4, 0.5, 4


class CrossSampleAttention(nn.Module):
    """Transformer layers over the positions of each sample, then over the samples at each position.

    Args:
        channels: of the feature map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        heads = next(n for n in range(HEADS, 0, -1) if channels % n == 0)
        self.intra, self.inter = (
            nn.TransformerEncoderLayer(channels, heads, WIDENING * channels, DROPOUT) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the shape of x (b, channels, ...)."""
        tokens = self.intra(x.flatten(2).permute(2, 0, 1))  # a sequence of positions, for each sample
        tokens = self.inter(tokens.transpose(0, 1))  # a sequence of samples, for each position
        return tokens.transpose(1, 2).reshape(x.shape)


class CrossSampleUNet(PlannedUNet):
    """Planned U-Net with linear up-sampling, and in training cross-sample attention after the stage before the last.

    Args:
        input_channels: channels of the input.
        num_classes: segmentation heads.
        base: dotted path of the planned class.
        deep_supervision: lower resolutions' logits too.
        **base_kwargs: the planned class's own arguments.
    """

    def __init__(
        self, input_channels: int, num_classes: int, base: str, deep_supervision: bool = False, **base_kwargs: Any
    ) -> None:
        super().__init__(input_channels, num_classes, base, deep_supervision, **base_kwargs)
        ndim = convert_conv_op_to_dim(self.encoder.conv_op)
        up = [upsampling_like(transposed, "linear", ndim) for transposed in self.decoder.transpconvs]
        self.decoder.transpconvs = nn.ModuleList(up)
        self.attended = len(self.encoder.stages) - 2
        self.attention = CrossSampleAttention(self.encoder.output_channels[self.attended])

    def _after_stage(self, index: int, x: Tensor) -> Tensor:
        return self.attention(x) if index == self.attended and self.training else super()._after_stage(index, x)
