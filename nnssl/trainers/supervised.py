"""The control of every comparison: labeled cases only, everything else as in the semi-supervised trainers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.trainers.stepping import LossGroup


class SupervisedTrainer(SemiSupervisedTrainer):
    """nnU-Net on the labeled cases, with the same batches, optimizer and budget as every method here.

    It differs from nnU-Net's own trainer in the seeded randomness and in the learning rate, which decays per
    iteration instead of per epoch.
    """

    uses_unlabeled = False

    def compute_losses(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield nnU-Net's loss on the labeled batch."""
        loss = self.supervised_loss(self.network(batch["data"]), batch["target"])
        yield LossGroup({"loss_supervised": loss}, step=("network",))
