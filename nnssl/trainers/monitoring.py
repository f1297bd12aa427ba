"""Is each branch informative? The Dice of everything that makes pseudo-labels, on labeled cases that are watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from nnssl.training.label_space import LabelSpace


@torch.no_grad()
def branch_dice(
    branches: Callable[[Tensor], Mapping[str, Tensor]],
    batches: Iterable[dict],
    space: LabelSpace,
    device: torch.device,
) -> dict[str, float | None]:
    """Return the mean foreground Dice of each branch over all given patches.

    Overlaps are summed over the patches before the Dice is formed, as nnU-Net does for its pseudo Dice; a class that
    neither labels nor prediction hold is left out, and None means that no class is left.

    Args:
        branches: function from images (b, c, ...) to the logits (b, C, ...) of each branch, by name.
        batches: labeled batches (``data``, ``target``).
        space: what the heads mean.
        device: where the branches run.
    """
    sums: dict[str, Tensor] = {}
    for batch in batches:
        data = batch["data"].to(device)
        target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
        target = target.to(device)
        truth, valid = space.one_hot(target), space.valid(target)
        axes = [0, *range(2, truth.ndim)]
        for name, logits in branches(data).items():
            guess = space.one_hot(space.harden(space.probs(logits))) * valid
            counts = torch.stack([(guess * truth).sum(axes), guess.sum(axes) + truth.sum(axes)])
            sums[name] = sums[name] + counts if name in sums else counts
    result = {}
    for name, counts in sums.items():
        overlap, total = counts if space.regions else counts[:, 1:]
        present = total > 0
        result[name] = (2 * overlap[present] / total[present]).mean().item() if present.any() else None
    return result
