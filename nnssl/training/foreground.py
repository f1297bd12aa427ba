"""Watch over collapse: the foreground fraction that each branch predicts, against the labeled one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LABELED = "labeled"


class ForegroundWatch:
    """Accumulate foreground fractions over an epoch without a device synchronization per step.

    Branches that only confirm each other can drift to all foreground or all background; a predicted fraction far
    from the labeled one shows it.

    Args:
        factor: a branch runs away above ``factor`` times, or below ``1 / factor`` of, the reference's fraction.
        reference: name under which the labels themselves are counted.

    Raises:
        ValueError: the factor is not greater than 1.
    """

    def __init__(self, factor: float = 5.0, reference: str = LABELED) -> None:
        if not factor > 1:
            raise ValueError(f"factor must be greater than 1, got {factor}")
        self.factor, self.reference = factor, reference
        self._counts: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, name: str, hard_labels: Tensor, valid: Tensor | None = None) -> None:
        """Count the foreground of one batch.

        Args:
            name: the branch, or the reference's name for the labels.
            hard_labels: integer map (b, 1, ...), foreground where greater than 0, or bool regions (b, R, ...),
                foreground where any region is.
            valid: bool (b, 1, ...), True where a voxel counts (ignored labels do not); None for all.
        """
        foreground = hard_labels.any(1, keepdim=True) if hard_labels.dtype == torch.bool else hard_labels > 0
        voxels = torch.ones_like(foreground) if valid is None else valid
        counts = torch.stack([(foreground & voxels).sum(), voxels.sum()])
        known = self._counts.get(name)
        self._counts[name] = counts if known is None else known.to(counts.device) + counts

    def report(self) -> dict[str, float]:
        """Return the foreground fraction of each name that has seen a voxel (one synchronization)."""
        if not self._counts:
            return {}
        names = sorted(self._counts)
        device = self._counts[names[0]].device
        counts = torch.stack([self._counts[name].to(device) for name in names]).tolist()
        return {name: seen / total for name, (seen, total) in zip(names, counts, strict=True) if total}

    def runaway(self) -> list[str]:
        """Return the branches whose fraction is far from the reference's.

        Empty while the reference is unknown or has no foreground, since nothing can then be compared.
        """
        fractions = self.report()
        reference = fractions.pop(self.reference, 0.0)
        if not reference:
            return []
        low, high = reference / self.factor, reference * self.factor
        return [name for name, fraction in fractions.items() if fraction < low or fraction > high]

    def reset(self) -> None:
        """Forget all counts, at the start of an epoch."""
        self._counts = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counts (foreground voxels, voxels) by name, as plain tensors."""
        return dict(sorted(self._counts.items()))  # updates replace tensors, so this is a snapshot

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._counts = dict(state)
