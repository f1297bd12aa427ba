"""DHC: two peers with different biases, one weighs classes by how hard they are, one by how rare they are.

Wang and Li, "DHC: Dual-debiased Heterogeneous Co-training Framework for Class-imbalanced Semi-supervised Medical Image
Segmentation", MICCAI 2023 (arXiv 2307.11960). Both weights stand in the supervised losses (cross-entropy and Dice) and
in the cross-entropy with the peer's label. N_c counts the peer's pseudo-labels of class c, C is the number of classes::

    network  DiffDW   w_c = C d_c (1 - lambda_c) / max,   d_c = (du_c / dl_c) ^ alpha    see training/difficulty.py
    peer     DistDW   w_c <- beta w_c + (1 - beta) C log(max N / N_c) / max log(...)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nnssl.trainers.settings import option
from nnssl.trainers.two_networks import ByName, ClassWeightedMethod, ClassWeightSettings
from nnssl.training.class_statistics import ClassWeights
from nnssl.training.difficulty import MEMORIES, Difficulty, count_voxels


@dataclass(frozen=True)
class DHCSettings(ClassWeightSettings):
    """Settings of DHC."""

    beta: float = option(0.99, "decay of the moving average of DistDW", low=0, high=0.999999)
    alpha: float = option(0.2, "exponent of the difficulty d in DiffDW", low=0)
    window: int = option(50, "tau: iterations that DiffDW remembers", low=1)
    memory: str = option(
        "sum", "how: a sum over the last tau (the paper), or a moving average (the code)", choices=MEMORIES
    )
    hold_absent: bool = option(True, "DiffDW leaves absent classes alone (the code: an absent class has Dice 1/2)")


def distribution_weights(counts: Tensor) -> Tensor:
    """Return ``C log(max N / N_c) / max_c log(max N / N_c)`` (C,) of counts N (C,) above 0; 1 if all are equal."""
    rarity = (counts.max() / counts).log()
    spread = rarity.max()
    return torch.where(spread > 0, len(counts) * rarity / spread.clamp_min(1e-8), torch.ones_like(rarity))


class DHCTrainer(ClassWeightedMethod):
    """Two peers, debiased by difficulty and by distribution; the first predicts."""

    settings_class = DHCSettings
    settings: DHCSettings

    def build_method(self) -> None:
        super().build_method()
        s, classes = self.settings, self.label_space.num_heads
        self.difficulty = Difficulty(classes, s.alpha, s.window, "max", s.memory, s.hold_absent, self.device)
        self.distribution = ClassWeights(classes, distribution_weights, s.beta, self.device)
        self.modules |= {"difficulty": self.difficulty, "distribution": self.distribution}

    def class_weights(self, name: str) -> Tensor:
        return self.difficulty.weights() if name == "network" else self.distribution.value

    def observe_labels(self, name: str, logits: Tensor, target: Tensor) -> None:
        space, valid = self.label_space, self.label_space.valid(target)
        if name == "peer":
            if self.distribution.waits():
                self.distribution.start(self.count(target, valid))
            return
        predicted = space.one_hot(space.harden(logits)) * valid
        self.difficulty.update(count_voxels(predicted, space.one_hot(target), self.is_ddp))

    def observe(self, logits: ByName, hard: ByName, valid: Tensor) -> ByName:
        self.distribution.update(self.count(hard["peer"], valid))
        extremes: ByName = {}
        for name in hard:
            weights = self.class_weights(name)
            extremes |= {f"weight_max_{name}": weights.max(), f"weight_min_{name}": weights.min()}
        return extremes
