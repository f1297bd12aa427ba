"""The planned U-Net as a pyramid: every resolution of the decoder predicts, its features disturbed.

The pyramid prediction network of URPC (Luo et al., MICCAI 2021, arXiv 2012.07042) on nnU-Net's planned topology, whose
deep-supervision heads are the prediction layers. INCL reads the features of its resolutions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nnssl.networks.planned import PlannedUNet, run_decoder


class PyramidUNet(PlannedUNet):
    """Planned U-Net that can also return all its resolutions: features, or logits with disturbances before each head.

    Without these modes it is the planned network: same state-dict keys, starting weights and outputs.
    """

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        features: bool = False,
        pyramid: bool = False,
        dropout: float = 0.0,
        noise: float = 0.0,
        scales: bool = False,
    ) -> Any:
        """Return logits, or nnU-Net's deep-supervision list, or with ``pyramid`` the logits of every resolution.

        Args:
            x: input, (b, channels, *spatial).
            t: as in `PlannedUNet`.
            features: as in `PlannedUNet`.
            pyramid: return a list of logits (b, C, ...), each at its own resolution, full resolution first.
            dropout: rate at which values of the features are dropped before each head of the pyramid.
            noise: they are multiplied by ``1 + U(-noise, noise)``.
            scales: return (output, list of the features of every resolution of the decoder, lowest first).
        """
        if scales:
            found: list[Tensor] = []
            output, _ = run_decoder(
                self.decoder, self._encode(x, None), None, self.decoder.deep_supervision, scales=found
            )
            return output, found
        if not pyramid:
            return super().forward(x, t, features)

        def disturbed(values: Tensor) -> Tensor:
            if noise > 0:
                values = values * (1 + noise * (2 * torch.rand_like(values) - 1))
            return functional.dropout(values, dropout) if dropout > 0 else values

        return run_decoder(self.decoder, self._encode(x, None), None, True, disturbed)[0]
