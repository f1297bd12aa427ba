"""What methods share that also predict signed distance maps: the head, its regression, one step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nnssl.losses.signed_distance import distance_regression
from nnssl.networks.distance_head import DistanceHead
from nnssl.networks.planned import extend_planned
from nnssl.trainers.base import SemiSupervisedTrainer, full_resolution
from nnssl.trainers.settings import Settings, UnsupervisedSettings, option
from nnssl.trainers.stepping import LossGroup, unwrap
from nnssl.training.signed_distance import distance_maps, foreground

NETWORK = "nnssl.networks.planned.PlannedUNet"


@dataclass(frozen=True)
class DistanceSettings(UnsupervisedSettings):
    """Settings of methods with a signed-distance head."""

    distance_weight: float = option(0.3, "weight of the signed distances' squared error on labeled crops", low=0)


class DistanceMethod(SemiSupervisedTrainer):
    """A planned network and a signed-distance head on its last features, which predicts nothing at inference.

    The head is a partner, "distance", so that the network and its checkpoint stay the planned ones. With
    ``unsupervised_weight=0``, or without unlabeled cases, the step is the supervised control's and the head rests.
    """

    settings_class = DistanceSettings
    settings: DistanceSettings

    @classmethod
    def adapt_plans(cls, plans: dict, configuration: str, settings: Settings) -> None:
        """Let the planned network return its last features."""
        extend_planned(plans["configurations"][configuration], NETWORK)

    def build_method(self) -> None:
        ndim = len(self.configuration_manager.patch_size)
        heads = self.label_space.num_heads
        self.distances = heads if self.label_space.regions else heads - 1
        head = DistanceHead(unwrap(self.network).feature_channels, self.distances, ndim)
        self.distance_head = self.add_partner("distance", head)
        if self.settings.distance_weight == 0 and self.settings.unsupervised_weight > 0:
            self.warn("distance_weight=0: labels teach the distance head nothing, and so the method nothing of shape")

    def method_losses(self, batch: dict[str, Any], weight: float) -> Iterator[LossGroup]:
        """Yield the groups of a step of the whole method; ``weight`` is the schedule's."""
        raise NotImplementedError(f"{type(self).__name__} must implement method_losses")

    def compute_losses(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield the supervised loss alone where the method is off, else the method's groups."""
        # not the weight of this step: in a warm-up the head learns distances before they are used
        if batch.get("unlabeled") is None or self.settings.unsupervised_weight == 0:
            loss = self.supervised_loss(self.network(batch["data"]), batch["target"])
            yield LossGroup({"loss_supervised": loss}, step=("network",))
            return
        yield from self.method_losses(batch, self.settings.unsupervised(self.fraction))

    def both_tasks(self, x: Tensor) -> tuple[Tensor | list[Tensor], Tensor, Tensor]:
        """Return the network's output, its foreground probabilities (b, K, ...) and the distances (b, K, ...)."""
        output, features = self.network(x, features=True)
        probs = foreground(self.label_space, self.label_space.probs(full_resolution(output)))
        return output, probs, self.distance_head(features)

    def labeled_terms(self, output: Tensor | list[Tensor], z: Tensor, target: Tensor | list[Tensor]) -> dict:
        """Return the supervised loss and the weighted squared error of the distances."""
        truth, known = distance_maps(self.label_space, full_resolution(target))
        regression = self.settings.distance_weight * distance_regression(z, truth, known)
        return {"loss_supervised": self.supervised_loss(output, target), "loss_distance": regression}
