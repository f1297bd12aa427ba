"""The step that methods share which train the predicting network alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.trainers.settings import UnsupervisedSettings
from nnssl.trainers.stepping import LossGroup


class OneNetworkMethod(SemiSupervisedTrainer):
    """Supervised loss on the labeled batch, then weighted terms on the unlabeled one, one optimizer step for both.

    The two have a backward pass each, so that only one graph is in memory. With weight 0, or without unlabeled cases,
    the step is the supervised control's.
    """

    settings_class = UnsupervisedSettings
    settings: UnsupervisedSettings

    def unsupervised_losses(self, unlabeled: dict[str, Any]) -> LossGroup:
        """Return the method's terms on an unlabeled batch, without the weight of the schedule."""
        raise NotImplementedError(f"{type(self).__name__} must implement unsupervised_losses")

    def compute_losses(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield the supervised loss, then the method's terms."""
        weight = self.settings.unsupervised(self.fraction)
        unlabeled = batch.get("unlabeled")
        alone = unlabeled is None or weight == 0
        loss = self.supervised_loss(self.network(batch["data"]), batch["target"])
        yield LossGroup({"loss_supervised": loss}, step=("network",) if alone else ())
        if unlabeled is None or alone:
            return
        group = self.unsupervised_losses(unlabeled)
        group.terms = {name: weight * term for name, term in group.terms.items()}
        group.step = ("network",)
        yield group
