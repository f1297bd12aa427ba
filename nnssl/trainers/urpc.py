"""URPC: the predictions of several resolutions must agree, and less so where they are uncertain.

Luo et al., "Efficient Semi-supervised Gross Target Volume of Nasopharyngeal Carcinoma Segmentation via Uncertainty
Rectified Pyramid Consistency", MICCAI 2021 (arXiv 2012.07042). One network, one pass, no teacher: the heads of deep
supervision are the pyramid, see :func:`nnssl.losses.pyramid.pyramid_consistency` for the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.nn import functional

from nnssl.errors import UserError
from nnssl.losses.pyramid import pyramid_consistency
from nnssl.networks.planned import extend_planned
from nnssl.trainers.one_network import OneNetworkMethod
from nnssl.trainers.settings import Settings, UnsupervisedSettings, option
from nnssl.trainers.stepping import LossGroup

NETWORK = "nnssl.networks.pyramid.PyramidUNet"
#: Heads whose supervised loss weighs less are not trained (nnU-Net: 0 for the lowest, 1e-6 on several GPUs).
TRAINED = 1e-3


@dataclass(frozen=True)
class URPCSettings(UnsupervisedSettings):
    """Settings of uncertainty rectified pyramid consistency."""

    unsupervised_weight: float = option(0.1, "lambda: weight of the pyramid consistency at the end", low=0)
    scales: int = option(4, "resolutions that must agree, from the highest down, as far as they are trained", low=2)
    head_dropout: float = option(0.3, "rate of dropout before each head, on unlabeled crops", low=0, high=0.9)
    head_noise: float = option(0.3, "features there are multiplied by 1 + U(-this, this)", low=0, high=1)

    def validate(self) -> None:
        super().validate()
        if not self.deep_supervision:
            rule = "the pyramid's heads are those of deep supervision"
            raise UserError(rule, "deep_supervision=False", "True", "leave deep_supervision on")


class URPCTrainer(OneNetworkMethod):
    """One network whose resolutions agree; the full resolution predicts."""

    settings_class = URPCSettings
    settings: URPCSettings

    @classmethod
    def adapt_plans(cls, plans: dict, configuration: str, settings: Settings) -> None:
        """Let the planned network return its pyramid."""
        extend_planned(plans["configurations"][configuration], NETWORK)

    def build_method(self) -> None:
        trained = sum(weight > TRAINED for weight in getattr(self.loss, "weight_factors", (1.0,)))
        self.scales = min(self.settings.scales, trained)
        if self.scales < 2 and self.settings.unsupervised_weight > 0:
            rule = "the pyramid needs two trained resolutions"
            raise UserError(rule, f"{trained} in this plan", "2 or more", "plan a larger patch")
        if self.scales < self.settings.scales:
            self.warn(f"the pyramid has {self.scales} resolutions: this plan trains no more heads")

    def unsupervised_losses(self, unlabeled: dict[str, Any]) -> LossGroup:
        """Return L_u on the strong view; all resolutions are brought to the full one."""
        s, space, x = self.settings, self.label_space, unlabeled["strong"]
        levels = self.network(x, pyramid=True, dropout=s.head_dropout, noise=s.head_noise)[: self.scales]
        mode = "bilinear" if x.ndim == 4 else "trilinear"
        logits = [levels[0], *(functional.interpolate(z, x.shape[2:], mode=mode) for z in levels[1:])]
        probs = [space.probs(z) for z in logits]
        self.watch_foreground("network", space.harden(probs[0].detach()), unlabeled["valid"])
        return LossGroup({"loss_pyramid": pyramid_consistency(probs, unlabeled["valid"], space.regions)})
