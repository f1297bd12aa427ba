"""DiffRect: a latent diffusion rectifier learns to mend pseudo-labels, and the mended labels train the network.

Liu et al., "DiffRect: Latent Diffusion Label Rectification for Semi-supervised Medical Image Segmentation", MICCAI 2024
(arXiv 2407.09918). Names are the paper's; ``documentation/methods/diffrect.md`` lists every deviation.

Glossary: theta the predicting network, R rectifier, l labeled, u unlabeled, y_w / y_s pseudo-label of the weak / strong
view, y_r rectified label, tau calibration guidance, W2G weak-to-ground-truth, S2W strong-to-weak transportation.
No gradient crosses between theta and R: every hand-over is a hard label.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnssl.data.photometric import published_views
from nnssl.diffusion.samplers import spaced_timesteps
from nnssl.losses.complementary import weighted_complementary_loss
from nnssl.losses.segmentation import dice_and_cross_entropy
from nnssl.networks.rectifier import Rectified, Rectifier, latent_loss, latent_size
from nnssl.trainers.base import SemiSupervisedTrainer, full_resolution
from nnssl.trainers.diffrect_settings import DiffRectSettings, rectifier_shape, segmentation_architecture
from nnssl.trainers.settings import Settings
from nnssl.trainers.stepping import LossGroup
from nnssl.training.coloring import color_table, colorize
from nnssl.training.corruption import paste_boxes
from nnssl.training.guidance import RunningGuidance, agreement, calibration
from nnssl.training.pseudo_labels import confident_label, relative_label
from nnssl.training.ramps import schedule


class Step(NamedTuple):
    """What the parts of one step share; labeled items come first, then the unlabeled ones."""

    labeled: int
    weak: Tensor
    strong: Tensor
    truth: Tensor
    valid: Tensor
    probs_weak: Tensor
    labels_weak: Tensor
    labels_strong: Tensor


class DiffRectTrainer(SemiSupervisedTrainer):
    """FixMatch-style base, label context calibration (LCC) and latent feature rectification (LFR); theta predicts."""

    settings_class = DiffRectSettings
    supports_regions = False
    labeled_weak_view = True
    branch_differences = {"rectification_gain": ("rectified", "network")}
    settings: DiffRectSettings

    @classmethod
    def adapt_plans(cls, plans: dict, configuration: str, settings: Settings) -> None:
        """Put SSL4MIS's U-Net into the plan's architecture where the settings ask for it."""
        assert isinstance(settings, DiffRectSettings)  # built by the base from settings_class
        segmentation_architecture(plans, configuration, settings)

    def training_views(self, stock):
        """Return nnU-Net's augmentation, or the paper's in its place."""
        return published_views(stock) if self.settings.views == "paper" else stock

    # ------------------------------------------------------------------ networks
    def build_method(self) -> None:
        s, classes = self.settings, self.label_space.num_heads
        self.colors = color_table(classes, s.coloring).to(self.device)
        unknown = calibration(torch.tensor(0.5), s.guidance_form).item()
        self.tau = self.modules["tau"] = RunningGuidance(s.guidance_ema, unknown, self.device)
        if s.rect_weight == 0:
            return
        config = self.configuration_manager
        architecture = config.configuration["architecture"]
        shape = rectifier_shape(
            s, architecture, config.patch_size, self.num_input_channels, self.colors.shape[1], classes
        )
        every = range(s.timesteps) if s.time_steps == "all" else spaced_timesteps(s.timesteps, s.sampling_steps)
        self.time_steps = torch.tensor(list(every), device=self.device)
        rectifier = Rectifier(shape)
        self.latent_shape = (shape.width * 2 ** len(shape.strides), *latent_size(shape))
        self.rectifier = self.add_partner("rectifier", rectifier, optimizer=s.rectifier_optimizer, lr=s.rectifier_lr)
        steps = self.run_options.total_steps
        if not self._rect_begun(steps - 1):
            self.warn(f"L_Rect never starts within {steps} iterations: lower rect_start or rect_start_iteration")

    def learning_rate(self, name: str = "network") -> float:
        """Return the learning rate of a network; the rectifier's may stay constant, as in the authors' code."""
        if name == "rectifier" and self.settings.rectifier_lr_schedule == "constant":
            return self.settings.rectifier_lr
        return super().learning_rate(name)

    def branches(self, x: Tensor) -> dict[str, Tensor]:
        """Return theta, and R's mending of theta's own label; R learns nothing without unlabeled cases."""
        outputs = {"network": self.predict_logits(x)}
        if self.settings.rect_weight > 0 and self.unlabeled_ids:
            y_w = self.label(self.label_space.probs(outputs["network"]))[0]
            outputs["rectified"] = self._sampled(x, y_w).logits
        return outputs

    # ------------------------------------------------------------------ one step
    def compute_losses(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield L_Semi (theta), W2G and S2W (R), then L_Rect (theta again): eq. 13 in the order of the code."""
        s, unlabeled = self.settings, batch.get("unlabeled")
        if unlabeled is None or (s.unsupervised_weight == 0 and s.rect_weight == 0):
            image = batch["weak"] if s.supervised_view == "weak" else batch["data"]
            loss = self.supervised_loss(self.network(image), batch["target"])
            yield LossGroup({"loss_supervised": loss}, step=("network",))
            return
        weight = s.unsupervised(self.fraction)
        rect = self._rect_weight() if s.w2g or weight > 0 else 0.0  # R must have learned from somewhere
        step, terms = self._look(batch, unlabeled, weight)
        yield LossGroup(terms, step=() if s.merged and rect > 0 else ("network",))
        if s.rect_weight > 0:
            yield from self._train_rectifier(step, weight)
        if rect > 0:
            yield self._rectify(step, rect)

    def _rect_begun(self, step: int) -> bool:
        s = self.settings
        return step / self.run_options.total_steps >= s.rect_start and step >= s.rect_start_iteration

    def _rect_weight(self) -> float:
        s, begun = self.settings, self._rect_begun(self.global_step)
        return s.rect_weight * schedule(s.rect_schedule)(self.fraction) if begun else 0.0

    def _look(self, batch: dict[str, Any], unlabeled: dict[str, Any], weight: float) -> tuple[Step, dict[str, Tensor]]:
        """Run theta on both views; return what the rectifier needs, and the terms of L_Semi."""
        s, space, n = self.settings, self.label_space, len(batch["data"])
        truth = full_resolution(batch["target"])
        valid = torch.cat([space.valid(truth), unlabeled["valid"]])
        weak, strong = torch.cat([batch["weak"], unlabeled["weak"]]), torch.cat([batch["data"], unlabeled["strong"]])
        out_strong = learned = self.network(strong)
        with torch.set_grad_enabled(s.supervised_view == "weak"):
            out_weak = self.network(weak)
        if s.supervised_view == "weak":
            learned = out_weak
        labeled = [o[:n] for o in learned] if isinstance(learned, list) else learned[:n]
        logits, probs_weak = full_resolution(out_strong), space.probs(full_resolution(out_weak)).detach()
        y_w, sure = self.label(probs_weak)
        terms = {
            "loss_supervised": self.supervised_loss(labeled, batch["target"]),
            "loss_weak_to_strong": weight * self.hard_loss(logits[n:], y_w[n:], (valid & sure)[n:], s.pl_dice),
        }
        probs_strong = space.probs(logits)
        if s.complementary:
            terms["loss_complementary"] = weight * weighted_complementary_loss(probs_strong, probs_weak, valid)
        self.watch_foreground("weak", y_w[n:], unlabeled["valid"])
        return Step(n, weak, strong, truth, valid, probs_weak, y_w, self.label(probs_strong)[0]), terms

    def _train_rectifier(self, step: Step, weight: float) -> Iterator[LossGroup]:
        """Yield R's two transportations; it steps once, after both."""
        s, n = self.settings, step.labeled
        strong_to_weak = s.s2w and weight > 0
        damaged = paste_boxes(step.labels_weak[:n], step.labels_weak, s.damage)
        tau = self._tau(damaged, step.truth, step.valid[:n])
        own = self._tau(step.labels_strong[n:], step.labels_weak[n:], step.valid[n:])
        self.tau.update(tau if s.rectify_guidance == "labeled" else own)
        better = step.probs_weak
        if s.w2g:
            terms, better = self._weak_to_truth(step, damaged, tau)
            yield LossGroup(terms, step=() if strong_to_weak else ("rectifier",), log={"tau": tau.mean()})
        if strong_to_weak:
            yield LossGroup(self._strong_to_weak(step, better, weight), step=("rectifier",))

    def _weak_to_truth(self, step: Step, damaged: Tensor, tau: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the terms of W2G (L_Lat-L and R's segmentation loss on l), and what R makes of y_w (probabilities).

        ``damaged``: y_w of l, with boxes of other labels pasted in (`damage`); ``tau``: how far that is from the truth.
        """
        s, n = self.settings, step.labeled
        guidance = torch.cat([tau, tau.mean().expand(len(step.weak) - n)])
        good = torch.cat([self._truth(step), step.labels_weak[n:]])  # u reconstructs itself
        labels = torch.cat([damaged, step.labels_weak[n:]])
        out = self._transport(step.weak, labels, guidance, good)
        terms = {"loss_rect_w2g": self.hard_loss(out.logits[:n], step.truth, step.valid[:n], 1.0)}
        if out.latent is not None and out.target is not None:
            terms["loss_latent_l"] = s.lat_l_weight * self._latent_loss(out.latent, out.target, slice(None, n))
        return terms, self.label_space.probs(out.logits).detach()

    def _strong_to_weak(self, step: Step, better: Tensor, weight: float) -> dict[str, Tensor]:
        """Return the terms of S2W (L_Lat-U and R's segmentation loss on u); ``better``: probabilities W2G gave."""
        s, n = self.settings, step.labeled
        rows, u = (slice(None), slice(n, None)) if s.whole_strong_to_weak else (slice(n, None), slice(None))
        known = {"rectified": self.label(better), "weak": self.label(step.probs_weak)}
        peer, (target, sure) = known[s.strong_guidance][0], known[s.s2w_target]
        tau = self._tau(step.labels_strong[n:], peer[n:], step.valid[n:])
        guidance, good = torch.cat([tau.mean().expand(n), tau]), step.labels_weak
        if s.s2g:
            guidance = torch.cat([self._tau(step.labels_strong[:n], step.truth, step.valid[:n]), tau])
            good = torch.cat([self._truth(step), step.labels_weak[n:]])
        image = step.weak[rows] if s.s2w_image == "weak" else None
        out = self._transport(step.strong[rows], step.labels_strong[rows], guidance[rows], good[rows], image)
        counted = (step.valid & sure)[n:]
        terms = {"loss_rect_s2w": weight * self.hard_loss(out.logits[u], target[n:], counted, s.pl_dice)}
        if s.s2g:
            terms["loss_rect_s2g"] = self.hard_loss(out.logits[:n], step.truth, step.valid[:n], 1.0)
        if out.latent is not None and out.target is not None:
            terms["loss_latent_u"] = weight * s.lat_u_weight * self._latent_loss(out.latent, out.target, u)
        if s.complementary:
            probs = self.label_space.probs(out.logits)
            terms["loss_rect_complementary"] = weight * weighted_complementary_loss(
                probs, better[rows], step.valid[rows]
            )
        return terms

    def _truth(self, step: Step) -> Tensor:
        """Return the labeled items' truth; ignored voxels, of which nothing is known, keep theta's label."""
        return step.truth.long().where(step.valid[: step.labeled], step.labels_weak[: step.labeled])

    def _latent_loss(self, latent: Tensor, target: Tensor, own: slice) -> Tensor:
        rows = slice(None) if self.settings.latent_rows == "all" else own
        return latent_loss(latent[rows], target[rows], self.settings.latent_distance)

    def _rectify(self, step: Step, weight: float) -> LossGroup:
        """Return L_Rect: theta learns what the just updated R makes of y_w."""
        s, n = self.settings, step.labeled
        # batch norm takes its statistics over the whole batch, as in the code; otherwise only u is needed
        rows, u = (slice(None), slice(n, None)) if s.whole_batch else (slice(n, None), slice(None))
        tau = None
        if s.rectify_guidance == "own":
            tau = self._tau(step.labels_strong[rows], step.labels_weak[rows], step.valid[rows])
        probs = self.label_space.probs(self._sampled(step.weak[rows], step.labels_weak[rows], tau).logits)
        y_r, sure = (tensor[u] for tensor in self.label(probs))
        self.watch_foreground("rectified", y_r, step.valid[n:])
        logits = full_resolution(self.network((step.weak if s.rect_view == "weak" else step.strong)[rows]))[u]
        loss = self.hard_loss(logits, y_r, step.valid[n:] & sure, s.pl_dice)
        counted = step.valid[n:]
        changed = ((y_r != step.labels_weak[n:]) & counted).sum() / counted.sum().clamp_min(1)
        return LossGroup({"loss_rectification": weight * loss}, step=("network",), log={"changed": changed})

    # ------------------------------------------------------------------ the rectifier's inputs
    def _transport(
        self, image: Tensor, labels: Tensor, tau: Tensor, good: Tensor, good_image: Tensor | None = None
    ) -> Rectified:
        """Run R's training pass: colored labels, the colored better map, and a random time step an item."""
        steps = self.time_steps
        t = steps[torch.randint(0, len(steps), (len(image),), device=self.device)]
        noise = torch.randn(len(image), *self.latent_shape, device=self.device)
        colored, better = colorize(labels, self.colors), colorize(good, self.colors)
        out = self.rectifier(image, colored, tau, good=better, good_image=good_image, t=t, noise=noise)
        return self._from_label(out, labels)

    @torch.no_grad()
    def _sampled(self, image: Tensor, labels: Tensor, tau: Tensor | None = None) -> Rectified:
        """Run R from noise, guided by ``tau`` (b,), or by the latest one: no better map is known here."""
        noise = torch.randn(len(image), *self.latent_shape, device=self.device)
        tau, training = self.tau.expand(len(image)) if tau is None else tau, self.rectifier.training
        self.rectifier.train(training and self.settings.sample_dropout)
        colored = colorize(labels, self.colors)
        rectified = self.rectifier(image, colored, tau, noise=noise, sampling=self.settings.sampling())
        self.rectifier.train(training)
        return self._from_label(rectified, labels)

    def _from_label(self, out: Rectified, labels: Tensor) -> Rectified:
        """Add the label to R's logits where the settings say so: R then learns what to change, not to copy first."""
        scale = self.settings.label_residual
        return out._replace(logits=out.logits + scale * self.label_space.one_hot(labels)) if scale else out

    def _tau(self, labels: Tensor, better: Tensor, valid: Tensor) -> Tensor:
        """Return the calibration guidance of label maps against better ones, one an item (b,)."""
        s, space = self.settings, self.label_space
        if s.guidance == "none":
            return torch.zeros(len(labels), device=self.device)
        a, b = space.one_hot(labels), space.one_hot(better)
        overlap = agreement(a, b, s.guidance, valid, s.guidance_per_item, s.guidance_present)
        return calibration(overlap, s.guidance_form)

    # ------------------------------------------------------------------ pseudo-labels
    def label(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Return hard labels (b, 1, ...) and where they count (bool), by the rule of the settings."""
        if self.settings.pl_rule == "confident":
            return confident_label(probs, self.settings.pl_threshold)
        label = relative_label(probs, self.settings.pl_threshold)
        return label, torch.ones_like(label, dtype=torch.bool)

    def hard_loss(self, logits: Tensor, hard: Tensor, valid: Tensor, dice: float) -> Tensor:
        """Return cross-entropy plus weighted Dice of logits with a hard label."""
        coded: dict[str, Any] = (
            {"smooth": 1e-5, "include_background": True, "squared": True} if self.settings.squared_dice else {}
        )
        return dice_and_cross_entropy(logits, hard.long(), 1.0, valid, dice_weight=dice, **coded)
