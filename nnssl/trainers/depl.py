"""DePL on two peers: pseudo-labels are made as if a network had no favorite classes.

Wang et al., "Debiased Learning from Naturally Imbalanced Pseudo-Labels", CVPR 2022 (arXiv 2201.01490), in the form in
which DHC (arXiv 2307.11960) compares it: cross pseudo supervision. q is a moving average of a network's mean softmax on
unlabeled crops, z its logits; y and its probability come from the teaching peer::

    p~ = softmax(z - tau log q)          y = argmax p~          kept where max p~ >= threshold
    L_u = 1/N sum_voxels kept CE(z_i + tau log q_j, y_j)        rejected voxels count in N, not in the sum

The second line's shift is the adaptive margin: a learner must beat it for the classes that its teacher favors less. p~
has the q of the steps before, the margin that of this step, as in DHC's repository.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nnssl.losses.precision import fp32
from nnssl.trainers.settings import UnsupervisedSettings, option
from nnssl.trainers.two_networks import TEACHER, ByName, TwoNetworkMethod
from nnssl.training.class_statistics import ClassState
from nnssl.training.pseudo_labels import pseudo_label_loss


@dataclass(frozen=True)
class DePLSettings(UnsupervisedSettings):
    """Settings of DePL."""

    unsupervised_weight: float = option(0.1, "lambda: weight of both cross terms at the end of its schedule", low=0)
    tau: float = option(0.5, "how much of the bias is taken off (the authors: 0.4; DHC's version: 1)", low=0)
    threshold: float = option(
        0.95, "least debiased probability that is kept (the authors: 0.8; DHC's version: 0.9)", low=0, high=1
    )
    prior_decay: float = option(
        0.999, "decay of the moving average q (the authors: also 0.99; DHC's version: 0.99)", low=0, high=0.999999
    )
    margin: bool = option(True, "add the margin to the learner's logits (DHC's version computes and drops it)")


class Prior(ClassState):
    """Moving average q (C,) of the mean prediction; uniform at first."""

    NAMES = ("value",)

    def __init__(self, classes: int, decay: float, device: torch.device | str = "cpu") -> None:
        self.decay, self.value = decay, torch.full((classes,), 1 / classes, device=device)

    @torch.no_grad()
    def update(self, probs: Tensor, valid: Tensor, all_ranks: bool = False) -> None:
        """Take in probabilities (b, C, ...) where ``valid`` (b, 1, ...); without a valid voxel nothing changes."""
        axes = [0, *range(2, probs.ndim)]
        summed = torch.cat([(probs * valid).sum(axes), valid.sum().to(probs)[None]])
        if all_ranks:
            dist.all_reduce(summed)
        mean = summed[:-1] / summed[-1].clamp_min(1)
        self.value = torch.where(summed[-1] > 0, self.decay * self.value + (1 - self.decay) * mean, self.value)

    def log(self, like: Tensor) -> Tensor:
        """Return log q in a shape that adds to logits (b, C, ...)."""
        tiny = torch.finfo(self.value.dtype).tiny  # a class that is never predicted has a finite margin
        return self.value.clamp_min(tiny).log().view(1, -1, *[1] * (like.ndim - 2))


@fp32
def shifted(logits: Tensor, shift: Tensor) -> Tensor:
    """Return ``logits + shift`` in single precision."""
    return logits + shift


class DePLTrainer(TwoNetworkMethod):
    """Two peers with debiased, confident pseudo-labels and adaptive margins; the first predicts."""

    supports_regions = False
    settings_class = DePLSettings
    settings: DePLSettings

    def build_method(self) -> None:
        super().build_method()
        s = self.settings
        self.priors = {name: Prior(self.label_space.num_heads, s.prior_decay, self.device) for name in TEACHER}
        self.modules |= {f"prior_{name}": prior for name, prior in self.priors.items()}

    def debiased(self, name: str, logits: Tensor) -> Tensor:
        """Return p~ (b, C, ...) of a network's logits."""
        return self.label_space.probs(shifted(logits, -self.settings.tau * self.priors[name].log(logits)))

    def pseudo_label(self, name: str, logits: Tensor) -> Tensor:
        return self.label_space.harden(self.debiased(name, logits))

    def observe(self, logits: ByName, hard: ByName, valid: Tensor) -> ByName:
        space, s = self.label_space, self.settings
        self.kept = {n: valid & (space.confidence(self.debiased(n, z)) >= s.threshold) for n, z in logits.items()}
        for name, z in logits.items():  # after the labels, which see the average of the steps before
            self.priors[name].update(space.probs(z), valid, self.is_ddp)
        return {"kept": self.kept["peer"].sum() / valid.sum().clamp_min(1)}

    def cross_loss(self, name: str, logits: ByName, hard: ByName, valid: Tensor) -> Tensor:
        z, teacher = logits[name], TEACHER[name]
        if self.settings.margin:
            z = shifted(z, self.settings.tau * self.priors[teacher].log(z))
        return pseudo_label_loss(self.label_space, z, hard[teacher], valid, self.kept[teacher].float())
