"""SS-Net: predictions must stand the worst small change of the image, and features must lie near class prototypes.

Wu et al., "Exploring Smoothness and Class-Separation for Semi-supervised Medical Image Segmentation", MICCAI 2022
(arXiv 2203.01324); the prototypes are those of Alonso et al., ICCV 2021 (arXiv 2104.13415)::

    L = L_seg(p, y) + lambda [ L_adv + omega (C_l + C_u) ]
    L_adv = D(f(x + r), f(x)),  r = epsilon g / |g|     g: gradient of D(f(x + xi d), f(x)) by a random unit d
    C = 1/C sum_c mean_(i in c, j) w_i v_j (1 - cos(e_i, m_cj))

D is a Dice distance, e_i the embeddings of a class's voxels (by label, or by prediction on unlabeled crops), m_cj the
class's prototypes; w and v are learned weights with a mean of 1. Background has no prototypes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nnssl.losses.consistency import dice_distance
from nnssl.losses.prototype import weighted_cosine_distance
from nnssl.networks.planned import extend_planned
from nnssl.networks.projection import SeparationHeads
from nnssl.trainers.base import SemiSupervisedTrainer, full_resolution
from nnssl.trainers.settings import Settings, UnsupervisedSettings, option
from nnssl.trainers.stepping import LossGroup, unwrap
from nnssl.training.adversarial import virtual_adversarial_perturbation
from nnssl.training.memory_bank import MemoryBank, choose_per_class

NETWORK = "nnssl.networks.planned.PlannedUNet"


@dataclass(frozen=True)
class SSNetSettings(UnsupervisedSettings):
    """Settings of smoothness and class separation."""

    unsupervised_weight: float = option(1.0, "lambda: weight of both terms at the end", low=0)
    separation_weight: float = option(0.1, "omega: weight of the class separation beside the smoothness", low=0)
    epsilon: float = option(10.0, "norm of the adversarial change of a crop (the authors: 10 in 3D, 6 in 2D)", low=1e-6)
    xi: float = option(10.0, "norm of the change at which its direction is found", low=1e-6)
    prototypes: int = option(32, "prototypes a class", low=1)
    dim: int = option(32, "dimension of the embeddings", low=1)
    voxels: int = option(4096, "voxels drawn of each class and batch for the class separation", low=1)
    prototype_weights: bool = option(True, "learned weights of prototypes too (the code cancels them: false)")


class SSNetTrainer(SemiSupervisedTrainer):
    """One network; heads on its last features and the prototypes of the classes take part in training alone."""

    settings_class = SSNetSettings
    settings: SSNetSettings
    supports_regions = False

    @classmethod
    def adapt_plans(cls, plans: dict, configuration: str, settings: Settings) -> None:
        """Let the planned network return its last features."""
        extend_planned(plans["configurations"][configuration], NETWORK)

    def build_method(self) -> None:
        s, channels = self.settings, unwrap(self.network).feature_channels
        # not compiled: the number of voxels changes from step to step
        heads = SeparationHeads(channels, s.dim, self.label_space.num_heads - 1)
        self.heads = self.add_partner("heads", heads, compiled=False)
        self.memory = MemoryBank(s.prototypes, 1, self.device)  # one slot a class
        self.modules["prototypes"] = self.memory
        if s.separation_weight == 0 and s.unsupervised_weight > 0:
            unused = "prototypes, dim, voxels and prototype_weights have no effect"
            self.warn(f"separation_weight=0: heads and prototypes rest; {unused}")

    def compute_losses(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield the supervised loss, and of each batch first the class separation, then the smoothness."""
        weight, omega = self.settings.unsupervised(self.fraction), self.settings.separation_weight
        unlabeled = batch.get("unlabeled")
        if unlabeled is None or weight == 0:
            loss = self.supervised_loss(self.network(batch["data"]), batch["target"])
            yield LossGroup({"loss_supervised": loss}, step=("network",))
            return
        images, truth = batch["data"], full_resolution(batch["target"])
        share = len(images) / (len(images) + len(unlabeled["strong"]))
        valid = self.label_space.valid(truth)
        output, features = self.network(images, features=True)
        probs = self.label_space.probs(full_resolution(output)).detach()
        terms = {"loss_supervised": self.supervised_loss(output, batch["target"])}
        if omega > 0:
            self._remember(features, truth, valid & (self.label_space.harden(probs) == truth) & (truth > 0))
            terms["loss_separation_labeled"] = weight * omega * self._separation(features, truth, valid)
        del output, features  # each graph must be gone before the next pass
        yield LossGroup(terms)
        yield LossGroup({"loss_smooth_labeled": weight * share * self._smoothness(images, probs, valid)})
        with torch.set_grad_enabled(omega > 0):  # without C this pass only gives f(x)
            output, features = self.network(unlabeled["strong"], features=True)
        torch.clear_autocast_cache()  # half copies of weights made without gradient must not serve the next pass
        probs = self.label_space.probs(full_resolution(output)).detach()
        hard, valid = self.label_space.harden(probs), unlabeled["valid"]
        self.watch_foreground("network", hard, valid)
        terms = {}
        if omega > 0:
            terms["loss_separation_unlabeled"] = weight * omega * self._separation(features, hard, valid)
        del output, features
        if terms:
            yield LossGroup(terms)
        terms = {"loss_smooth_unlabeled": weight * (1 - share) * self._smoothness(unlabeled["strong"], probs, valid)}
        yield LossGroup(terms, step=("network", "heads"))

    def _smoothness(self, x: Tensor, probs: Tensor, valid: Tensor) -> Tensor:
        """Return L_adv of images x whose prediction is ``probs``."""

        def distance(changed: Tensor) -> Tensor:
            return dice_distance(self.label_space.probs(full_resolution(self.network(changed))), probs, valid)

        return distance(x + virtual_adversarial_perturbation(x, distance, self.settings.xi, self.settings.epsilon))

    @torch.no_grad()
    def _remember(self, features: Tensor, truth: Tensor, correct: Tensor) -> None:
        """Make the projections of correctly classified voxels that a class's selector ranks highest its prototypes."""
        classes, prototypes, labels = [], [], []
        for c, voxels in self._voxels(features, truth, correct).items():
            projected = self.heads.projector(voxels)
            best = projected[self.heads.embedding_selectors[c - 1](projected).argsort(descending=True)]
            best = best[: self.settings.prototypes]
            classes.append(str(c))
            prototypes.append(best)
            labels.append(torch.full((len(best),), c, device=best.device))
        self.memory.push(classes, prototypes, labels, all_ranks=self.is_ddp)

    def _separation(self, features: Tensor, label: Tensor, valid: Tensor) -> Tensor:
        """Return C of a batch: the sum over classes with prototypes, divided by the number of classes."""
        prototypes = self.memory.draw(range(self.label_space.num_heads), self.settings.prototypes)
        total = features.flatten()[0].float() * 0
        for c, voxels in self._voxels(features, label, valid).items():
            if c not in prototypes:
                continue
            embeddings = self.heads.predictor(self.heads.projector(voxels))
            m = functional.normalize(prototypes[c], dim=1)
            w = self.heads.embedding_selectors[c - 1](embeddings.detach())
            v = self.heads.prototype_selectors[c - 1](m) if self.settings.prototype_weights else None
            total = total + weighted_cosine_distance(embeddings, m, w, v)
        return total / self.label_space.num_heads

    def _voxels(self, features: Tensor, label: Tensor, eligible: Tensor) -> dict[int, Tensor]:
        """Return features (n, F) of at most ``voxels`` random eligible voxels of each class."""
        chosen = choose_per_class(label.flatten().long(), eligible.flatten(), self.settings.voxels)
        rows = features.movedim(1, -1).flatten(0, -2)
        return {c: rows[index] for c, index in chosen.items()}
