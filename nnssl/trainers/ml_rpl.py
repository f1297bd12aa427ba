"""ML-RPL: of two decoders the more certain one teaches, voxel by voxel, weighted by how reliable it looks.

Su et al., "Mutual Learning with Reliable Pseudo Label for Semi-supervised Medical Image Segmentation", Medical Image
Analysis 2024. Decoders i != j with logits z, probabilities p, entropies H and last features f; per image, q_c is the
mean of f_j over the voxels that j gives to class c::

    m = [H_i > H_j]        w = mean_c (1 - (cos(f_j, q_c) - p_jc)^2)
    L = sum_i L_seg(z_i, y) + lambda sum_(i != j) sum(m w CE(z_i, argmax p_j)) / sum(m)     the latter on labeled too

m, w and the pseudo-label carry no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nnssl.losses.precision import fp32
from nnssl.networks.planned import extend_planned
from nnssl.trainers.base import SemiSupervisedTrainer, full_resolution
from nnssl.trainers.settings import Settings, UnsupervisedSettings, option
from nnssl.trainers.stepping import LossGroup
from nnssl.training.label_space import LabelSpace
from nnssl.training.pseudo_labels import pseudo_label_loss

NETWORK = "nnssl.networks.multi_decoder.MultiDecoderUNet"


@dataclass(frozen=True)
class MLRPLSettings(UnsupervisedSettings):
    """Settings of mutual learning with reliable pseudo-labels."""

    unsupervised_weight: float = option(1.0, "lambda: weight of the mutual learning at the end", low=0)
    double_softmax: bool = option(False, "take probabilities for logits in the mutual cross-entropy (the code: true)")


@fp32
@torch.no_grad()
def reliability(features: Tensor, probs: Tensor, members: Tensor) -> Tensor:
    """Return w (b, 1, ...): how well a decoder's probabilities agree with the likeness to its own class means.

    ``mean_c (1 - (cos(f, q_c) - p_c)^2)``, at least 0; a class without members has a cosine of 0.

    Args:
        features: f (b, F, ...).
        probs: p (b, C, ...).
        members: which voxels make q_c, 0 or 1 (b, C, ...).
    """
    f, chosen = features.flatten(2), members.flatten(2).to(features.dtype)
    means = functional.normalize(torch.einsum("bfn,bcn->bcf", f, chosen), dim=2)  # the direction of a sum is its mean's
    cosine = torch.einsum("bcf,bfn->bcn", means, functional.normalize(f, dim=1)).view_as(probs)
    # cosines of leaky ReLUs may be negative, and a negative weight would teach the opposite
    return (1 - (cosine - probs).square()).mean(1, keepdim=True).clamp_min(0)


@dataclass
class Decoded:
    """What one decoder says: logits z, probabilities p, hard label, features f."""

    logits: Tensor
    probs: Tensor
    hard: Tensor
    features: Tensor


def mutual_loss(space: LabelSpace, learner: Decoded, peer: Decoded, valid: Tensor, double_softmax: bool) -> Tensor:
    """Return ``sum(m w CE(z_i, argmax p_j)) / sum(m)`` of a learner i and its peer j; 0 where m is nowhere.

    Args:
        space: what the heads mean; regions take the binary cross-entropy.
        learner: i.
        peer: j.
        valid: bool (b, 1, ...), True where a voxel counts.
        double_softmax: the cross-entropy takes p_i for logits, as the authors' code.
    """
    learns = (space.entropy(learner.probs.detach()) > space.entropy(peer.probs.detach())) & valid
    weight = reliability(peer.features.detach(), peer.probs.detach(), space.one_hot(peer.hard).bool() & valid)
    logits = learner.probs if double_softmax else learner.logits
    return pseudo_label_loss(space, logits, peer.hard, learns, weight)


class MLRPLTrainer(SemiSupervisedTrainer):
    """One encoder, two decoders; the first predicts."""

    settings_class = MLRPLSettings
    settings: MLRPLSettings

    @classmethod
    def adapt_plans(cls, plans: dict, configuration: str, settings: Settings) -> None:
        """Give the planned network its second decoder."""
        extend_planned(plans["configurations"][configuration], NETWORK, upsampling=["nearest"])

    def branches(self, x: Tensor) -> dict[str, Tensor]:
        outputs = [full_resolution(output) for output in self.network(x, every=True)]
        return {f"decoder_{i}": logits for i, logits in enumerate(outputs, 1)}

    def compute_losses(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield both supervised losses and the labeled part of the mutual learning, then its unlabeled part."""
        weight = self.settings.unsupervised(self.fraction)
        unlabeled = batch.get("unlabeled")
        if unlabeled is None or self.settings.unsupervised_weight == 0:  # in a warm-up both learn before they teach
            loss = self.supervised_loss(self.network(batch["data"]), batch["target"])
            yield LossGroup({"loss_supervised": loss}, step=("network",))
            return
        labeled, space = batch["data"], self.label_space
        share = len(labeled) / (len(labeled) + len(unlabeled["strong"]))
        pairs = self.network(labeled, every=True, features=True)
        terms = {f"loss_supervised_{i}": self.supervised_loss(o, batch["target"]) for i, (o, _) in enumerate(pairs, 1)}
        valid = space.valid(full_resolution(batch["target"]))
        terms["loss_mutual_labeled"] = weight * share * self._mutual(self._decode(pairs), valid)
        del pairs  # the graph must be gone before the unlabeled pass
        yield LossGroup(terms)
        decoded = self._decode(self.network(unlabeled["strong"], every=True, features=True))
        for i, d in enumerate(decoded, 1):
            self.watch_foreground(f"decoder_{i}", d.hard, unlabeled["valid"])
        loss = weight * (1 - share) * self._mutual(decoded, unlabeled["valid"])
        yield LossGroup({"loss_mutual_unlabeled": loss}, step=("network",))

    def _decode(self, pairs: list[tuple[Any, Tensor]]) -> list[Decoded]:
        result = []
        for output, features in pairs:
            logits = full_resolution(output)
            probs = self.label_space.probs(logits)
            result.append(Decoded(logits, probs, self.label_space.harden(probs.detach()), features))
        return result

    def _mutual(self, decoded: list[Decoded], valid: Tensor) -> Tensor:
        one, two = decoded
        pairs = ((one, two), (two, one))
        losses = [mutual_loss(self.label_space, a, b, valid, self.settings.double_softmax) for a, b in pairs]
        return losses[0] + losses[1]
