"""What methods share that train two peers which teach each other: one step, and weights of classes in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nnssl.losses.class_weighted import voxel_weights
from nnssl.trainers.base import SemiSupervisedTrainer, full_resolution
from nnssl.trainers.settings import UnsupervisedSettings, option
from nnssl.trainers.stepping import LossGroup
from nnssl.trainers.weighted_supervision import class_weighted_supervision
from nnssl.training.class_statistics import ClassWeights, count_classes
from nnssl.training.pseudo_labels import pseudo_label_loss

#: Each network, and the peer that teaches it.
TEACHER = {"network": "peer", "peer": "network"}

#: By name of a network.
ByName = dict[str, Tensor]


class TwoNetworkMethod(SemiSupervisedTrainer):
    """Two peers of the planned network with different initialization; the first predicts.

    ``L = sum_i L_s(f_i) + lambda sum_(i != j) L_u(f_i(x_u), y_j)``, y_j the pseudo-label of the peer, a constant. The
    supervised losses and the cross terms have a backward pass each, so that few graphs are in memory at once. With
    weight 0, or without unlabeled cases, the first network follows the supervised control.
    """

    settings_class = UnsupervisedSettings
    settings: UnsupervisedSettings

    def build_method(self) -> None:
        peer = self.build_network_architecture(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            self.label_manager.num_segmentation_heads,
            self.enable_deep_supervision,
        )
        self.peer = self.add_partner("peer", peer)

    def branches(self, x: Tensor) -> ByName:
        return {"network": self.predict_logits(x), "peer": full_resolution(self.peer(x))}

    def labeled_loss(self, name: str, output: Any, target: Any) -> Tensor:
        """Return L_s of a network from its output and the target (lists under deep supervision).

        Not asked where the method is off (no unlabeled case, or ``unsupervised_weight=0``).
        """
        return self.supervised_loss(output, target)

    def pseudo_label(self, name: str, logits: Tensor) -> Tensor:
        """Return the hard label (b, 1, ...) that a network gives its peer, from its detached logits (b, C, ...)."""
        return self.label_space.harden(self.label_space.probs(logits))

    def observe(self, logits: ByName, hard: ByName, valid: Tensor) -> ByName:
        """Take in detached logits and pseudo-labels before the cross terms are formed, and return what to log."""
        return {}

    def cross_loss(self, name: str, logits: ByName, hard: ByName, valid: Tensor) -> Tensor:
        """Return L_u of the network ``name``, without lambda; the logits of its peer carry a gradient too."""
        return pseudo_label_loss(self.label_space, logits[name], hard[TEACHER[name]], valid)

    def compute_losses(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield the supervised losses of both peers, then the cross terms."""
        weight = self.settings.unsupervised(self.fraction)
        unlabeled = batch.get("unlabeled")
        alone = unlabeled is None or weight == 0
        off = unlabeled is None or self.settings.unsupervised_weight == 0
        for name in TEACHER:
            output = self.trained_network(name)(batch["data"])
            labeled_loss = self.supervised_loss if off else partial(self.labeled_loss, name)
            loss = labeled_loss(output, batch["target"])
            del output  # the graph must be gone before the next network runs
            yield LossGroup({f"loss_supervised_{name}": loss}, step=(name,) if alone else ())
            del loss
        if unlabeled is None or alone:
            return
        valid = unlabeled["valid"]
        logits = {name: full_resolution(self.trained_network(name)(unlabeled["strong"])) for name in TEACHER}
        constant = {name: z.detach() for name, z in logits.items()}
        with torch.no_grad():
            hard = {name: self.pseudo_label(name, z) for name, z in constant.items()}
            log = self.observe(constant, hard, valid)
        for name, label in hard.items():
            self.watch_foreground(name, label, valid)
        terms = {f"loss_cross_{name}": weight * self.cross_loss(name, logits, hard, valid) for name in TEACHER}
        alike = (hard["network"] == hard["peer"]) & valid
        agreement = alike.sum() / valid.expand_as(alike).sum().clamp_min(1)
        yield LossGroup(terms, step=("network", "peer"), log={"agreement": agreement, **log})


@dataclass(frozen=True)
class ClassWeightSettings(UnsupervisedSettings):
    """Settings of peers whose losses weigh the classes."""

    unsupervised_weight: float = option(0.1, "lambda: weight of both cross terms at the end of its schedule", low=0)
    weigh_labels: bool = option(True, "the supervised loss weighs the classes too")


class ClassWeightedMethod(TwoNetworkMethod):
    """Peers with weights W of classes: ``L_u = sum W_y CE / sum W_y`` over valid voxels, y the peer's label."""

    supports_regions = False
    settings_class = ClassWeightSettings
    settings: ClassWeightSettings

    def class_weights(self, name: str) -> Tensor:
        """Return W (C,), at least 0, of the losses of a network."""
        raise NotImplementedError(f"{type(self).__name__} must implement class_weights")

    def observe_labels(self, name: str, logits: Tensor, target: Tensor) -> None:
        """Take in a network's detached logits (b, C, ...) on the labeled batch, and its labels (b, 1, ...)."""

    def labeled_loss(self, name: str, output: Any, target: Any) -> Tensor:
        with torch.no_grad():
            self.observe_labels(name, full_resolution(output).detach(), full_resolution(target))
        if not self.settings.weigh_labels:
            return self.supervised_loss(output, target)
        return class_weighted_supervision(self, output, target, self.class_weights(name))

    def cross_loss(self, name: str, logits: ByName, hard: ByName, valid: Tensor) -> Tensor:
        label = hard[TEACHER[name]]
        weight = voxel_weights(self.class_weights(name), label, valid)
        return pseudo_label_loss(self.label_space, logits[name], label, valid, weight)

    def count(self, label: Tensor, valid: Tensor) -> Tensor:
        """Return the valid voxels of each class (C,), over all processes."""
        return count_classes(label, self.label_space.num_heads, valid, self.is_ddp)


@dataclass(frozen=True)
class CountWeightSettings(ClassWeightSettings):
    """Settings of peers whose classes weigh by how often they are predicted."""

    weigh_labels: bool = option(False, "the supervised loss weighs the classes too (DHC's version: true)")
    class_decay: float = option(0.99, "decay of the moving average of the weights", low=0, high=0.999999)


class CountWeightedMethod(ClassWeightedMethod):
    """Peers whose weights follow their own pseudo-labels on unlabeled crops, from the labels' at the first step."""

    settings_class = CountWeightSettings
    settings: CountWeightSettings

    def rule(self, counts: Tensor) -> Tensor:
        """Return weights (C,) of a batch's counts (C,), all above 0."""
        raise NotImplementedError(f"{type(self).__name__} must implement rule")

    def build_method(self) -> None:
        super().build_method()
        decay, classes = self.settings.class_decay, self.label_space.num_heads
        self.weights = {n: ClassWeights(classes, self.rule, decay, self.device) for n in TEACHER}
        self.modules |= {f"weights_{name}": weights for name, weights in self.weights.items()}

    def class_weights(self, name: str) -> Tensor:
        return self.weights[name].value

    def observe_labels(self, name: str, logits: Tensor, target: Tensor) -> None:
        if self.weights[name].waits():
            self.weights[name].start(self.count(target, self.label_space.valid(target)))

    def observe(self, logits: ByName, hard: ByName, valid: Tensor) -> ByName:
        for name, weights in self.weights.items():
            weights.update(self.count(hard[name], valid))
        value = self.class_weights("network")
        return {"weight_max": value.max(), "weight_min": value.min()}
