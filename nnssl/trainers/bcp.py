"""Bidirectional copy-paste: labeled and unlabeled crops in one image, each the surroundings of the other.

Bai et al., "Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation", CVPR 2023 (arXiv 2305.00673).
M is 0 in a random box and 1 around it; l labeled, u unlabeled crops, i and j, p and q different ones of them::

    X_in = X_l_j M + X_u_p (1 - M)        X_out = X_u_q M + X_l_i (1 - M)        targets Y_in, Y_out alike
    L = L_in + L_out        each: L_seg over the labeled voxels + alpha L_seg over the pseudo-labeled ones

Pseudo-labels are the EMA teacher's hard labels, each class reduced to its largest component. Before that, for a part of
the run, the network learns from labeled crops pasted into labeled crops alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nnssl.trainers.base import full_resolution
from nnssl.trainers.one_network import TeacherMethod, TeacherSettings
from nnssl.trainers.settings import option
from nnssl.trainers.stepping import LossGroup
from nnssl.training.components import largest_components
from nnssl.training.label_space import LabelSpace
from nnssl.training.mixing import ignore_outside, partners_of, paste, random_box
from nnssl.training.pseudo_labels import pseudo_label_loss


@dataclass(frozen=True)
class BCPSettings(TeacherSettings):
    """Settings of bidirectional copy-paste."""

    unsupervised_weight: float = option(0.5, "alpha: weight of pseudo-labeled voxels; 0 = no copy-paste at all", low=0)
    unsupervised_schedule: str = option(
        "constant", "its course over the run: constant (the paper), linear, ramp, warmup1 to warmup99"
    )
    pretrain: float = option(0.2, "fraction of the run that copies and pastes labeled crops alone", low=0, high=0.95)
    box: float = option(2 / 3, "beta: side of the box as a fraction of the crop's", low=0.05, high=1)
    largest_component: bool = option(True, "reduce each class of a pseudo-label to its largest component")
    pl_dice: float = option(0.0, "weight of the Dice against pseudo-labels (the paper: 1)", low=0)


class BCPTrainer(TeacherMethod):
    """Student on mixed crops, EMA teacher on unlabeled ones; the student predicts."""

    settings_class = BCPSettings
    settings: BCPSettings

    def build_method(self) -> None:
        super().build_method()
        self.unsure_space = LabelSpace.from_label_manager(self.pseudo_manager)
        if self.settings.box == 1:
            self.warn("box=1 leaves no surroundings: crops are exchanged, not mixed")
        if self.settings.unsupervised_weight > 0 and self.unlabeled_batch_size() > self.batch_size:
            items = f"{self.batch_size} labeled items and {self.unlabeled_batch_size()} unlabeled ones"
            self.warn(f"{items} a step: each needs one of the other kind, the surplus is drawn and not used")

    def compute_losses(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield the loss on labeled mixtures first, L_in and L_out after ``pretrain``, or the control's."""
        s, unlabeled = self.settings, batch.get("unlabeled")
        if unlabeled is None or s.unsupervised_weight == 0:
            yield from super().compute_losses(batch)
        elif self.fraction < s.pretrain:
            yield self._pretraining(batch)
        else:
            yield from self._bidirectional(batch, unlabeled)

    def _pretraining(self, batch: dict[str, Any]) -> LossGroup:
        """Return the supervised loss on labeled crops with boxes of other labeled crops."""
        box, other = self._box(batch), partners_of(len(batch["data"])).to(self.device)
        data, target = (_each(batch[name], lambda t: paste(t[other], t, box)) for name in ("data", "target"))
        return LossGroup({"loss_supervised": self.supervised_loss(self.network(data), target)}, step=("network",))

    def _bidirectional(self, batch: dict[str, Any], unlabeled: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield L_in and L_out; each takes half of the crops, as in the paper, or the same one if there is one."""
        count = min(len(batch["data"]), len(unlabeled["strong"]))
        unlabeled = {name: unlabeled[name][:count] for name in ("weak", "strong", "valid")}  # no partner for a surplus
        alpha, pseudo, box = self.settings.unsupervised(self.fraction), self._pseudo_label(unlabeled), self._box(batch)
        half = (count + 1) // 2
        first, second = slice(0, half), slice(count - half, count)
        for name, own, region, step in (("in", first, box, ()), ("out", second, ~box, ("network",))):
            output = self.network(paste(unlabeled["strong"][own], batch["data"][own], region))
            target = _each(batch["target"], lambda t, own=own, rest=~region: self._ignore_outside(t[own], rest))
            counted = unlabeled["valid"][own] & region
            loss = pseudo_label_loss(
                self.label_space, full_resolution(output), pseudo[own], counted, dice_weight=self.settings.pl_dice
            )
            terms = {
                f"loss_supervised_{name}": self.pseudo_loss(output, target),
                f"loss_pseudo_{name}": alpha * loss,
            }
            del output, loss  # the graph must be gone before the next pass
            yield LossGroup(terms, step)

    def _ignore_outside(self, target: Tensor, region: Tensor) -> Tensor:
        return ignore_outside(self.unsure_space, target, region)

    def _pseudo_label(self, unlabeled: dict[str, Any]) -> Tensor:
        """Return the teacher's hard labels of the weak view, filtered."""
        hard = self.label_space.harden(self.teach(unlabeled["weak"]))
        hard = largest_components(hard) if self.settings.largest_component else hard
        self.watch_foreground("teacher", hard, unlabeled["valid"])
        return hard

    def _box(self, batch: dict[str, Any]) -> Tensor:
        return random_box(batch["data"].shape[2:], self.settings.box, self.device)


def _each(value: Tensor | list[Tensor], change: Any) -> Any:
    """Apply a function to a tensor, or to every resolution of a target."""
    return [change(v) for v in value] if isinstance(value, list) else change(value)
