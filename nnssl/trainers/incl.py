"""INCL: what classes look like must be the same on labeled and on unlabeled crops, whoever looks.

Zhu et al., "Inherent Consistent Learning for Accurate Semi-supervised Medical Image Segmentation", MIDL 2023. Two
modules of class queries attend to resolutions s of the decoder and return maps of the classes: SSPA (m, the Supervised
Semantic Proxy Adaptor), which labels teach, and USCL (n, the Unsupervised Semantic Consistent Learner), which looks at
every resolution with what SSPA's queries became there on labeled crops, their mean over the batch::

    L = L_seg(p, y) + mean_s [CE + Dice](m_s, y) + lambda mean_s [ Dice(n_s, p) + omega MSE(n_s, m_s) ]

The last two are on unlabeled crops, with p and m constants there; all maps are probabilities. SSPA learns from them by
its queries alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnssl.errors import UserError
from nnssl.losses.consistency import dice_distance, probability_mse
from nnssl.losses.segmentation import soft_cross_entropy
from nnssl.networks.planned import extend_planned
from nnssl.networks.semantic_attention import SemanticAttention, pool, scale_grids
from nnssl.trainers.base import SemiSupervisedTrainer, full_resolution
from nnssl.trainers.settings import Settings, UnsupervisedSettings, option
from nnssl.trainers.stepping import LossGroup, unwrap

NETWORK = "nnssl.networks.pyramid.PyramidUNet"


@dataclass(frozen=True)
class INCLSettings(UnsupervisedSettings):
    """Settings of inherent consistent learning."""

    unsupervised_weight: float = option(1.0, "lambda: weight of both terms on unlabeled crops at the end", low=0)
    consistency_weight: float = option(50.0, "omega: weight of the squared difference of both modules' maps", low=0)
    scales: int = option(3, "resolutions of the decoder that the modules read", low=1)
    tokens: int = option(1024, "most positions of a resolution, higher ones are averaged over cells", low=1)
    dim: int = option(64, "dimension of the class queries", low=1)
    heads: int = option(4, "heads of the attention", low=1)

    def validate(self) -> None:
        super().validate()
        if self.dim % self.heads:
            rule = "the queries must divide evenly over the heads"
            raise UserError(rule, f"dim={self.dim} heads={self.heads}", "dim a multiple of heads", "change one of them")


class INCLTrainer(SemiSupervisedTrainer):
    """One network; the modules on its decoder take part in training alone."""

    settings_class = INCLSettings
    settings: INCLSettings

    @classmethod
    def adapt_plans(cls, plans: dict, configuration: str, settings: Settings) -> None:
        """Let the planned network return the features of its resolutions."""
        extend_planned(plans["configurations"][configuration], NETWORK)

    def build_method(self) -> None:
        s, network = self.settings, unwrap(self.network)
        strides = network.encoder.strides
        grids = scale_grids(self.configuration_manager.patch_size, strides, s.scales, s.tokens)
        channels = dict(enumerate(network.encoder.output_channels[-2::-1]))  # a decoder's stage has its skip's width
        for name in ("sspa", "uscl"):
            classes = self.label_space.num_heads
            module = SemanticAttention(channels, grids, classes, s.dim, s.heads, taught=name == "uscl")
            self.add_partner(name, module)
        if len(grids) < s.scales and s.unsupervised_weight > 0:
            self.warn(f"the modules read {len(grids)} resolutions: the decoder of this plan has no more")

    def read(self, scales: Sequence[Tensor]) -> list[Tensor]:
        """Return SSPA's maps (b, C, *grid) of the decoder's features, logits."""
        return self.trained_network("sspa")(scales)[0]

    def learn(self, scales: Sequence[Tensor], labeled: Mapping[int, Tensor]) -> list[Tensor]:
        """Return USCL's maps (b, C, *grid) of the decoder's features, logits; its queries are SSPA's on labeled crops.

        Args:
            scales: features of unlabeled crops.
            labeled: those of labeled crops, by index of the decoder's stage; the resolutions that are read suffice.
        """
        _, queries = self.trained_network("sspa")(labeled)
        return self.trained_network("uscl")(scales, [q.mean(0) for q in queries])[0]

    def compute_losses(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield what labels teach the network and SSPA, then what SSPA and the network teach USCL and one another."""
        s, space, target = self.settings, self.label_space, batch["target"]
        unlabeled = batch.get("unlabeled")
        if unlabeled is None or s.unsupervised_weight == 0:
            loss = self.supervised_loss(self.network(batch["data"]), target)
            yield LossGroup({"loss_supervised": loss}, step=("network",))
            return
        weight, truth = s.unsupervised(self.fraction), full_resolution(target)
        output, scales = self.network(batch["data"], scales=True)
        terms = {"loss_supervised": self.supervised_loss(output, target)}
        terms["loss_proxy"] = self._proxy_loss(self.read(scales), space.one_hot(truth), space.valid(truth))
        # constants, since their graph goes with the first backward pass
        labeled = {stage: scales[stage].detach() for stage in unwrap(self.trained_network("sspa")).stages}
        del output, scales  # the graph must be gone before the unlabeled pass
        # not the weight of this step: in a warm-up SSPA learns from labels before it teaches
        yield LossGroup(terms, step=() if weight > 0 else ("network", "sspa"))
        if weight == 0:
            return
        output, scales = self.network(unlabeled["strong"], scales=True)
        probs, valid = space.probs(full_resolution(output).detach()), unlabeled["valid"]
        self.watch_foreground("network", space.harden(probs), valid)
        with torch.no_grad():
            priors = self.read(scales)
        learned = self.learn(scales, labeled)
        similar, alike = [], []
        for m, n in zip(map(space.probs, priors), map(space.probs, learned), strict=True):
            shares, counted = to_cells(probs, valid, n.shape[2:])
            similar.append(dice_distance(n, shares, counted))
            alike.append(probability_mse(n, m, counted))
        terms = {
            "loss_learner": weight * torch.stack(similar).mean(),
            "loss_semantic": weight * s.consistency_weight * torch.stack(alike).mean(),
        }
        del output, scales, labeled, priors, learned, similar, alike
        yield LossGroup(terms, step=("network", "sspa", "uscl"))

    def _proxy_loss(self, maps: Sequence[Tensor], channels: Tensor, valid: Tensor) -> Tensor:
        """Return the mean over resolutions of CE + Dice of maps with labels (b, C, ...)."""
        space, losses = self.label_space, []
        for logits in maps:
            shares, counted = to_cells(channels, valid, logits.shape[2:])
            entropy = soft_cross_entropy(logits, shares, counted, binary=space.regions)
            losses.append(entropy + dice_distance(space.probs(logits), shares, counted))
        return torch.stack(losses).mean()


@torch.no_grad()
def to_cells(channels: Tensor, valid: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the means of channels over the valid voxels of each cell of a grid, and which cells have such voxels.

    Args:
        channels: probabilities or one-hot labels (b, C, ...).
        valid: bool (b, 1, ...), True where a voxel counts.
        grid: cells along each axis.

    Returns:
        ((b, C, *grid), bool (b, 1, *grid)).
    """
    share = pool(valid.float(), grid)
    return pool(channels * valid, grid) / share.clamp_min(1e-8), share > 0
