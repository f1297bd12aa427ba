"""Small helpers that several test modules import."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    """Return copies of every parameter and buffer."""
    return [t.detach().clone() for t in [*module.parameters(), *module.buffers()]]


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    """Return whether two sequences of tensors agree bit for bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
