"""Diff-CL: a diffusion network and a convolutional network teach each other, and labels propagate by contrast.

Guo, Yu, Shi, Lei, Wang, "Diff-CL: A Novel Cross Pseudo-Supervision Method for Semi-supervised Medical Image
Segmentation", arXiv 2503.09408 (2025). Equation numbers are the paper's; ``documentation/methods/diffcl.md`` lists
every deviation.

Glossary: CS convolutional network (predicts), DS diffusion network, F projection head, l labeled, u unlabeled,
``hat`` = of CS (P_c), ``tilde`` = of DS (P_d), Y_t noised label, sg = stop-gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor

from nnssl.diffusion.process import q_sample
from nnssl.diffusion.samplers import ddim_sample, spaced_timesteps
from nnssl.diffusion.schedule import NoiseSchedule
from nnssl.losses.contrastive import label_propagation_loss
from nnssl.losses.segmentation import dice_and_cross_entropy
from nnssl.networks.projection import ProjectionHead
from nnssl.trainers.base import SemiSupervisedTrainer, full_resolution
from nnssl.trainers.diffcl_settings import DiffCLSettings, diffusion_architecture, segmentation_architecture
from nnssl.trainers.settings import Settings
from nnssl.trainers.stepping import LossGroup
from nnssl.training.memory_bank import MemoryBank, choose, choose_per_class
from nnssl.training.ramps import schedule

#: Time steps at which the branch record looks at DS: little noise, half of it, noise alone.
WATCHED_STEPS = (100, 500, 999)


class Outputs(NamedTuple):
    """One network's view of a step: labeled output (deeply supervised), unlabeled logits, features, hard labels."""

    labeled: Tensor | list[Tensor]
    unlabeled: Tensor
    features_labeled: Tensor
    features_unlabeled: Tensor
    hard_labeled: Tensor
    hard_unlabeled: Tensor


