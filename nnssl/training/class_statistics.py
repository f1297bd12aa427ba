"""Statistics of classes over a run: how often they occur, how well they are known, and weights that follow.

Each keeps its tensors on one device, resumes exactly, and takes in counts of all processes, so that every one
weighs alike. A class that a batch does not hold keeps what was known of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def count_classes(label: Tensor, classes: int, valid: Tensor, all_ranks: bool = False) -> Tensor:
    """Return the voxels of each class as float32 (C,).

    Args:
        label: integer map (b, 1, ...); values outside 0..C-1 count for no class.
        classes: C.
        valid: bool (b, 1, ...), True where a voxel counts.
        all_ranks: sum over all processes (one collective).
    """
    kinds = torch.arange(classes, device=label.device).view(1, -1, *[1] * (label.ndim - 2))
    counts = ((label == kinds) & valid).sum([0, *range(2, label.ndim)])  # integers: exact at any size
    if all_ranks:
        dist.all_reduce(counts)
    return counts.float()


def absent_as_rarest(counts: Tensor) -> Tensor:
    """Return counts (C,) in which a class of no voxel has as many as the rarest present one (1 if none is).

    Weights grow as classes get rarer and have no value at 0; a class that did not occur is taken for a rare one.
    """
    rarest = counts.where(counts > 0, counts.new_full((), torch.inf)).min()
    rarest = rarest.where(rarest.isfinite(), torch.ones_like(rarest))
    return counts.where(counts > 0, rarest)


def sampling_rate(confidence: Tensor, exponent: float) -> Tensor:
    """Return ``((1 - C) / max (1 - C)) ^ exponent`` (C,) of confidences in 0..1: 1 for the least known class."""
    doubt = (1 - confidence).clamp_min(0)
    return (doubt / doubt.max().clamp_min(1e-12)) ** exponent


class ClassState:
    """Tensors that a checkpoint holds, by the names of their attributes."""

    NAMES: ClassVar[tuple[str, ...]]

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that is remembered of the classes."""
        return {name: getattr(self, name) for name in self.NAMES}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for name, value in self.state_dict().items():
            setattr(self, name, state[name].to(value))


class ClassCounts(ClassState):
    """Voxels of each class over the whole run: ``value`` is int64 (C,)."""

    NAMES = ("value",)

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        self.value = torch.zeros(classes, dtype=torch.int64, device=device)

    def update(self, counts: Tensor) -> None:
        """Add a batch's counts (C,)."""
        self.value = self.value + counts.long()


class ClassWeights(ClassState):
    """Moving average of weights that a rule derives from a batch's counts: ``W <- d W + (1 - d) rule(n)``.

    Args:
        classes: C.
        rule: weights (C,) of counts (C,) above 0.
        decay: d, in [0, 1).
        device: where the state lies.

    A class without a voxel keeps its weight. So do all in a batch of one class alone, which tells nothing of their
    proportions.
    """

    NAMES = ("value", "started")

    def __init__(
        self, classes: int, rule: Callable[[Tensor], Tensor], decay: float = 0.99, device: torch.device | str = "cpu"
    ) -> None:
        self.rule, self.decay = rule, decay
        self.value = torch.ones(classes, device=device)  # W
        self.started = torch.zeros((), dtype=torch.bool, device=device)
        self._waiting = True

    def waits(self) -> bool:
        """Return whether :meth:`start` would still change anything, so that counts need not be made in vain.

        The same on all ranks, since counts are. Once started, this no longer asks the device.
        """
        self._waiting = self._waiting and not bool(self.started)
        return self._waiting

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._waiting = True

    def start(self, counts: Tensor) -> None:
        """Take the rule's weights of these counts (C,) for the first value; later calls change nothing."""
        first = ~self.started & ((counts > 0).sum() > 1)
        self.value = torch.where(first, self.rule(absent_as_rarest(counts)), self.value)
        self.started = self.started | first

    def update(self, counts: Tensor) -> None:
        """Move the weights toward those of a batch's counts (C,)."""
        seen = (counts > 0) & ((counts > 0).sum() > 1)
        moved = self.decay * self.value + (1 - self.decay) * self.rule(absent_as_rarest(counts))
        self.value = torch.where(seen, moved, self.value)


class ConfidenceBank(ClassState):
    """Mean probability that voxels of each class get for it, averaged over a run (CLD, arXiv 2205.03644).

    Sums over ``every`` batches give one value; the values have a moving average that begins with the first one.

    Args:
        classes: C.
        decay: of the moving average, in [0, 1).
        every: batches a value is taken over.
        device: where the state lies.
    """

    NAMES = ("value", "known", "sums", "counts", "batches")

    def __init__(self, classes: int, decay: float = 0.999, every: int = 8, device: torch.device | str = "cpu") -> None:
        self.decay, self.every = decay, every
        self.value, self.sums, self.counts = (torch.zeros(classes, device=device) for _ in range(3))
        self.known = torch.zeros(classes, dtype=torch.bool, device=device)
        self.batches = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, probs: Tensor, onehot: Tensor, all_ranks: bool = False) -> None:
        """Take in a labeled batch.

        Args:
            probs: (b, C, ...).
            onehot: labels (b, C, ...), zero where no voxel counts.
            all_ranks: sum over all processes (one collective).
        """
        axes = [0, *range(2, probs.ndim)]
        added = torch.stack([(probs * onehot).sum(axes), onehot.sum(axes)])
        if all_ranks:
            dist.all_reduce(added)
        sums, counts, batches = self.sums + added[0], self.counts + added[1], self.batches + 1
        due = batches >= self.every
        seen = due & (counts > 0)
        latest = sums / counts.clamp_min(1)
        moved = torch.where(self.known, self.decay * self.value + (1 - self.decay) * latest, latest)
        self.value, self.known = torch.where(seen, moved, self.value), self.known | seen
        self.sums, self.counts, self.batches = (t.where(~due, torch.zeros_like(t)) for t in (sums, counts, batches))
