"""CLD: classes weigh by their rarity, and voxels of classes that are well known are dropped from the cross terms.

Lin et al., "Calibrating Label Distribution for Class-Imbalanced Barely-Supervised Knee Segmentation", MICCAI 2022
(arXiv 2205.03644), on cross pseudo supervision. n_c counts labeled voxels, C_c is the mean probability that a network
gives labeled voxels of class c for it::

    W_c = (max n / n_c) ^ (1/3)                         in both supervised losses and in both cross terms
    s_c = ((1 - C_c) / max_k (1 - C_k)) ^ gamma         a voxel that a network itself calls c is kept with this chance
    L_u = mean over voxels of kept W_y CE(p, y)         y the peer's label; dropped voxels count in the mean
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nnssl.errors import UserError
from nnssl.trainers.settings import option
from nnssl.trainers.two_networks import TEACHER, ByName, ClassWeightedMethod, ClassWeightSettings
from nnssl.training.class_statistics import ClassCounts, ConfidenceBank, absent_as_rarest, sampling_rate
from nnssl.training.pseudo_labels import pseudo_label_loss


@dataclass(frozen=True)
class CLDSettings(ClassWeightSettings):
    """Settings of CLD."""

    rarity: float = option(1 / 3, "exponent of the class weights W; 0 weighs all classes alike", low=0)
    gamma: float = option(0.5, "exponent of the sampling rate s; 0 keeps every voxel", low=0)
    bank_decay: float = option(0.999, "decay of the moving average of the confidence", low=0, high=0.999999)
    bank_every: int = option(
        8, "iterations that each of its values is taken over (the authors: 2; DHC's version: 8)", low=1
    )

    def validate(self) -> None:
        super().validate()
        if self.rarity == self.gamma == 0:
            raise UserError("CLD must weigh or sample classes", "rarity=0 gamma=0", None, "train CPSTrainer instead")


class CLDTrainer(ClassWeightedMethod):
    """Two peers with rarity weights and a bank of confidences each; the first predicts."""

    settings_class = CLDSettings
    settings: CLDSettings

    def build_method(self) -> None:
        super().build_method()
        s, classes = self.settings, self.label_space.num_heads
        self.counts = self.modules["counts"] = ClassCounts(classes, self.device)
        self.banks = {name: ConfidenceBank(classes, s.bank_decay, s.bank_every, self.device) for name in TEACHER}
        self.modules |= {f"confidence_{name}": bank for name, bank in self.banks.items()}

    def class_weights(self, name: str) -> Tensor:
        counts = absent_as_rarest(self.counts.value.float())
        return (counts.max() / counts) ** self.settings.rarity

    def observe_labels(self, name: str, logits: Tensor, target: Tensor) -> None:
        space = self.label_space
        if name == "network":  # both see the same labels
            self.counts.update(self.count(target, space.valid(target)))
        self.banks[name].update(space.probs(logits), space.one_hot(target), self.is_ddp)

    def observe(self, logits: ByName, hard: ByName, valid: Tensor) -> ByName:
        self.kept = {name: self._draw(name, label) & valid for name, label in hard.items()}
        return {"kept": self.kept["network"].sum() / valid.sum().clamp_min(1)}

    def _draw(self, name: str, label: Tensor) -> Tensor:
        rate = sampling_rate(self.banks[name].value, self.settings.gamma)
        return torch.rand(label.shape, device=label.device) < rate[label]

    def cross_loss(self, name: str, logits: ByName, hard: ByName, valid: Tensor) -> Tensor:
        label = hard[TEACHER[name]]
        weight = self.class_weights(name)[label] * self.kept[name]
        return pseudo_label_loss(self.label_space, logits[name], label, valid, weight)
