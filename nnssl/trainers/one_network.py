"""What methods share that train the predicting network alone: one step, and an EMA teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnssl.trainers.base import SemiSupervisedTrainer, full_resolution
from nnssl.trainers.settings import UnsupervisedSettings, option
from nnssl.trainers.stepping import LossGroup


class OneNetworkMethod(SemiSupervisedTrainer):
    """Supervised loss on the labeled batch, then weighted terms on the unlabeled one, one optimizer step for both.

    The two have a backward pass each, so that only one graph is in memory. With weight 0, or without unlabeled cases,
    the step is the supervised control's.
    """

    settings_class = UnsupervisedSettings
    settings: UnsupervisedSettings

    def labeled_loss(self, output: Any, target: Any) -> Tensor:
        """Return the loss of the labeled batch; not asked where the method is off (see ``compute_losses``)."""
        return self.supervised_loss(output, target)

    def unsupervised_losses(self, unlabeled: dict[str, Any]) -> LossGroup:
        """Return the method's terms on an unlabeled batch, without the weight of the schedule."""
        raise NotImplementedError(f"{type(self).__name__} must implement unsupervised_losses")

    def compute_losses(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield the supervised loss, then the method's terms."""
        weight = self.settings.unsupervised(self.fraction)
        unlabeled = batch.get("unlabeled")
        alone = unlabeled is None or weight == 0
        off = unlabeled is None or self.settings.unsupervised_weight == 0
        labeled_loss = self.supervised_loss if off else self.labeled_loss
        loss = labeled_loss(self.network(batch["data"]), batch["target"])
        yield LossGroup({"loss_supervised": loss}, step=("network",) if alone else ())
        if unlabeled is None or alone:
            return
        group = self.unsupervised_losses(unlabeled)
        group.terms = {name: weight * term for name, term in group.terms.items()}
        group.step = ("network",)
        yield group


@dataclass(frozen=True)
class TeacherSettings(UnsupervisedSettings):
    """Settings of methods with an EMA teacher."""

    ema_decay: float = option(0.99, "decay of the teacher", low=0, high=0.999999)


class TeacherMethod(OneNetworkMethod):
    """A student, which is trained and predicts, and the moving average of it, which teaches."""

    settings_class = TeacherSettings
    settings: TeacherSettings

    def build_method(self) -> None:
        self.teacher = self.add_teacher("teacher", "network", self.settings.ema_decay)

    def branches(self, x: Tensor) -> dict[str, Tensor]:
        return {"student": self.predict_logits(x), "teacher": full_resolution(self.teacher(x))}

    @torch.no_grad()
    def teach(self, x: Tensor) -> Tensor:
        """Return the teacher's probabilities (b, C, ...) of images (b, c, ...)."""
        return self.label_space.probs(full_resolution(self.teacher(x)))
