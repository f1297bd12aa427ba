"""Cross pseudo supervision: two networks of different initialization teach each other with hard pseudo-labels.

Chen et al., "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision", CVPR 2021 (arXiv 2106.01226).

Deviations from the paper: the term runs over the unlabeled batch alone (as the field's common 2D and 3D code does;
the paper adds the labeled one), and its weight is ramped over the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nnssl.trainers.base import SemiSupervisedTrainer, full_resolution
from nnssl.trainers.settings import UnsupervisedSettings, option
from nnssl.trainers.stepping import LossGroup
from nnssl.training.pseudo_labels import pseudo_label_loss


@dataclass(frozen=True)
class CPSSettings(UnsupervisedSettings):
    """Settings of cross pseudo supervision."""

    unsupervised_weight: float = option(1.0, "weight of both cross terms (the paper's lambda) at the end", low=0)


class CPSTrainer(SemiSupervisedTrainer):
    """Two peers of the planned network; the first predicts.

    ``L = sum_i L_s(f_i) + lambda sum_(i != j) CE(f_i(x_u), argmax f_j(x_u))``, targets detached.
    """

    settings_class = CPSSettings
    settings: CPSSettings

    def build_method(self) -> None:
        peer = self.build_network_architecture(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            self.label_manager.num_segmentation_heads,
            self.enable_deep_supervision,
        )
        self.peer = self.add_partner("peer", peer)

    def branches(self, x: Tensor) -> dict[str, Tensor]:
        return {"network": self.predict_logits(x), "peer": full_resolution(self.peer(x))}

    def compute_losses(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield the supervised losses of both peers, then the cross terms."""
        weight = self.settings.unsupervised(self.fraction)
        unlabeled = batch.get("unlabeled")
        alone = unlabeled is None or weight == 0
        for name in ("network", "peer"):
            loss = self.supervised_loss(self.trained_network(name)(batch["data"]), batch["target"])
            yield LossGroup({f"loss_supervised_{name}": loss}, step=(name,) if alone else ())
        if unlabeled is None or alone:
            return
        space, valid = self.label_space, unlabeled["valid"]
        logits = {n: full_resolution(self.trained_network(n)(unlabeled["strong"])) for n in ("network", "peer")}
        hard = {n: space.harden(space.probs(z)) for n, z in logits.items()}
        for name, label in hard.items():
            self.watch_foreground(name, label, valid)
        terms = {
            "loss_cross_network": weight * pseudo_label_loss(space, logits["network"], hard["peer"], valid),
            "loss_cross_peer": weight * pseudo_label_loss(space, logits["peer"], hard["network"], valid),
        }
        agreement = (hard["network"] == hard["peer"])[valid.expand_as(hard["peer"])].float().mean()
        yield LossGroup(terms, step=("network", "peer"), log={"agreement": agreement})
