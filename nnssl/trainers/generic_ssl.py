"""A&D: aggregate what labeled scans teach two decoders, decouple the predictor that learns from unlabeled ones alone.

Wang and Li, "Towards Generic Semi-Supervised Framework for Volumetric Medical Image Segmentation", NeurIPS 2023 (arXiv
2310.11320). Names are the paper's; ``documentation/methods/generic_ssl.md`` lists every deviation.

Glossary: xi diffusion decoder (denoises a label under the image), psi difficulty-aware decoder, theta predictor, l
labeled, u unlabeled, x_t noised label, DRS difficulty-aware re-weighting, RS reparameterize and smooth. One encoder
feeds all three; the only stop-gradients are the pseudo-label and the input of DRS.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nnssl.data.svda import svda_unlabeled, svda_views
from nnssl.diffusion.process import q_sample
from nnssl.diffusion.samplers import ddim_sample
from nnssl.diffusion.schedule import NoiseSchedule
from nnssl.losses.segmentation import dice_and_cross_entropy
from nnssl.networks.diff_vnet import DecoderModes
from nnssl.trainers.base import SemiSupervisedTrainer, full_resolution
from nnssl.trainers.generic_ssl_settings import GenericSSLSettings, network_architecture
from nnssl.trainers.settings import Settings
from nnssl.trainers.stepping import LossGroup, unwrap
from nnssl.trainers.weighted_supervision import class_weighted_supervision
from nnssl.training.difficulty import Difficulty, count_voxels
from nnssl.training.reparameterize import log_probabilities, reparameterize_and_smooth
from nnssl.training.transfer import blend


class GenericSSLTrainer(SemiSupervisedTrainer):
    """Supervised denoising (xi), difficulty-aware training (psi), pseudo-labels of both for theta, which predicts."""

    settings_class = GenericSSLSettings
    supports_regions = False
    branch_differences = {"aggregation_gain": ("both", "difficulty"), "predictor_gain": ("network", "both")}
    settings: GenericSSLSettings

    @classmethod
    def adapt_plans(cls, plans: dict, configuration: str, settings: Settings) -> None:
        """Put the Diff-VNet into the plan's architecture, so that stock nnU-Net builds it."""
        assert isinstance(settings, GenericSSLSettings)  # built by the base from settings_class
        network_architecture(plans, configuration, settings)

    def training_views(self, stock):
        """Return nnU-Net's augmentation, or SVDA in its place."""
        s = self.settings
        return svda_views(stock, s.svda_count, s.svda_probability) if s.views == "svda" else stock

    def unlabeled_views(self, stock):
        """Return the same for unlabeled crops, without what needs labels."""
        return svda_unlabeled(stock) if self.settings.views == "svda" else super().unlabeled_views(stock)

    # ------------------------------------------------------------------ networks
    def build_method(self) -> None:
        s = self.settings
        self.noise = NoiseSchedule.scaled_linear(s.timesteps).to(self.device)  # T = 1000: beta from 1e-4 to 0.02
        self.difficulty = self.modules["difficulty"] = Difficulty(
            self.label_space.num_heads, s.drs_alpha, s.drs_window, s.drs_norm, s.drs_memory, s.drs_hold, self.device
        )
        if s.decoder_init == "shared":
            self.diff_vnet.share_start()

    def on_train_start(self) -> None:
        """Share theta's start once more: pretrained weights may have changed it since the networks were built."""
        super().on_train_start()
        if self.global_step == 0 and self.settings.decoder_init == "shared":
            self.diff_vnet.share_start()

    @property
    def diff_vnet(self) -> DecoderModes:
        """The network below ``torch.compile``."""
        network = unwrap(self.network)
        assert isinstance(network, DecoderModes)  # adapt_plans put it there
        return network

    def before_step(self) -> None:
        """Transfer knowledge: pull theta's parameters toward the mean of xi's and psi's."""
        s = self.settings
        if s.blend < 1 and s.unsupervised_weight > 0 and self.unlabeled_ids:
            sources = ((theta, (xi, psi) if s.diffusion else (psi,)) for theta, xi, psi in self._matched())
            blend(sources, s.blend)

    def _matched(self):
        return self.diff_vnet.matched_parameters()

    def branches(self, x: Tensor) -> dict[str, Tensor]:
        """Return theta; xi from noise alone; psi; and the votes of both, which make the pseudo-label."""
        outputs = {"network": self.predict_logits(x)}
        if self.settings.unsupervised_weight > 0 and self.unlabeled_ids:  # otherwise neither learns anything
            outputs["difficulty"] = full_resolution(self.network(x, decoder="psi"))
            votes = self.label_space.probs(outputs["difficulty"])
            if self.settings.diffusion:
                outputs["diffusion"] = self._sample(x)
                votes = votes + self._vote(outputs["diffusion"])
            outputs["both"] = votes
        return outputs

    # ------------------------------------------------------------------ one step
    def compute_losses(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield L_deno (xi), L_diff (psi), mu L_u (theta): three backward passes, one step of the optimizer."""
        s, unlabeled = self.settings, batch.get("unlabeled")
        if unlabeled is None or s.unsupervised_weight == 0:
            loss = self.supervised_loss(self.network(batch["data"]), batch["target"])
            yield LossGroup({"loss_supervised": loss}, step=("network",))
            return
        mu = s.unsupervised(self.fraction)
        step = () if s.joint else ("network",)
        if s.diffusion:
            yield self._denoising(batch, step)
        yield self._difficulty_aware(batch, step if mu > 0 else ("network",))
        if mu > 0:
            yield self._pseudo_supervision(unlabeled, mu)

    def _denoising(self, batch: dict[str, Any], step: tuple[str, ...]) -> LossGroup:
        """Return L_deno: xi tells the label from image and x_t; tell DRS how well it did."""
        s, truth = self.settings, full_resolution(batch["target"])
        t = torch.randint(s.t_min, s.timesteps, (len(truth),), device=self.device)
        x0 = 2 * self.label_space.one_hot(truth) - 1
        noisy = q_sample(x0, t, torch.randn_like(x0), self.noise)
        output = self.network(batch["data"], decoder="xi", noisy=noisy, t=t)
        if s.drs_branch == "xi":
            self._measure(full_resolution(output), truth)
        return LossGroup({"loss_supervised_denoising": self.supervised_loss(output, batch["target"])}, step)

    def _difficulty_aware(self, batch: dict[str, Any], step: tuple[str, ...]) -> LossGroup:
        """Return L_diff: psi's supervised loss, its classes weighted by this iteration's W."""
        s = self.settings
        output = self.network(batch["data"], decoder="psi")
        if s.drs_branch == "psi" or not s.diffusion:
            self._measure(full_resolution(output), full_resolution(batch["target"]))
        if not s.drs:
            return LossGroup({"loss_supervised_difficulty": self.supervised_loss(output, batch["target"])}, step)
        weights = self.difficulty.weights().clamp_min(s.drs_floor)
        loss = class_weighted_supervision(self, output, batch["target"], weights, s.drs_background)
        extremes = {"weight_max": weights.max(), "weight_min": weights.min()}
        return LossGroup({"loss_supervised_difficulty": loss}, step, extremes)

    def _measure(self, logits: Tensor, truth: Tensor) -> None:
        """Tell DRS the Dice of this batch."""
        space = self.label_space
        predicted = space.one_hot(logits.detach().argmax(1, keepdim=True)) * space.valid(truth)
        self.difficulty.update(count_voxels(predicted, space.one_hot(truth), self.is_ddp))

    def _pseudo_supervision(self, unlabeled: dict[str, Any], mu: float) -> LossGroup:
        """Return mu L_u: theta learns the arg max of both votes."""
        s, image, valid = self.settings, unlabeled["strong"], unlabeled["valid"]
        seen = unlabeled[s.pseudo_view]
        x0 = self._sample(seen) if s.diffusion and self.global_step % s.sampling_interval == 0 else None
        if s.pseudo_view == "strong":
            output, psi = self.network(image, decoder="both")
        else:
            with torch.no_grad():
                psi = full_resolution(self.network(seen, decoder="psi"))
            torch.clear_autocast_cache()  # half copies of weights made without gradient must not serve theta's pass
            output = self.network(image)
        votes, log = self.label_space.probs(psi), {"mu": torch.as_tensor(mu, device=self.device)}
        if x0 is not None:
            log["agreement"] = _agreement(x0.argmax(1, keepdim=True), votes.argmax(1, keepdim=True), valid)
            votes = votes + self._vote(x0)
        pseudo = votes.argmax(1, keepdim=True)
        self.watch_foreground("pseudo_label", pseudo, valid)
        loss = dice_and_cross_entropy(full_resolution(output), pseudo, 1.0, valid, dice_weight=s.pl_dice)
        return LossGroup({"loss_pseudo_label": mu * loss}, ("network",), log)

    # ------------------------------------------------------------------ the diffusion branch
    @torch.no_grad()
    def _sample(self, images: Tensor) -> Tensor:
        """Return xi's label map of images, sampled from noise by DDIM: x0 (b, K, ...) in -1..1."""

        def x0(y: Tensor, t: Tensor) -> Tensor:
            logits = full_resolution(self.network(images, decoder="xi", noisy=y, t=t))
            return 2 * self.label_space.probs(logits) - 1 if s.x0_map == "softmax" else logits.float().clamp(-1, 1)

        s = self.settings
        start = torch.randn(len(images), self.label_space.num_heads, *images.shape[2:], device=images.device)
        if s.sampling_bf16:
            torch.clear_autocast_cache()  # copies that the losses made in another half precision must not serve here
        half = torch.autocast(images.device.type, torch.bfloat16) if s.sampling_bf16 else contextlib.nullcontext()
        with half:
            sampled = ddim_sample(x0, start, s.visited(), self.noise)
        torch.clear_autocast_cache()  # half copies of weights made without gradient must not serve theta's pass
        return sampled

    def _vote(self, x0: Tensor) -> Tensor:
        """Return xi's vote (b, K, ...): RS of its label map (eq. 7)."""
        s = self.settings
        if not s.rs:
            return (x0 + 1) / 2
        values = log_probabilities(x0) if s.rs_input == "log" else x0
        return reparameterize_and_smooth(values, s.rs_tau, s.rs_sigma)


def _agreement(a: Tensor, b: Tensor, valid: Tensor) -> Tensor:
    """Return the share of the voxels that either hard map (b, 1, ...) calls foreground on which both agree."""
    either = ((a > 0) | (b > 0)) & valid
    return ((a == b) & either).sum() / either.sum().clamp_min(1)
