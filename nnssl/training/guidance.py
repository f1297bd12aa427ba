"""Calibration guidance: how far one label map is from a better one, as a number a network can be conditioned on."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

MEASURES = ("dice", "jaccard", "both", "fixed", "random")
#: Guidance in units of the sinusoidal embedding, as in DiffRect's code: 0 for equal maps, 999 for disjoint ones.
SCALE = 999.0
SMOOTH = 1e-5


def agreement(
    a: Tensor,
    b: Tensor,
    measure: str = "dice",
    valid: Tensor | None = None,
    per_item: bool = True,
    present_only: bool = True,
) -> Tensor:
    """Return the agreement of two one-hot maps in [0, 1] (for "both": [0, 2], the sum), one an item (b,).

    Args:
        a: one-hot (b, C, ...), background included.
        b: one-hot (b, C, ...), the better map.
        measure: "dice", "jaccard" or "both"; "fixed" gives 0.5 and "random" a uniform number, whatever the maps.
        valid: bool (b, 1, ...), True where a voxel counts.
        per_item: False counts over the whole batch and repeats the number.
        present_only: average over the classes that b holds; False over all, one absent from both counts 1.
    """
    if measure in ("fixed", "random"):
        values = torch.rand(len(a) if per_item else 1, device=a.device) if measure == "random" else a.new_tensor([0.5])
        return values.expand(len(a))
    if valid is not None:
        a, b = a * valid, b * valid
    axes = list(range(2, a.ndim)) if per_item else [0, *range(2, a.ndim)]
    overlap, total = (a * b).sum(axes, keepdim=True), a.sum(axes, keepdim=True) + b.sum(axes, keepdim=True)
    dice = (2 * overlap + SMOOTH) / (total + SMOOTH)
    jaccard = (overlap + SMOOTH) / (total - overlap + SMOOTH)
    values = {"dice": dice, "jaccard": jaccard, "both": dice + jaccard}[measure]
    # a class that a alone holds lowers the others' agreement; as a class of its own one false voxel would halve it
    present = b.sum(axes, keepdim=True) > 0
    # a better map of which no voxel counts is differed from nowhere
    counted = (present | ~present.any(1, keepdim=True)).float() if present_only else torch.ones_like(total)
    per_row = (values * counted).sum(1).flatten() / counted.sum(1).flatten()
    return per_row.expand(len(a))


def calibration(overlap: Tensor, form: str = "distance") -> Tensor:
    """Return tau of an agreement g: ``999 (1 - g)`` as in the authors' code, or g itself as the paper prints."""
    return SCALE * (1 - overlap) if form == "distance" else overlap


class RunningGuidance:
    """The latest agreement or its moving average, kept for passes that have no better map to compare with.

    Args:
        decay: of the average; 0 keeps the latest value.
        start: value before the first update.
        device: where the value lies.
    """

    def __init__(self, decay: float = 0.0, start: float = SCALE / 2, device: torch.device | str = "cpu") -> None:
        self.decay = decay
        self.value = torch.tensor(float(start), device=device)
        self.seen = torch.tensor(0, device=device)

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Take in the guidance of a batch (b,), of all ranks alike, without a device synchronization."""
        keep, mean = self.decay * (self.seen > 0), values.mean()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean = mean / dist.get_world_size()
        self.value = keep * self.value + (1 - keep) * mean
        self.seen = torch.ones_like(self.seen)

    def expand(self, count: int) -> Tensor:
        """Return the value for ``count`` items (count,)."""
        return self.value.expand(count)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the value and whether there has been one."""
        return {"value": self.value, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.value, self.seen = state["value"].to(self.value.device), state["seen"].to(self.seen.device)
