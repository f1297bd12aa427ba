"""CAML: two networks agree with each other, and on which labeled voxels an unlabeled one resembles.

Gao et al., "Correlation-Aware Mutual Learning for Semi-supervised Medical Image Segmentation", MICCAI 2023 (arXiv
2307.06312). The vanilla network v predicts; the auxiliary one a up-samples linearly, and its attention joins labeled
and unlabeled crops. For probabilities p, sharpened s(p), and correlations c with a memory of labeled features::

    L = L_seg(p_v, y) + L_seg(p_a, y) + lambda [ sum_(i != j) mean (p_i - s(p_j))^2 + omega mean -sum c_a ln c_v ]

Correlations are those of unlabeled voxels where both networks agree. Memory: voxels that both classify correctly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from nnssl.losses.consistency import mutual_consistency
from nnssl.losses.contrastive import correlation_consistency
from nnssl.networks.planned import extend_planned
from nnssl.networks.projection import ProjectionHead
from nnssl.trainers.base import SemiSupervisedTrainer, full_resolution
from nnssl.trainers.settings import Settings, UnsupervisedSettings, option
from nnssl.trainers.stepping import LossGroup, unwrap
from nnssl.training.memory_bank import MemoryBank, choose_per_class

NETWORK, AUXILIARY = "nnssl.networks.planned.PlannedUNet", "nnssl.networks.cross_sample.CrossSampleUNet"


@dataclass(frozen=True)
class CAMLSettings(UnsupervisedSettings):
    """Settings of correlation-aware mutual learning."""

    unsupervised_weight: float = option(1.0, "lambda: weight of both consistencies at the end", low=0)
    correlation_weight: float = option(0.05, "omega: weight of the correlations beside the mutual consistency", low=0)
    temperature: float = option(0.1, "T of the sharpening", low=1e-3)
    tau: float = option(0.1, "temperature of the correlations", low=1e-3)
    memory: int = option(256, "labeled features drawn of each class", low=1)
    bank_capacity: int = option(2048, "features kept of each case and class", low=1)
    voxels: int = option(12800, "unlabeled voxels of each class, the most certain ones", low=1)
    dim: int = option(32, "dimension of the embeddings", low=1)
    detach_targets: bool = option(True, "targets of both consistencies carry no gradient (the code: false)")


class CAMLTrainer(SemiSupervisedTrainer):
    """Two networks; the vanilla one predicts."""

    settings_class = CAMLSettings
    settings: CAMLSettings
    supports_regions = False

    @classmethod
    def adapt_plans(cls, plans: dict, configuration: str, settings: Settings) -> None:
        """Let the planned network return its last features."""
        extend_planned(plans["configurations"][configuration], NETWORK)

    def build_method(self) -> None:
        s, config = self.settings, self.configuration_manager
        peer = get_network_from_plans(
            AUXILIARY,
            config.network_arch_init_kwargs,
            config.network_arch_init_kwargs_req_import,
            self.num_input_channels,
            self.label_space.num_heads,
            deep_supervision=self.enable_deep_supervision,
        )
        self.peer = self.add_partner("peer", peer)
        channels = unwrap(self.network).feature_channels
        heads = nn.ModuleDict(
            {
                f"{part}_{who}": ProjectionHead(size, s.dim)
                for who in "va"
                for part, size in (("project", channels), ("predict", s.dim))
            }
        )
        self.heads = self.add_partner("heads", heads, compiled=False)  # the number of voxels changes
        self.memory = self.modules["memory"] = MemoryBank(s.bank_capacity, device=self.device)
        if s.correlation_weight == 0 and s.unsupervised_weight > 0:
            unused = "tau, memory, bank_capacity, voxels and dim have no effect"
            self.warn(f"correlation_weight=0: heads and memory rest; {unused}")

    def branches(self, x: Tensor) -> dict[str, Tensor]:
        return {"network": self.predict_logits(x), "peer": full_resolution(self.peer(x))}

    def compute_losses(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield all terms at once: attention joins labeled and unlabeled crops, consistency the networks."""
        s, weight = self.settings, self.settings.unsupervised(self.fraction)
        unlabeled = batch.get("unlabeled")
        if unlabeled is None or s.unsupervised_weight == 0:  # in a warm-up the peer learns before it teaches
            loss = self.supervised_loss(self.network(batch["data"]), batch["target"])
            yield LossGroup({"loss_supervised": loss}, step=("network",))
            return
        count, truth = len(batch["data"]), full_resolution(batch["target"])
        images = torch.cat([batch["data"], unlabeled["strong"]])
        valid = torch.cat([self.label_space.valid(truth), unlabeled["valid"]])
        terms, probs, features = {}, [], []
        for name in ("network", "peer"):
            output, last = self.trained_network(name)(images, features=True)
            labeled = [o[:count] for o in output] if isinstance(output, list) else output[:count]
            terms[f"loss_supervised_{name}"] = self.supervised_loss(labeled, batch["target"])
            probs.append(self.label_space.probs(full_resolution(output)))
            features.append(last)
        hard = [self.label_space.harden(p.detach()) for p in probs]
        for name, label in zip(("network", "peer"), hard, strict=True):
            self.watch_foreground(name, label[count:], unlabeled["valid"])
        terms["loss_mutual"] = weight * mutual_consistency(probs, s.temperature, valid, detach=s.detach_targets)
        if s.correlation_weight > 0:
            correct = (hard[0][:count] == truth) & (hard[1][:count] == truth) & valid[:count]
            self._remember([f[:count] for f in features], truth, correct, batch["keys"])
            agree = (hard[0] == hard[1])[count:] & valid[count:]
            certainty = probs[0].detach().amax(1, keepdim=True)[count:]
            loss = self._correlate([f[count:] for f in features], hard[0][count:], agree, certainty)
            terms["loss_correlation"] = weight * s.correlation_weight * loss
        yield LossGroup(terms, step=("network", "peer", "heads"))

    @torch.no_grad()
    def _remember(self, features: list[Tensor], truth: Tensor, correct: Tensor, cases: list[str]) -> None:
        """Store the mean projection of both networks of correctly classified voxels, one slot a case."""
        stored, projected, classes = [], [], []
        for case in dict.fromkeys(cases):
            items = [i for i, key in enumerate(cases) if key == case]
            labels = truth[items].flatten().long()
            chosen = choose_per_class(labels, correct[items].flatten(), self.settings.bank_capacity)
            if chosen:
                index = torch.cat(list(chosen.values()))
                v, a = (
                    self.heads[f"project_{who}"](rows(f[items])[index]) for who, f in zip("va", features, strict=True)
                )
                stored.append(case)
                projected.append((v + a) / 2)
                classes.append(labels[index])
        self.memory.push(stored, projected, classes, all_ranks=self.is_ddp)

    def _correlate(self, features: list[Tensor], label: Tensor, agree: Tensor, certainty: Tensor) -> Tensor:
        """Return the consistency of correlations over the most certain voxels of each class where both agree."""
        chosen = []
        for c in range(self.label_space.num_heads):
            own = ((label == c) & agree).flatten().nonzero()[:, 0]
            chosen.append(own[certainty.flatten()[own].argsort(descending=True)[: self.settings.voxels]])
        index = torch.cat(chosen)
        v, a = (
            self.heads[f"predict_{who}"](self.heads[f"project_{who}"](rows(f)[index]))
            for who, f in zip("va", features, strict=True)
        )
        bank = self.memory.draw(range(self.label_space.num_heads), self.settings.memory)
        return correlation_consistency(v, a, bank, self.settings.tau, self.settings.detach_targets)


def rows(features: Tensor) -> Tensor:
    """Return a feature map (b, F, ...) as one row a voxel (n, F)."""
    return features.movedim(1, -1).flatten(0, -2)
