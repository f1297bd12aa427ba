"""Mean teacher: a student that must agree with the moving average of itself.

Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017 (arXiv 1703.01780).

Deviations from the paper: views come from nnU-Net's augmentation (the teacher sees the weak view, the student the
strong one of the same crop) instead of independent noise; the consistency weight is ramped over the whole run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnssl.losses.consistency import probability_mse
from nnssl.trainers.base import full_resolution
from nnssl.trainers.one_network import OneNetworkMethod
from nnssl.trainers.settings import UnsupervisedSettings, option
from nnssl.trainers.stepping import LossGroup


@dataclass(frozen=True)
class MeanTeacherSettings(UnsupervisedSettings):
    """Settings of the mean teacher."""

    unsupervised_weight: float = option(10.0, "weight of the consistency cost at the end of its schedule", low=0)
    ema_decay: float = option(0.99, "decay of the teacher", low=0, high=0.999999)


class MeanTeacherTrainer(OneNetworkMethod):
    """Student and EMA teacher; the student predicts.

    ``J = mean (p_student(strong) - p_teacher(weak))^2`` over valid voxels and classes (the paper's consistency cost).
    """

    settings_class = MeanTeacherSettings
    settings: MeanTeacherSettings

    def build_method(self) -> None:
        self.teacher = self.add_teacher("teacher", "network", self.settings.ema_decay)

    def branches(self, x: Tensor) -> dict[str, Tensor]:
        return {"student": self.predict_logits(x), "teacher": full_resolution(self.teacher(x))}

    def unsupervised_losses(self, unlabeled: dict[str, Any]) -> LossGroup:
        """Return the consistency cost J."""
        with torch.no_grad():
            target = self.label_space.probs(full_resolution(self.teacher(unlabeled["weak"])))
        probs = self.label_space.probs(self.predict_logits(unlabeled["strong"]))
        self.watch_foreground("teacher", self.label_space.harden(target), unlabeled["valid"])
        return LossGroup({"loss_consistency": probability_mse(probs, target, unlabeled["valid"])})
