"""FixMatch: confident pseudo-labels of the weak view teach the strong view of the same crop.

Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", NeurIPS 2020
(arXiv 2001.07685). Per voxel, for q = p(weak view)::

    l_u = 1/N sum_voxels 1(max q >= tau) H(argmax q, p(strong view))      rejected voxels count in N, not in the sum

SSL4MIS's variant, on which several medical methods build, is a setting: its rule rescales the scores of a voxel, so
that nearly all pass, and makes the others background. The preset ``fixmatch_ssl4mis`` holds the rest of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnssl.errors import UserError
from nnssl.losses.complementary import weighted_complementary_loss
from nnssl.trainers.base import full_resolution
from nnssl.trainers.one_network import OneNetworkMethod
from nnssl.trainers.settings import UnsupervisedSettings, option
from nnssl.trainers.stepping import LossGroup
from nnssl.training.pseudo_labels import pseudo_label_loss, relative_label


@dataclass(frozen=True)
class FixMatchSettings(UnsupervisedSettings):
    """Settings of FixMatch."""

    unsupervised_weight: float = option(1.0, "lambda_u: weight of the term on unlabeled crops", low=0)
    unsupervised_schedule: str = option(
        "constant", "its course over the run: constant (the paper), linear, ramp, warmup1 to warmup99"
    )
    pl_rule: str = option(
        "confident",
        "pseudo-label: kept where its probability reaches the threshold, or SSL4MIS's rule on rescaled scores",
        choices=("confident", "ssl4mis"),
    )
    threshold: float = option(0.95, "tau: least probability that is kept (pl_rule=ssl4mis: 0.8)", low=0, high=1)
    average: str = option(
        "all",
        "voxels the loss is averaged over: all valid ones (the paper), or those kept (pl_rule=ssl4mis keeps all)",
        choices=("all", "kept"),
    )
    pl_dice: float = option(0.0, "weight of the Dice against pseudo-labels (SSL4MIS: 1)", low=0)
    complementary: bool = option(False, "SSL4MIS's loss on the class a voxel is surely not")

    def validate(self) -> None:
        super().validate()
        if self.pl_rule == "ssl4mis" and self.threshold == 1:
            raise UserError("SSL4MIS's rule needs a threshold below 1", "threshold=1.0", "[0, 1)", "the code has 0.8")


class FixMatchTrainer(OneNetworkMethod):
    """One network: its confident labels of the weak view are the target of the strong view."""

    settings_class = FixMatchSettings
    settings: FixMatchSettings

    def build_method(self) -> None:
        s = self.settings
        if self.label_space.regions and (s.pl_rule == "ssl4mis" or s.complementary):
            rule = "SSL4MIS's parts of FixMatch compare exclusive classes"
            raise UserError(rule, "a data set with regions", "pl_rule=confident complementary=false")

    def pseudo_label(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hard label of probabilities (b, C, ...) in a target's layout, and bool (b, 1, ...): kept."""
        space, s = self.label_space, self.settings
        if s.pl_rule == "ssl4mis":
            label = relative_label(probs, s.threshold)
            return label, torch.ones_like(label, dtype=torch.bool)
        return space.harden(probs), space.confidence(probs) >= s.threshold

    def unsupervised_losses(self, unlabeled: dict[str, Any]) -> LossGroup:
        """Return l_u (eq. 4 of the paper), and SSL4MIS's complementary term where it is switched on."""
        space, s, valid = self.label_space, self.settings, unlabeled["valid"]
        with torch.no_grad():
            q = space.probs(full_resolution(self.network(unlabeled["weak"])))
        torch.clear_autocast_cache()  # half copies of weights made without gradient must not serve the next pass
        label, kept = self.pseudo_label(q)
        self.watch_foreground("pseudo_label", label, valid & kept)
        logits = self.predict_logits(unlabeled["strong"])
        if s.average == "all":
            loss = pseudo_label_loss(space, logits, label, valid, kept.float(), s.pl_dice)
        else:
            loss = pseudo_label_loss(space, logits, label, valid & kept, dice_weight=s.pl_dice)
        terms = {"loss_weak_to_strong": loss}
        if s.complementary:
            terms["loss_complementary"] = weighted_complementary_loss(space.probs(logits), q, valid)
        share = (kept & valid).sum() / valid.sum().clamp_min(1)
        return LossGroup(terms, log={"kept": share})
