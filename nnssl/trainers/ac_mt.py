"""Ambiguity-consensus mean teacher: the student follows the teacher on the voxels that are hard, and on those alone.

Xu et al., "Ambiguity-selective Consistency Regularization for Mean-Teacher Semi-supervised Medical Image Segmentation",
Medical Image Analysis 2023 (AC-MT). With a mask m of ambiguous voxels::

    L_c = sum m |f' - f|^2 / sum m

Two of the paper's four ways to find them are here: the entropy of the student's prediction, and the entropy of the
teacher's mean under Monte Carlo dropout (MU). Compare UA-MT, which takes the opposite side of the second one.

The threshold is a share of ln 2, as in the authors' code: a tie of two classes is ambiguous whatever C is. In units of
ln C such a voxel has 0.63 (C = 3), 0.5 (C = 4) or 0.26 (C = 14) and would never be selected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nnssl.errors import UserError
from nnssl.losses.consistency import probability_mse
from nnssl.trainers.one_network import TeacherMethod, TeacherSettings
from nnssl.trainers.settings import option
from nnssl.trainers.stepping import LossGroup
from nnssl.training.mc_dropout import mean_prediction, noisy, require_dropout
from nnssl.training.ramps import sigmoid_ramp


@dataclass(frozen=True)
class ACMTSettings(TeacherSettings):
    """Settings of the ambiguity-consensus mean teacher."""

    unsupervised_weight: float = option(0.1, "weight of the consistency loss at the end of its schedule", low=0)
    ambiguity: str = option(
        "entropy",
        "ambiguous voxels: the student's entropy, or the teacher's under Monte Carlo dropout (needs dropout)",
        choices=("entropy", "dropout"),
    )
    passes: int = option(8, "T: passes of the teacher (needs ambiguity=dropout)", low=2)
    noise: float = option(0.1, "standard deviation of the noise on the teacher's input, cut off at twice that", low=0)
    threshold_start: float = option(
        0.75, "least entropy of an ambiguous voxel at the start, in units of U", low=0, high=1
    )
    threshold_end: float | None = option(
        None, "the same at the end; none = the authors' code's: 0.95 (entropy), 0.9 (dropout)", low=0, high=1
    )
    uncertainty_limit: str = option(
        "published", "U: the authors' ln 2, or ln C (regions: always ln 2)", choices=("published", "classes")
    )

    def validate(self) -> None:
        super().validate()
        if self.last_threshold < self.threshold_start:
            rule = "the threshold must rise over the run"
            raise UserError(rule, f"{self.threshold_start} to {self.last_threshold}", "start <= end")

    @property
    def last_threshold(self) -> float:
        """The threshold at the end of the run, in units of U."""
        if self.threshold_end is not None:
            return self.threshold_end
        return 0.95 if self.ambiguity == "entropy" else 0.9


class ACMTTrainer(TeacherMethod):
    """Student and EMA teacher with a mask of ambiguous voxels; the student predicts."""

    settings_class = ACMTSettings
    settings: ACMTSettings

    def build_method(self) -> None:
        super().build_method()
        s = self.settings
        if s.unsupervised_weight > 0 and s.ambiguity == "dropout":
            require_dropout(self.teacher)  # before the run starts

    def threshold(self) -> float:
        """Return the least entropy of an ambiguous voxel at this step, in nats."""
        s = self.settings
        share = s.threshold_start + (s.last_threshold - s.threshold_start) * sigmoid_ramp(self.fraction)
        return share * (self.label_space.max_entropy if s.uncertainty_limit == "classes" else math.log(2))

    def unsupervised_losses(self, unlabeled: dict[str, Any]) -> LossGroup:
        """Return L_c over the ambiguous voxels."""
        s, space, valid, weak = self.settings, self.label_space, unlabeled["valid"], unlabeled["weak"]
        target = self.teach(noisy(weak, s.noise))
        self.watch_foreground("teacher", space.harden(target), valid)
        probs = space.probs(self.predict_logits(unlabeled["strong"]))
        if s.ambiguity == "entropy":
            judged = probs.detach()
        else:
            judged = mean_prediction(self.teach, self.teacher, weak, s.passes, s.noise)
        ambiguous = valid & (space.entropy(judged) >= self.threshold())
        cost = probability_mse(probs, target, ambiguous)
        return LossGroup({"loss_consistency": cost}, log={"ambiguous": ambiguous.sum() / valid.sum().clamp_min(1)})

    def on_epoch_end(self, means: dict[str, float], branches: dict[str, float | None]) -> None:
        """Warn of an epoch in which nothing was learned from unlabeled crops."""
        if means.get("ambiguous") == 0:
            self.warn("no voxel was ambiguous in this epoch: the consistency is 0; lower the thresholds")
        super().on_epoch_end(means, branches)
