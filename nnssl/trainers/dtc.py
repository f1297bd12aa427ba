"""DTC: the segmentation, and the one that follows from predicted distances to the boundary, must agree.

Luo et al., "Semi-supervised Medical Image Segmentation through Dual-task Consistency", AAAI 2021 (arXiv 2009.04448).
With foreground probabilities p, signed distances z and their truth z*::

    L = L_seg(p, y) + beta mean (z - z*)^2 + lambda mean (sigmoid(-k z) - p)^2      the last over labeled and unlabeled

Both tasks learn from the last term.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nnssl.losses.signed_distance import dual_task_consistency
from nnssl.trainers.base import full_resolution
from nnssl.trainers.distance import DistanceMethod, DistanceSettings
from nnssl.trainers.settings import option
from nnssl.trainers.stepping import LossGroup


@dataclass(frozen=True)
class DTCSettings(DistanceSettings):
    """Settings of dual-task consistency."""

    unsupervised_weight: float = option(1.0, "lambda: weight of the dual-task consistency at the end", low=0)
    sharpness: float = option(1500.0, "k: how steeply distances turn into probabilities", low=1)


class DTCTrainer(DistanceMethod):
    """One network with two tasks; the segmentation predicts."""

    settings_class = DTCSettings
    settings: DTCSettings

    def method_losses(self, batch: dict[str, Any], weight: float) -> Iterator[LossGroup]:
        """Yield the labeled terms with the labeled part of the consistency, then its unlabeled part."""
        k, space, unlabeled = self.settings.sharpness, self.label_space, batch["unlabeled"]
        images, x = batch["data"], unlabeled["strong"]
        share = len(images) / (len(images) + len(x))  # one mean over both batches
        output, p, z = self.both_tasks(images)
        terms = self.labeled_terms(output, z, batch["target"])
        valid = space.valid(full_resolution(batch["target"]))
        terms["loss_dual_labeled"] = weight * share * dual_task_consistency(p, z, k, valid)
        del output, p, z  # the graph must be gone before the unlabeled pass
        yield LossGroup(terms)
        output, p, z = self.both_tasks(x)
        hard = space.harden(space.probs(full_resolution(output).detach()))
        self.watch_foreground("network", hard, unlabeled["valid"])
        loss = weight * (1 - share) * dual_task_consistency(p, z, k, unlabeled["valid"])
        yield LossGroup({"loss_dual_unlabeled": loss}, step=("network", "distance"))