class DiffCLTrainer(SemiSupervisedTrainer):
    """DS and CS with cross pseudo-supervision (eqs. 16-22) and contrastive label propagation (eqs. 11-15)."""

    settings_class = DiffCLSettings
    supports_regions = False
    settings: DiffCLSettings

    @classmethod
    def adapt_plans(cls, plans: dict, configuration: str, settings: Settings) -> None:
        """Put CS (planned network + HFM, or V-Net) into the plan's architecture, so that stock nnU-Net builds it."""
        assert isinstance(settings, DiffCLSettings)  # built by the base from settings_class
        segmentation_architecture(plans, configuration, settings)

    # ------------------------------------------------------------------ networks
    def build_method(self) -> None:
        s, classes = self.settings, self.label_manager.num_segmentation_heads
        arch = diffusion_architecture(self.configuration_manager.configuration["architecture"])
        ds = get_network_from_plans(
            arch["network_class_name"],
            arch["arch_kwargs"],
            arch["_kw_requires_import"],
            self.num_input_channels + classes,
            classes,
            allow_init=True,
            deep_supervision=self.enable_deep_supervision,
        )
        self.ds = self.add_partner("ds", ds)
        head = ProjectionHead(ds.feature_channels, s.projection_dim)
        self.projection = self.add_partner("projection", head, compiled=False)  # its number of rows changes
        self.noise = NoiseSchedule.linear(s.timesteps, 1e-4, 0.02).to(self.device)
        self.bank = self.modules["bank"] = MemoryBank(s.bank_capacity, device=self.device)

    def branches(self, x: Tensor) -> dict[str, Tensor]:
        """Return CS; DS given CS's own pseudo-label at three noise levels (at the last one it sees noise alone)."""
        outputs = {"CS": self.predict_logits(x)}
        hard = self.label_space.harden(outputs["CS"])
        for t in (t for t in WATCHED_STEPS if t < self.settings.timesteps):
            times = torch.full((len(x),), t, device=x.device)
            outputs[f"DS_t{t}"] = full_resolution(self.ds(torch.cat([x, self._noised(hard, times)], 1), t=times))
        return outputs

    def _noised(self, hard: Tensor, t: Tensor) -> Tensor:
        """Return Y_t of eq. 5 for labels (b, 1, ...) at time steps (b,): one-hot, scaled to the set range, noised."""
        y0 = self.label_space.one_hot(hard)
        if self.settings.y0_scale == "pm1":
            y0 = 2 * y0 - 1
        return q_sample(y0, t, torch.randn_like(y0), self.noise)

    # ------------------------------------------------------------------ one step (Algorithm 1)
    def compute_losses(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield L^d and step DS, then L^c and step CS with F; both from outputs before the update."""
        s, unlabeled = self.settings, batch.get("unlabeled")
        mu = schedule(s.mu_schedule)(self.fraction)
        if unlabeled is None or mu * max(s.mu_d, s.mu_c) == 0:
            yield from self._supervised_step(batch)
            return
        image_u, valid = unlabeled["strong"], unlabeled["valid"]
        images, count = torch.cat([batch["data"], image_u]), len(batch["data"])
        truth = full_resolution(batch["target"])
        cs = self._run(self.network, images, count)
        y_u = cs.hard_unlabeled
        seen_by_ds = torch.cat([batch["data"], unlabeled[s.ds_view]])
        noised, times = self._noised_pair(truth, y_u)
        ds = self._run(self.ds, torch.cat([seen_by_ds, noised], 1), count, t=times)
        pseudo_label = self._ddim_label(unlabeled[s.ds_view]) if s.ds_pseudo == "ddim" else ds.hard_unlabeled
        self.watch_foreground("CS", y_u, valid)
        self.watch_foreground("DS", pseudo_label, valid)
        self._fill_bank(ds, truth, batch["keys"])

        beta_d, beta_c = (b * schedule(s.beta_schedule)(self.fraction) for b in (s.beta_d, s.beta_c))
        mu = mu * self._trust(cs.hard_labeled, truth)
        loss_ds = {
            "loss_ds_supervised": self._supervised(ds.labeled, batch["target"], beta_d),  # L_s^d
            "loss_ds_cross": s.mu_d * mu * self._cross(ds.unlabeled, y_u, s.lambda_d, valid),  # eq. 18
        }
        agreement = ((y_u == pseudo_label) & valid).sum() / valid.sum().clamp_min(1)
        yield LossGroup(
            loss_ds, step=("ds",), log={"agreement": agreement, "mu": torch.as_tensor(mu, device=self.device)}
        )  # eq. 16

        loss_cs = {
            "loss_cs_supervised": self._supervised(cs.labeled, batch["target"], beta_c),  # L_s^c
            "loss_cs_cross": s.mu_c * mu * self._cross(cs.unlabeled, pseudo_label, s.lambda_c, valid),
        }
        if s.eta > 0:
            loss_cs["loss_contrast"] = s.mu_c * mu * s.eta * self._contrast(cs, valid)  # eq. 22
        yield LossGroup(loss_cs, step=("network", "projection") if s.eta > 0 else ("network",))  # eq. 17

    def _supervised_step(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Train both networks on the labeled batch alone (no unlabeled case, or mu = 0)."""
        s = self.settings
        beta_d, beta_c = (b * schedule(s.beta_schedule)(self.fraction) for b in (s.beta_d, s.beta_c))
        loss = self._supervised(self.network(batch["data"]), batch["target"], beta_c)
        yield LossGroup({"loss_cs_supervised": loss}, step=("network",))
        t = self._draw_times(len(batch["data"]), 0)
        noised = self._noised(full_resolution(batch["target"]), t)
        output = self.ds(torch.cat([batch["data"], noised], 1), t=t)
        yield LossGroup({"loss_ds_supervised": self._supervised(output, batch["target"], beta_d)}, step=("ds",))

    def _run(self, network: torch.nn.Module, x: Tensor, count: int, **kwargs: Any) -> Outputs:
        """Run labeled and unlabeled items through a network at once and take the result apart."""
        output, features = network(x, features=True, **kwargs)
        labeled = [o[:count] for o in output] if isinstance(output, list) else output[:count]
        logits = full_resolution(output)
        hard = logits.detach().argmax(1, keepdim=True)
        return Outputs(labeled, logits[count:], features[:count], features[count:], hard[:count], hard[count:])

    @torch.no_grad()
    def _trust(self, hard: Tensor, truth: Tensor) -> Tensor | float:
        """Return CS's Dice on the labeled batch, mean of the classes present, 0 if none is (ours; 1 if switched off).

        CS, unlike DS, sees nothing of the labels it is measured on. Without it, networks that know little yet confirm
        each other's mistakes, and can agree on background alone in short runs.
        """
        if not self.settings.trust:
            return 1.0
        space = self.label_space
        a, b = (space.one_hot(x)[:, 1:] * space.valid(truth) for x in (hard, truth))
        axes = [0, *range(2, a.ndim)]
        total = a.sum(axes) + b.sum(axes)
        dice = 2 * (a * b).sum(axes) / total.clamp_min(1)
        return dice.sum() / (total > 0).sum().clamp_min(1)

    def _noised_pair(self, truth: Tensor, pseudo: Tensor) -> tuple[Tensor, Tensor]:
        """Return Y_t of both streams (b + u, C, ...) and their time steps, one per sample (eq. 5)."""
        t_l, t_u = self._draw_times(len(truth), 0), self._draw_times(len(pseudo), self.settings.t_min_unlabeled)
        return torch.cat([self._noised(truth, t_l), self._noised(pseudo, t_u)]), torch.cat([t_l, t_u])

    def _draw_times(self, count: int, low: int) -> Tensor:
        return torch.randint(low, self.settings.timesteps, (count,), device=self.device)

    def _supervised(self, output: Tensor | list[Tensor], target: Tensor | list[Tensor], beta: float) -> Tensor:
        """Return D + beta E (eqs. 7-9): nnU-Net's loss with the cross-entropy weighted by beta."""
        getattr(self.loss, "loss", self.loss).weight_ce = beta
        return self.supervised_loss(output, target)

    def _cross(self, logits: Tensor, label: Tensor, ce_weight: float, valid: Tensor) -> Tensor:
        """Return L_p (eqs. 19-21) of unlabeled logits against the peer's hard label."""
        return dice_and_cross_entropy(logits, label, ce_weight, valid, dice_weight=self.settings.cross_dice)

    @torch.no_grad()
    def _ddim_label(self, images: Tensor) -> Tensor:
        """Return DS's label from a DDIM chain that starts from noise (not the paper's; ten forward passes)."""

        def x0(y: Tensor, t: Tensor) -> Tensor:
            probs = self.label_space.probs(full_resolution(self.ds(torch.cat([images, y], 1), t=t)))
            return 2 * probs - 1 if self.settings.y0_scale == "pm1" else probs

        start = torch.randn(len(images), self.label_space.num_heads, *images.shape[2:], device=images.device)
        return ddim_sample(x0, start, spaced_timesteps(self.settings.timesteps, 10), self.noise).argmax(1, keepdim=True)

    # ------------------------------------------------------------------ contrastive label propagation
    @torch.no_grad()
    def _fill_bank(self, ds: Outputs, truth: Tensor, cases: list[str]) -> None:
        """Store F(DS features) of labeled voxels that DS classifies correctly, one slot a case (section 3.4)."""
        if self.settings.eta == 0:
            return
        correct = (ds.hard_labeled == truth) & self.label_space.valid(truth)
        stored, projected, classes = [], [], []
        for case in dict.fromkeys(cases):
            items = [i for i, key in enumerate(cases) if key == case]
            features = torch.cat([ds.features_labeled[i].flatten(1).T for i in items])
            labels, eligible = truth[items].flatten().long(), correct[items].flatten()
            voxels = choose_per_class(labels, eligible, self.settings.bank_capacity)
            if voxels:
                index = torch.cat(list(voxels.values()))
                stored.append(case)
                projected.append(self.projection(features[index]))
                classes.append(labels[index])
        self.bank.push(stored, projected, classes, all_ranks=self.is_ddp)

    def _contrast(self, cs: Outputs, valid: Tensor) -> Tensor:
        """Return L_cl (eqs. 11-15) of q random unlabeled voxels against the bank."""
        s, features = self.settings, cs.features_unlabeled
        voxels = valid.flatten().nonzero()[:, 0]
        voxels = voxels[choose(len(voxels), s.q, voxels.device)]
        per_item = valid[0].numel()
        sampled = features.flatten(2)[voxels // per_item, :, voxels % per_item]
        bank = self.bank.draw(range(self.label_space.num_heads), s.p)
        k = min(s.k, len(voxels) // 2)
        if not bank or k == 0:
            return sampled.float().sum() * 0 + sum(p.sum() for p in self.projection.parameters()) * 0
        hard = cs.hard_unlabeled.flatten()[voxels]
        limits = {c: int((hard == c).sum()) for c in bank} if s.cl_min_pred else None
        return label_propagation_loss(self.projection(sampled), bank, k, s.tau, limits)
