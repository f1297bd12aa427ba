"""Uncertainty-aware mean teacher: the student follows the teacher where the teacher is sure.

Yu et al., "Uncertainty-aware Self-ensembling Model for Semi-supervised 3D Left Atrium Segmentation", MICCAI 2019
(arXiv 1907.07034). T passes of the teacher under dropout and input noise have the mean mu_c, per voxel::

    u = - sum_c mu_c ln mu_c          L_c = sum 1(u < H) |f' - f|^2 / sum 1(u < H)          H = U_max (3/4 + ramp/4)

The distance is averaged over the C classes and U_max is ln C. The authors' code keeps ln 2 and division by 2 for any
C; for two classes both are the same, for more ln 2 rejects too much: ``uncertainty_limit=published``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nnssl.losses.consistency import probability_mse
from nnssl.trainers.one_network import TeacherMethod, TeacherSettings
from nnssl.trainers.settings import option
from nnssl.trainers.stepping import LossGroup
from nnssl.training.mc_dropout import mean_prediction, require_dropout
from nnssl.training.ramps import sigmoid_ramp


@dataclass(frozen=True)
class UAMTSettings(TeacherSettings):
    """Settings of the uncertainty-aware mean teacher."""

    unsupervised_weight: float = option(0.1, "weight of the consistency loss at the end of its schedule", low=0)
    dropout: float = option(
        0.1, "rate of channel dropout in every block of the planned network; 0 = as planned", low=0, high=0.9
    )
    passes: int = option(8, "T: passes of the teacher that measure its uncertainty", low=2)
    noise: float = option(0.1, "standard deviation of the noise on their input, cut off at twice that", low=0)
    threshold_start: float = option(0.75, "H at the start, in units of U_max; at the end it is U_max", low=0, high=1)
    uncertainty_limit: str = option(
        "classes", "U_max and divisor: ln C and C, or the authors' ln 2 and 2", choices=("classes", "published")
    )


class UAMTTrainer(TeacherMethod):
    """Student and EMA teacher with a mask of certain voxels; the student predicts."""

    settings_class = UAMTSettings
    settings: UAMTSettings

    def build_method(self) -> None:
        super().build_method()
        if self.settings.unsupervised_weight > 0:
            require_dropout(self.teacher)  # before the run starts

    def threshold(self) -> float:
        """Return H at this step, in nats."""
        start = self.settings.threshold_start
        share = start + (1 - start) * sigmoid_ramp(self.fraction)
        return share * (self.label_space.max_entropy if self.settings.uncertainty_limit == "classes" else math.log(2))

    def unsupervised_losses(self, unlabeled: dict[str, Any]) -> LossGroup:
        """Return L_c over the voxels of which the teacher is certain."""
        s, space, valid = self.settings, self.label_space, unlabeled["valid"]
        mean = mean_prediction(self.teach, self.teacher, unlabeled["weak"], s.passes, s.noise)
        certain = valid & (space.entropy(mean) < self.threshold())
        target = self.teach(unlabeled["weak"])
        self.watch_foreground("teacher", space.harden(target), valid)
        cost = probability_mse(space.probs(self.predict_logits(unlabeled["strong"])), target, certain)
        if s.uncertainty_limit == "published":
            cost = cost * space.num_heads / 2
        return LossGroup({"loss_consistency": cost}, log={"certain": certain.sum() / valid.sum().clamp_min(1)})
