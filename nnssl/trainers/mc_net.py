"""MC-Net and MC-Net+: decoders that up-sample in different ways must agree where they are unsure.

Wu et al., "Semi-supervised Left Atrium Segmentation with Mutual Consistency Training", MICCAI 2021 (arXiv 2103.02911),
two decoders, and "Mutual Consistency Learning for Semi-supervised Medical Image Segmentation", Medical Image Analysis
2022 (arXiv 2109.09960), three. For the decoders' probabilities p_i and their sharpened form s(p)::

    L = sum_i L_seg(p_i, y) + lambda sum_(i != j) mean (p_i - s(p_j))^2      the second sum over labeled and unlabeled

Sharpened predictions are constants here; in the authors' code they carry a gradient: ``detach_targets=false``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nnssl.losses.consistency import mutual_consistency
from nnssl.networks.planned import extend_planned
from nnssl.trainers.base import SemiSupervisedTrainer, full_resolution
from nnssl.trainers.settings import Settings, UnsupervisedSettings, option
from nnssl.trainers.stepping import LossGroup

NETWORK = "nnssl.networks.multi_decoder.MultiDecoderUNet"
#: Up-sampling of the second and the third decoder; the first has nnU-Net's transposed convolutions.
UPSAMPLING = ("linear", "nearest")


@dataclass(frozen=True)
class MCNetSettings(UnsupervisedSettings):
    """Settings of mutual consistency."""

    unsupervised_weight: float = option(1.0, "lambda: weight of the mutual consistency at the end", low=0)
    decoders: int = option(2, "decoders: 2 is MC-Net, 3 is MC-Net+", choices=(2, 3))
    temperature: float = option(0.1, "T of the sharpening", low=1e-3)
    sharpening: str = option(
        "classes",
        "over all classes, or each class against the rest, the authors' formula for two (regions: always)",
        choices=("classes", "binary"),
    )
    detach_targets: bool = option(True, "sharpened predictions carry no gradient (the code: false)")


class MCNetTrainer(SemiSupervisedTrainer):
    """One encoder, two or three decoders; the first predicts."""

    settings_class = MCNetSettings
    settings: MCNetSettings

    @classmethod
    def adapt_plans(cls, plans: dict, configuration: str, settings: Settings) -> None:
        """Give the planned network its further decoders."""
        assert isinstance(settings, MCNetSettings)  # built by the base from settings_class
        upsampling = list(UPSAMPLING[: settings.decoders - 1])
        extend_planned(plans["configurations"][configuration], NETWORK, upsampling=upsampling)

    def branches(self, x: Tensor) -> dict[str, Tensor]:
        outputs = [full_resolution(output) for output in self.network(x, every=True)]
        return {f"decoder_{i}": logits for i, logits in enumerate(outputs, 1)}

    def compute_losses(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield every decoder's supervised loss and the labeled part of the consistency, then its unlabeled part."""
        weight = self.settings.unsupervised(self.fraction)
        unlabeled = batch.get("unlabeled")
        if unlabeled is None or weight == 0:
            loss = self.supervised_loss(self.network(batch["data"]), batch["target"])
            yield LossGroup({"loss_supervised": loss}, step=("network",))
            return
        labeled, space = batch["data"], self.label_space
        share = len(labeled) / (len(labeled) + len(unlabeled["strong"]))  # one mean over both batches
        outputs = self.network(labeled, every=True)
        terms = {
            f"loss_supervised_{i}": self.supervised_loss(output, batch["target"]) for i, output in enumerate(outputs, 1)
        }
        terms["loss_mutual_labeled"] = weight * share * self._mutual([space.probs(full_resolution(o)) for o in outputs])
        del outputs  # the graph must be gone before the unlabeled pass
        yield LossGroup(terms)
        probs = [space.probs(full_resolution(o)) for o in self.network(unlabeled["strong"], every=True)]
        for i, p in enumerate(probs, 1):
            self.watch_foreground(f"decoder_{i}", space.harden(p.detach()), unlabeled["valid"])
        loss = weight * (1 - share) * self._mutual(probs, unlabeled["valid"])
        yield LossGroup({"loss_mutual_unlabeled": loss}, step=("network",))

    def _mutual(self, probs: list[Tensor], valid: Tensor | None = None) -> Tensor:
        s = self.settings
        binary = self.label_space.regions or s.sharpening == "binary"
        return mutual_consistency(probs, s.temperature, valid, binary, s.detach_targets)
