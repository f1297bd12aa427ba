"""ProtoDiff: segment an image beside a noised embedding of its label, and anchor label embeddings at prototypes.

Xi et al., "Robust Noisy Pseudo-label Learning for Semi-supervised Medical Image Segmentation Using Diffusion Model",
DGM4MICCAI 2025 (arXiv 2507.16429). Names are the paper's; ``documentation/methods/proto_diff.md`` lists every
deviation.

Glossary: z label embedding, z_t noised one, i its projection phi(z), p_ck prototype k of class c, t time. The paper has
no loss on unlabeled images: masks of unknown quality (``batch['pseudo']``) are learned like labels where there are any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nnssl.diffusion.continuous import T_MAX
from nnssl.losses.prototype import inter_loss, intra_loss
from nnssl.losses.segmentation import cross_entropy
from nnssl.networks.label_diffusion import Trained
from nnssl.networks.visual_encoders import load_vit_weights
from nnssl.trainers.base import SemiSupervisedTrainer, full_resolution
from nnssl.trainers.proto_diff_settings import ProtoDiffSettings, network_architecture
from nnssl.trainers.settings import Settings
from nnssl.trainers.stepping import LossGroup, unwrap
from nnssl.training.prototypes import Prototypes, choose_cells


class ProtoDiffTrainer(SemiSupervisedTrainer):
    """Label-embedding diffusion decoder with prototype losses; the whole network predicts, by sampling."""

    settings_class = ProtoDiffSettings
    supports_regions = False
    uses_unlabeled = False
    handles_pseudo = True
    branch_differences = {"sampling_gain": ("network", "one_step"), "noise_gain": ("one_step", "blank")}
    settings: ProtoDiffSettings

    @classmethod
    def adapt_plans(cls, plans: dict, configuration: str, settings: Settings) -> None:
        """Put encoder, decoder and sampling into the plan's architecture, so that stock nnU-Net builds them."""
        assert isinstance(settings, ProtoDiffSettings)  # built by the base from settings_class
        network_architecture(plans, configuration, settings)

    # ------------------------------------------------------------------ networks
    def build_method(self) -> None:
        s = self.settings
        dim = unwrap(self.network).shape.embedding
        self.prototypes = self.modules["prototypes"] = Prototypes(
            self.label_space.num_heads,
            s.num_prototypes,
            dim,
            s.prototype_momentum,
            s.assign,
            s.assign_update,
            s.prototype_patience,
        ).to(self.device)
        if not s.has_prototypes:
            self.warn("w_inter=0 w_intra=0: no prototype is learned")
        if not s.diffusion:
            self.warn("diffusion=False: the decoder sees zeros in place of a noised label")

    def _do_i_compile(self) -> bool:
        """Return False: sampling loops over the decoder inside ``forward``."""
        return False

    def lr_factor(self, name: str) -> float:
        """Return the factor of a parameter's learning rate: a ViT that starts from weights learns slower."""
        pretrained = self.settings.backbone_weights is not None and name.startswith("visual.")
        return self.settings.backbone_lr if pretrained else 1.0

    def on_train_start(self) -> None:
        """Load the backbone's weights into a new run; a continued one has them in its checkpoint."""
        if not self.was_initialized:
            self.initialize()
        if self.settings.backbone != "plan" and self.global_step == 0:
            self._start_backbone(self.settings.backbone_weights)
        super().on_train_start()

    def _start_backbone(self, file: str | None) -> None:
        if file is None:
            text = f"{self.settings.backbone} starts from random weights, with few images far from published results"
            self.warn(f"{text}; give --set backbone_weights=FILE")
        else:
            self.print_to_log_file(f"backbone weights: {load_vit_weights(unwrap(self.network).visual, file)}")

    def branches(self, x: Tensor) -> dict[str, Tensor]:
        """Return the sampled prediction, the one-step prediction from noise, and that from zeros in place of noise."""
        outputs = {"network": self.predict_logits(x)}
        if self.settings.diffusion:
            once = replace(unwrap(self.network).sampling, steps=1, starts=1, accumulate=False)
            outputs["one_step"] = self.network(x, sampling=once)
            outputs["blank"] = self.network(x, sampling=replace(once, blank=True))
        return outputs

    # ------------------------------------------------------------------ one step (Algorithm 1)
    def compute_losses(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield the losses on labels, and those on masks of unknown quality where the batch has some."""
        s, pseudo = self.settings, batch.get("pseudo")
        alone = pseudo is None or s.pseudo_weight == 0
        target = full_resolution(batch["target"])
        out = self._denoise(batch["data"], target)
        terms = {"loss_supervised": self.segmentation_loss(out.logits, target)}
        if out.aux:
            losses = [self.segmentation_loss(logits, target) for logits in out.aux]
            terms["loss_auxiliary"] = s.aux_weight * torch.stack(losses).mean()
        terms |= self._prototype_terms(out, "", 1.0)
        log = {"occupancy": self.prototypes.occupancy()} if s.has_prototypes else {}
        yield LossGroup(terms, step=("network",) if alone else (), log=log)
        if pseudo is not None and not alone:
            yield LossGroup(self._pseudo_terms(pseudo), step=("network",))

    def _pseudo_terms(self, pseudo: dict[str, Any]) -> dict[str, Tensor]:
        """Return the same terms on masks of unknown quality, by cross-entropy alone, weighted."""
        s, target = self.settings, full_resolution(pseudo["target"])
        out, valid = self._denoise(pseudo["data"], target), self.label_space.valid(target)

        def loss(logits: Tensor) -> Tensor:
            return cross_entropy(logits, self._rows(target), valid, pseudo["weight"])

        terms = {"loss_pseudo": s.pseudo_weight * loss(out.logits)}
        if out.aux:
            terms["loss_pseudo_auxiliary"] = (
                s.pseudo_weight * s.aux_weight * torch.stack([loss(x) for x in out.aux]).mean()
            )
        return terms | self._prototype_terms(out, "pseudo_", s.pseudo_weight)

    def segmentation_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits against real labels: nnU-Net's, or cross-entropy."""
        if self.settings.loss == "dc_ce":
            return self.supervised_loss(logits, target)
        return cross_entropy(logits, self._rows(target), self.label_space.valid(target))

    def _denoise(self, images: Tensor, target: Tensor) -> Trained:
        """Run the network beside the noised embedding of a label map (b, 1, ...), one random time an item."""
        network, count = unwrap(self.network), len(images)
        shape = network.latent_shape(images.shape[2:])
        if (steps := self.settings.discrete_steps) is None:
            t = torch.rand(count, device=self.device) * T_MAX
        else:
            t = torch.randint(0, steps, (count,), device=self.device) / steps
        noise = torch.randn(count, *shape, device=self.device)
        predicted = self.settings.proto_on == "pred" and self.settings.has_prototypes
        return self.network(images, label=self._rows(target), t=t, noise=noise, predicted=predicted)

    def _rows(self, target: Tensor) -> Tensor:
        """Return a target as rows of the label encoder's table: the last one for ignored voxels."""
        return target.long().where(self.label_space.valid(target), self.label_space.num_heads)

    # ------------------------------------------------------------------ prototypes
    def _prototype_terms(self, out: Trained, prefix: str, weight: float) -> dict[str, Tensor]:
        """Move the prototypes by the label's embeddings, then return L_inter and L_intra with what they are now."""
        s, classes = self.settings, self.label_space.num_heads
        if not s.has_prototypes:
            return {}
        cells = choose_cells(out.cells.flatten(), boundary(out.cells).flatten(), s.cells_per_class, classes)
        labels = out.cells.flatten()[cells]
        anchors = out.embedding.movedim(1, -1).flatten(0, -2)[cells]
        assigned = self.prototypes.update(anchors.detach(), labels)
        seen = out.predicted
        embeddings = anchors if seen is None else seen.movedim(1, -1).flatten(0, -2)[cells]
        p = self.prototypes.value
        inter = inter_loss(embeddings, labels, assigned, p, s.tau, self.prototypes.seen)
        intra = intra_loss(embeddings, labels, assigned, p)
        terms = {f"loss_{prefix}inter": weight * s.w_inter * inter, f"loss_{prefix}intra": weight * s.w_intra * intra}
        return {name: term for name, term in terms.items() if (s.w_inter if "inter" in name else s.w_intra) > 0}


def boundary(cells: Tensor) -> Tensor:
    """Return bool (b, *grid), True where a direct neighbor holds another label (b, *grid)."""
    result = torch.zeros_like(cells, dtype=torch.bool)
    for axis in range(1, cells.ndim):
        differs = cells.narrow(axis, 1, cells.shape[axis] - 1) != cells.narrow(axis, 0, cells.shape[axis] - 1)
        result.narrow(axis, 1, cells.shape[axis] - 1).logical_or_(differs)
        result.narrow(axis, 0, cells.shape[axis] - 1).logical_or_(differs)
    return result
