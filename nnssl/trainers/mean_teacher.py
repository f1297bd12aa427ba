"""Mean teacher: a student that must agree with the moving average of itself.

Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017 (arXiv 1703.01780).

Deviations from the paper: views come from nnU-Net's augmentation (the teacher sees the weak view, the student the
strong one of the same crop) instead of independent noise; the consistency weight is ramped over the whole run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nnssl.losses.consistency import probability_mse
from nnssl.trainers.one_network import TeacherMethod, TeacherSettings
from nnssl.trainers.settings import option
from nnssl.trainers.stepping import LossGroup


@dataclass(frozen=True)
class MeanTeacherSettings(TeacherSettings):
    """Settings of the mean teacher."""

    unsupervised_weight: float = option(10.0, "weight of the consistency cost at the end of its schedule", low=0)


class MeanTeacherTrainer(TeacherMethod):
    """Student and EMA teacher; the student predicts.

    ``J = mean (p_student(strong) - p_teacher(weak))^2`` over valid voxels and classes (the paper's consistency cost).
    """

    settings_class = MeanTeacherSettings
    settings: MeanTeacherSettings

    def unsupervised_losses(self, unlabeled: dict[str, Any]) -> LossGroup:
        """Return the consistency cost J."""
        target = self.teach(unlabeled["weak"])
        probs = self.label_space.probs(self.predict_logits(unlabeled["strong"]))
        self.watch_foreground("teacher", self.label_space.harden(target), unlabeled["valid"])
        return LossGroup({"loss_consistency": probability_mse(probs, target, unlabeled["valid"])})
