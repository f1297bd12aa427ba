"""Memory bank of labeled voxel features for contrastive learning.

One slot per labeled case, overwritten at each visit, as in CAML (Gao et al. 2023, arXiv 2307.06312); a slot is bounded
per class. Random choices use torch's global generator or one that is passed, so seeded steps repeat.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: Features of one case by class.
Slot = dict[int, Tensor]


def choose(count: int, limit: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Return ``min(count, limit)`` distinct random indices below ``count``, as int64 on ``device``."""
    where = device if generator is None else generator.device
    return torch.randperm(count, generator=generator, device=where)[:limit].to(device)


def choose_per_class(
    labels: Tensor, eligible: Tensor, limit: int, generator: torch.Generator | None = None
) -> dict[int, Tensor]:
    """Choose at most ``limit`` random eligible voxels of each class.

    Lets a caller project only the voxels that it will store.

    Args:
        labels: integer labels (M,).
        eligible: bool (M,), for example where the prediction is correct.
        limit: voxels per class.
        generator: source of randomness; None for torch's global one.

    Returns:
        For each class present, ascending, indices into ``labels``.
    """
    chosen = {}
    for label in labels[eligible].unique().tolist():
        candidates = ((labels == label) & eligible).nonzero()[:, 0]
        chosen[int(label)] = candidates[choose(len(candidates), limit, labels.device, generator)]
    return chosen


class MemoryBank:
    """Keep features of labeled voxels per case and class, detached, in float32.

    Holds at most ``capacity`` features for each class of each case.

    Args:
        capacity: features per case and class.
        min_available: a class with fewer features over all cases is not drawn from.
        device: where features are kept.

    Raises:
        ValueError: a number is smaller than 1.
    """

    def __init__(self, capacity: int = 2048, min_available: int = 16, device: torch.device | str | None = None) -> None:
        if capacity < 1 or min_available < 1:
            raise ValueError(f"capacity and min_available are at least 1, got {capacity} and {min_available}")
        self.capacity, self.min_available = capacity, min_available
        self.device = torch.device(device if device is not None else "cpu")
        self._slots: dict[str, Slot] = {}

    @torch.no_grad()
    def push(
        self,
        case_ids: Sequence[str],
        features: Sequence[Tensor],
        labels: Sequence[Tensor],
        generator: torch.Generator | None = None,
        all_ranks: bool = False,
    ) -> None:
        """Replace the slots of the given cases.

        A case that occurs twice in one call keeps its last visit, over all ranks if they share what they push.

        Args:
            case_ids: names of the cases.
            features: per case (M, d), projected features of correctly predicted voxels.
            labels: per case integer labels (M,).
            generator: source of randomness; None for torch's global one.
            all_ranks: store what every process pushes, in the order of ranks, so that their banks stay equal. Every
                process must call then, those without a case with empty lists.

        Raises:
            ValueError: lengths do not fit.
        """
        if not len(case_ids) == len(features) == len(labels):
            raise ValueError(f"{len(case_ids)} cases, {len(features)} features and {len(labels)} labels differ")
        slots: list[tuple[str, Slot]] = []
        for case, feature, label in zip(case_ids, features, labels, strict=True):
            if feature.ndim != 2 or label.shape != feature.shape[:1]:
                raise ValueError(f"{case}: features {tuple(feature.shape)} and labels {tuple(label.shape)} do not fit")
            chosen = choose_per_class(label, torch.ones_like(label, dtype=torch.bool), self.capacity, generator)
            slot = {c: feature.detach()[index].to(self.device, torch.float32) for c, index in chosen.items()}
            slots.append((str(case), slot))
        self._slots.update(_of_all_ranks(slots, self.device) if all_ranks else slots)

    def available(self) -> dict[int, int]:
        """Return the number of stored features of each class, classes ascending."""
        counts: dict[int, int] = {}
        for slot in self._slots.values():
            for c, feature in slot.items():
                counts[c] = counts.get(c, 0) + len(feature)
        return dict(sorted(counts.items()))

    @torch.no_grad()
    def draw(self, classes: Iterable[int], p: int, generator: torch.Generator | None = None) -> dict[int, Tensor]:
        """Draw at most ``p`` distinct random features of each class over all cases.

        Args:
            classes: classes wanted.
            p: features per class.
            generator: source of randomness; None for torch's global one.

        Returns:
            Per class (min(p, available), d); a class with fewer than ``min_available`` features is left out.

        Raises:
            ValueError: ``p`` is smaller than 1.
        """
        if p < 1:
            raise ValueError(f"p must be at least 1, got {p}")
        drawn = {}
        for c in sorted(set(map(int, classes))):
            # cases in the order of their names: the draw must not depend on the history of visits or a resume
            stored = [slot[c] for _, slot in sorted(self._slots.items()) if c in slot]
            count = sum(map(len, stored))
            if count >= self.min_available:
                drawn[c] = torch.cat(stored)[choose(count, p, self.device, generator)]
        return drawn

    def state_dict(self) -> dict[str, dict[int, Tensor]]:
        """Return the features by case name and class, as plain dictionaries of tensors."""
        return {case: dict(sorted(slot.items())) for case, slot in sorted(self._slots.items())}

    def load_state_dict(self, state: Mapping[str, Mapping[int, Any]]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: a slot holds more features of a class than the capacity.
        """
        largest = max((len(feature) for slot in state.values() for feature in slot.values()), default=0)
        if largest > self.capacity:
            raise ValueError(f"a stored slot holds {largest} features of a class, the capacity is {self.capacity}")
        self._slots = {
            str(case): {int(c): feature.to(self.device, torch.float32) for c, feature in slot.items()}
            for case, slot in state.items()
        }


def _of_all_ranks(slots: list[tuple[str, Slot]], device: torch.device) -> list[tuple[str, Slot]]:
    """Return the slots of every process, in the order of ranks: one collective for their sizes, one for features."""
    own = [feature for _, slot in slots for feature in slot.values()]
    sizes = [(case, {c: len(feature) for c, feature in slot.items()}) for case, slot in slots]
    described: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(described, (sizes, own[0].shape[1] if own else 0))
    dim = max(dim for _, dim in described)
    longest = max(sum(n for _, slot in theirs for n in slot.values()) for theirs, _ in described)
    padded = torch.zeros(longest, dim, device=device)  # a collective takes tensors of one shape
    if own:
        padded[: sum(map(len, own))] = torch.cat(own)
    parts = [torch.empty_like(padded) for _ in described]
    dist.all_gather(parts, padded)
    gathered = []
    for (theirs, _), part in zip(described, parts, strict=True):
        start = 0
        for case, counts in theirs:
            slot = {}
            for c, count in counts.items():
                slot[c], start = part[start : start + count].clone(), start + count
            gathered.append((case, slot))
    return gathered
