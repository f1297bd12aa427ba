"""Adsh on two peers: every class has a threshold of its own, so that each keeps the same share of its labels.

Guo and Li, "Class-Imbalanced Semi-Supervised Learning with Adaptive Thresholding", ICML 2022, in the form in which DHC
(arXiv 2307.11960) compares it: cross pseudo supervision. Over a window of unlabeled crops a network calls n_k voxels
class k, with confidences max p; for its most frequent class 1::

    rho = share of class 1's voxels whose confidence reaches tau_1
    tau_k = the confidence that the share rho of class k's voxels reach

    L_u = 1/N sum_voxels 1(max p_j >= tau_(y_j)) CE(p_i, y_j)        y_j, p_j of the teaching peer
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nnssl.trainers.settings import UnsupervisedSettings, option
from nnssl.trainers.two_networks import TEACHER, ByName, TwoNetworkMethod
from nnssl.training.class_statistics import ClassState
from nnssl.training.pseudo_labels import pseudo_label_loss

#: Bins of confidence between 0 and 1: thresholds are multiples of 0.001.
BINS = 1000


@dataclass(frozen=True)
class AdshSettings(UnsupervisedSettings):
    """Settings of Adsh."""

    unsupervised_weight: float = option(0.1, "lambda: weight of both cross terms at the end of its schedule", low=0)
    threshold: float = option(
        0.95, "tau_1: threshold of the most frequent class, and of all at the start (DHC's version: 0.9)", low=0, high=1
    )
    window: int = option(50, "iterations after which thresholds are renewed", low=1)
    rejected: str = option(
        "ignore",
        "a voxel below does not count, or (DHC's version) logits of classes that the peer gives less are set to 0",
        choices=("ignore", "zero_logits"),
    )


class AdaptiveThresholds(ClassState):
    """Thresholds (C,) of classes from a histogram of confidences, renewed every ``window`` batches.

    Args:
        classes: C.
        major: tau_1 in [0, 1].
        window: batches a histogram is taken over.
        device: where the state lies.
    """

    NAMES = ("value", "histogram", "batches")

    def __init__(self, classes: int, major: float, window: int, device: torch.device | str = "cpu") -> None:
        self.major, self.window = major, window
        self.value = torch.full((classes,), major, device=device)
        self.histogram = torch.zeros(classes, BINS, dtype=torch.int64, device=device)
        self.batches = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, label: Tensor, confidence: Tensor, valid: Tensor, all_ranks: bool = False) -> None:
        """Take in a batch: hard labels, their confidence in 0..1, and which voxels count, (b, 1, ...) each."""
        bins = (confidence * BINS).long().clamp(0, BINS - 1)
        added = torch.zeros_like(self.histogram).view(-1)
        added = added.scatter_add(0, (label * BINS + bins).view(-1), valid.long().view(-1)).view_as(self.histogram)
        if all_ranks:
            dist.all_reduce(added)
        histogram, batches = self.histogram + added, self.batches + 1
        due = batches >= self.window
        self.value = torch.where(due, self.renewed(histogram), self.value)
        self.histogram = histogram.where(~due, torch.zeros_like(histogram))
        self.batches = batches.where(~due, torch.zeros_like(batches))

    def renewed(self, histogram: Tensor) -> Tensor:
        """Return the thresholds (C,) of a histogram (C, bins).

        The most frequent class has tau_1. A class without a voxel keeps its own, and so do all others while rho is 0,
        which every threshold above all confidences would fulfill.
        """
        at_least = histogram.flip(1).cumsum(1).flip(1)  # voxels of each class in a bin or above it
        counts = at_least[:, 0]
        shares = at_least / counts.clamp_min(1)[:, None]
        first = min(round(self.major * BINS), BINS - 1)
        major = torch.arange(len(counts), device=counts.device) == counts.argmax()
        rho = (shares[:, first] * major).sum()
        reached = (shares >= rho).sum(1) - 1  # the highest bin above which the share rho still lies
        value = torch.where((counts > 0) & (rho > 0), reached / BINS, self.value)
        return torch.where((counts > 0) & major, self.major, value)


class AdshTrainer(TwoNetworkMethod):
    """Two peers that keep pseudo-labels by adaptive thresholds of classes; the first predicts."""

    supports_regions = False
    settings_class = AdshSettings
    settings: AdshSettings

    def build_method(self) -> None:
        super().build_method()
        s, classes = self.settings, self.label_space.num_heads
        self.thresholds = {n: AdaptiveThresholds(classes, s.threshold, s.window, self.device) for n in TEACHER}
        self.modules |= {f"thresholds_{name}": thresholds for name, thresholds in self.thresholds.items()}

    def observe(self, logits: ByName, hard: ByName, valid: Tensor) -> ByName:
        self.kept, self.given = {}, {}
        for name, z in logits.items():
            probs = self.label_space.probs(z)
            confidence, limits = self.label_space.confidence(probs), self.thresholds[name].value
            self.thresholds[name].update(hard[name], confidence, valid, self.is_ddp)
            self.kept[name] = valid & (confidence >= limits[hard[name]])
            if self.settings.rejected == "zero_logits":
                self.given[name] = probs > limits.view(1, -1, *[1] * (z.ndim - 2))
        limits = self.thresholds["peer"].value
        share = self.kept["peer"].sum() / valid.sum().clamp_min(1)
        return {"kept": share, "threshold_max": limits.max(), "threshold_min": limits.min()}

    def cross_loss(self, name: str, logits: ByName, hard: ByName, valid: Tensor) -> Tensor:
        z, teacher = logits[name], TEACHER[name]
        if self.settings.rejected == "zero_logits":
            return pseudo_label_loss(self.label_space, z * self.given[teacher], hard[teacher], valid)
        return pseudo_label_loss(self.label_space, z, hard[teacher], valid, self.kept[teacher].float())
