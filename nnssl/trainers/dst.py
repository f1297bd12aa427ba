"""DST: pseudo-labels train a decoder of their own, and the encoder must not let a decoder go wrong on them.

Chen et al., "Debiased Self-Training for Semi-Supervised Learning", NeurIPS 2022 (arXiv 2202.07136). On an encoder psi
stand the predicting decoder h, which learns from labels alone and makes pseudo-labels y^ of weak views; h_pseudo, which
learns from these on strong views; and h_worst, which is as wrong on them as it can be while right on labels::

    min_(psi, h, h_pseudo)  L_l(psi, h) + L_u(psi, h_pseudo) + rho (worst(psi, h_worst) reversed)
    min_(h_worst)           eta CE(h_worst(x_l), y) - mean ln(1 - p_worst(y^ | x_u))

The last line is the paper's ``max L_u - L_l`` with a bounded L_u; its gradient reaches psi with the factor -rho.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnssl.losses.precision import fp32
from nnssl.losses.segmentation import cross_entropy
from nnssl.networks.planned import extend_planned
from nnssl.trainers.base import SemiSupervisedTrainer, full_resolution
from nnssl.trainers.settings import Settings, UnsupervisedSettings, option
from nnssl.trainers.stepping import LossGroup
from nnssl.training.pseudo_labels import pseudo_label_loss

NETWORK = "nnssl.networks.multi_decoder.MultiDecoderUNet"
#: Decoders of the network by their index.
MAIN, PSEUDO, WORST = 0, 1, 2


@dataclass(frozen=True)
class DSTSettings(UnsupervisedSettings):
    """Settings of debiased self-training."""

    unsupervised_weight: float = option(1.0, "weight of the terms of h_pseudo and h_worst", low=0)
    threshold: float = option(
        0.95, "least probability of a pseudo-label that h_pseudo learns (the authors: 0.7 to 0.95)", low=0, high=1
    )
    eta: float = option(2.0, "weight of the labels in h_worst's loss (the authors: 1 to 4, often 2)", low=0)
    reversal: float = option(0.1, "rho at the end of the run, from 0: factor of h_worst's reversed gradient", low=0)


@fp32
def wrong_on(logits: Tensor, label: Tensor, valid: Tensor) -> Tensor:
    """Return ``- mean ln(1 - p_y)`` over valid voxels, small where a decoder contradicts the label y.

    Args:
        logits: (b, C, ...).
        label: integer map (b, 1, ...) in 0..C-1.
        valid: bool (b, 1, ...), True where a voxel counts; without one the loss is 0.
    """
    own = torch.zeros_like(logits, dtype=torch.bool).scatter(1, label, True)
    others = logits.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)  # exact where 1 - p_y underflows
    per_voxel = logits.logsumexp(1, keepdim=True) - others
    return per_voxel.where(valid, per_voxel.new_zeros(())).sum() / valid.sum().clamp_min(1)


class DSTTrainer(SemiSupervisedTrainer):
    """One encoder, three decoders of one form; the one that learns from labels alone predicts."""

    supports_regions = False
    settings_class = DSTSettings
    settings: DSTSettings

    @classmethod
    def adapt_plans(cls, plans: dict, configuration: str, settings: Settings) -> None:
        """Give the planned network the decoders h_pseudo and h_worst."""
        upsampling = ["transposed", "transposed"]
        extend_planned(plans["configurations"][configuration], NETWORK, upsampling=upsampling)

    def build_method(self) -> None:
        self.worst = (WORST,) if self.settings.reversal > 0 else ()
        if not self.worst and self.settings.unsupervised_weight > 0:
            self.warn("reversal=0: nothing of h_worst would reach the encoder, so it rests and eta has no effect")

    def branches(self, x: Tensor) -> dict[str, Tensor]:
        return {
            name: full_resolution(z)
            for name, z in zip(("network", "pseudo"), self.decode(x, MAIN, PSEUDO), strict=True)
        }

    def decode(self, x: Tensor, *decoders: int) -> list[Any]:
        """Return outputs of decoders; h_worst sends the encoder a reversed gradient."""
        rho = torch.as_tensor(self.settings.reversal * self.fraction, device=x.device)
        one = torch.ones_like(rho)
        return self.network(x, gradients={i: -rho if i == WORST else one for i in decoders})

    def compute_losses(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield what labels teach h and h_worst, then what pseudo-labels teach h_pseudo and h_worst."""
        weight = self.settings.unsupervised(self.fraction)
        unlabeled, target = batch.get("unlabeled"), batch["target"]
        if unlabeled is None or weight == 0:
            loss = self.supervised_loss(self.network(batch["data"]), target)
            yield LossGroup({"loss_supervised": loss}, step=("network",))
            return
        s, space, truth = self.settings, self.label_space, full_resolution(target)
        main, *worst = self.decode(batch["data"], MAIN, *self.worst)
        terms = {"loss_supervised": self.supervised_loss(main, target)}
        if worst:
            right = cross_entropy(full_resolution(worst[0]), truth, space.valid(truth))
            terms["loss_worst_labeled"] = weight * s.eta * right
            del right
        del main, worst  # the graph must be gone before the unlabeled pass
        yield LossGroup(terms)
        with torch.no_grad():
            q = space.probs(self.predict_logits(unlabeled["weak"]))
        torch.clear_autocast_cache()  # half copies of weights made without gradient must not serve the next pass
        label, kept, valid = space.harden(q), space.confidence(q) >= s.threshold, unlabeled["valid"]
        self.watch_foreground("network", label, valid)
        pseudo, *worst = (full_resolution(z) for z in self.decode(unlabeled["strong"], PSEUDO, *self.worst))
        self.watch_foreground("pseudo", space.harden(pseudo.detach()), valid)
        terms = {"loss_pseudo_label": weight * pseudo_label_loss(space, pseudo, label, valid, kept.float())}
        if worst:
            terms["loss_worst_unlabeled"] = weight * wrong_on(worst[0], label, valid)
        yield LossGroup(terms, step=("network",), log={"kept": (kept & valid).sum() / valid.sum().clamp_min(1)})
