"""ACISIS: a mean teacher whose student learns more of the classes that it knows less, and more where it is sure.

Basak et al., "Addressing Class Imbalance in Semi-supervised Image Segmentation: A Study on Cardiac MRI", MICCAI 2022
(arXiv 2209.00123), read in the form of DHC's repository. Labeled voxels of class c have three means: entropy E_c,
missing confidence 1 - C_c, and margin V_c = max p - p_c; F_ic is the softmax of the i-th over the classes::

    R_ic = 1 - exp(-exp(-2 F_ic))        CC_c <- m CC_c + (1 - m) (sum_i R_ic) (1 - mean_i F_ic) / max over classes
    s_c = ((1 - CC_c) / max_k (1 - CC_k)) ^ lambda             a voxel that the student calls c is kept with this chance
    L_u = mean over voxels of kept (max p)^beta CE(p, y)       y the teacher's label; dropped voxels count in the mean

All three grow with ignorance, so CC is high for well known classes. The code has C_c where 1 - C_c stands here, against
the other two: ``confidence_sign=published``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nnssl.losses.precision import fp32
from nnssl.trainers.base import full_resolution
from nnssl.trainers.one_network import TeacherMethod, TeacherSettings
from nnssl.trainers.settings import option
from nnssl.trainers.stepping import LossGroup
from nnssl.training.class_statistics import ClassState, sampling_rate
from nnssl.training.pseudo_labels import pseudo_label_loss

#: R of a class outside the best ``top`` of an indicator: what F = 0 gives.
PENALTY = 0.632
#: Values that the array takes in over a run: the code's, one an epoch. With many more, CC of the best known class comes
#: so near to 1 that its voxels are never drawn again.
UPDATES = 300


@dataclass(frozen=True)
class ACISISSettings(TeacherSettings):
    """Settings of ACISIS."""

    array_decay: float = option(0.99, "m: decay of the confidence array", low=0, high=0.999999)
    window: int | None = option(
        None, "iterations that each value of the array is taken over; none = a 300th of the run", low=1
    )
    top: int | None = option(
        None, "classes whose rank counts, the others get the penalty; none = all (the code: 12 of 14)", low=1
    )
    confidence_sign: str = option(
        "ignorance", "C enters as 1 - C, or as the code has it", choices=("ignorance", "published")
    )
    exponent: float = option(2.5, "lambda: exponent of the sampling rate s; 0 keeps every voxel", low=0)
    beta: float = option(1.5, "exponent of the student's confidence in a voxel's weight", low=0)


@fp32
def fused_rank(indicators: Tensor, seen: Tensor, top: int | None = None) -> Tensor:
    """Return the fused rank (C,) of indicators (3, C), at most 1; only where ``seen`` (C,) does it mean anything."""
    share = indicators.masked_fill(~seen, -torch.inf).softmax(1).nan_to_num()  # no class seen: 0
    rank = 1 - (-(-2 * share).exp()).exp()
    if top is not None and top < share.shape[1]:
        kept = torch.zeros_like(seen).expand_as(share).scatter(1, share.topk(top, 1).indices, True)
        rank, share = rank.where(kept, rank.new_full((), PENALTY)), share * kept
    fused = rank.sum(0) * (1 - share.mean(0))
    return fused / fused.where(seen, torch.zeros_like(fused)).max().clamp_min(1e-12)


class ConfidenceArray(ClassState):
    """CC (C,) of the classes, from 0, renewed every ``window`` batches; a class absent from a window keeps its own.

    Args:
        classes: C.
        settings: decay, ranking and sign; the window is given apart, since a run decides it where they do not.
        window: batches a value is taken over.
        device: where the state lies.
    """

    NAMES = ("value", "sums", "counts", "batches")

    def __init__(self, classes: int, settings: ACISISSettings, window: int, device: torch.device | str = "cpu") -> None:
        self.settings, self.window = settings, window
        self.value, self.counts = torch.zeros(classes, device=device), torch.zeros(classes, device=device)
        self.sums, self.batches = torch.zeros(3, classes, device=device), torch.zeros((), device=device)

    @torch.no_grad()
    def update(self, probs: Tensor, entropy: Tensor, onehot: Tensor, all_ranks: bool = False) -> None:
        """Take in a labeled batch: probabilities (b, C, ...), their entropy (b, 1, ...), labels (b, C, ...)."""
        s, axes = self.settings, [0, *range(2, probs.ndim)]
        second = probs if s.confidence_sign == "published" else 1 - probs
        each = (entropy, second, probs.amax(1, keepdim=True) - probs)
        added = torch.stack([*((value * onehot).sum(axes) for value in each), onehot.sum(axes)])
        if all_ranks:
            dist.all_reduce(added)
        sums, counts, batches = self.sums + added[:3], self.counts + added[3], self.batches + 1
        due = batches >= self.window
        latest = fused_rank(sums / counts.clamp_min(1), counts > 0, s.top)
        moved = s.array_decay * self.value + (1 - s.array_decay) * latest
        self.value = torch.where(due & (counts > 0), moved, self.value)
        self.sums, self.counts, self.batches = (t.where(~due, torch.zeros_like(t)) for t in (sums, counts, batches))


class ACISISTrainer(TeacherMethod):
    """Student and EMA teacher with a confidence array; the student predicts."""

    supports_regions = False
    settings_class = ACISISSettings
    settings: ACISISSettings

    def build_method(self) -> None:
        super().build_method()
        s, classes = self.settings, self.label_space.num_heads
        window = s.window or max(1, self.run_options.total_steps // UPDATES)
        self.array = self.modules["array"] = ConfidenceArray(classes, s, window, self.device)
        if s.top is not None and s.top >= classes and s.unsupervised_weight > 0:
            self.warn(f"top={s.top} leaves no class out: this data set has {classes}")

    def labeled_loss(self, output: Any, target: Any) -> Tensor:
        space = self.label_space
        with torch.no_grad():
            probs = space.probs(full_resolution(output).detach())
            self.array.update(probs, space.entropy(probs), space.one_hot(full_resolution(target)), self.is_ddp)
        return self.supervised_loss(output, target)

    def unsupervised_losses(self, unlabeled: dict[str, Any]) -> LossGroup:
        """Return L_u, and the share of voxels that are kept."""
        space, s, valid = self.label_space, self.settings, unlabeled["valid"]
        label = space.harden(self.teach(unlabeled["weak"]))
        self.watch_foreground("teacher", label, valid)
        logits = self.predict_logits(unlabeled["strong"])
        with torch.no_grad():
            probs = space.probs(logits)
            rate = sampling_rate(self.array.value, s.exponent)
            kept = torch.rand(label.shape, device=label.device) < rate[space.harden(probs)]
            weight = kept * space.confidence(probs) ** s.beta
        loss = pseudo_label_loss(space, logits, label, valid, weight)
        return LossGroup({"loss_pseudo_label": loss}, log={"kept": (kept & valid).sum() / valid.sum().clamp_min(1)})
