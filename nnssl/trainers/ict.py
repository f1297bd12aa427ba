"""Interpolation consistency: the student's answer to a mixture is the mixture of the teacher's answers.

Verma et al., "Interpolation Consistency Training for Semi-Supervised Learning", IJCAI 2019 (arXiv 1903.03825).
For unlabeled crops u_j, u_k and one lambda ~ Beta(alpha, alpha) a step::

    L_US = mean (f(Mix_lambda(u_j, u_k)) - Mix_lambda(f'(u_j), f'(u_k)))^2      f' = EMA of f

Deviations from the paper: the second batch is the first one in another order (each crop meets another one), and the
weight is ramped over the whole run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nnssl.losses.consistency import probability_mse
from nnssl.trainers.one_network import TeacherMethod, TeacherSettings
from nnssl.trainers.settings import option
from nnssl.trainers.stepping import LossGroup
from nnssl.training.mixing import draw_mixup, mixup, partners_of


@dataclass(frozen=True)
class ICTSettings(TeacherSettings):
    """Settings of interpolation consistency training."""

    unsupervised_weight: float = option(0.1, "w: weight of the consistency loss at the end of its schedule", low=0)
    alpha: float = option(0.2, "alpha: lambda follows Beta(alpha, alpha)", low=1e-3)


class ICTTrainer(TeacherMethod):
    """Student and EMA teacher on interpolated unlabeled crops; the student predicts."""

    settings_class = ICTSettings
    settings: ICTSettings

    def build_method(self) -> None:
        super().build_method()
        if self.unlabeled_batch_size() < 2:
            self.warn("one unlabeled crop a step has no other to mix with: set unlabeled_batch=2 or more")

    def unsupervised_losses(self, unlabeled: dict[str, Any]) -> LossGroup:
        """Return L_US; a voxel counts where both crops have data."""
        space, u, valid = self.label_space, unlabeled["strong"], unlabeled["valid"]
        other, share = partners_of(len(u)).to(u.device), draw_mixup(self.settings.alpha)
        target = self.teach(u)
        self.watch_foreground("teacher", space.harden(target), valid)
        probs = space.probs(self.predict_logits(mixup(u, u[other], share)))
        cost = probability_mse(probs, mixup(target, target[other], share), valid & valid[other])
        return LossGroup({"loss_consistency": cost})
