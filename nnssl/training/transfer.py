"""Knowledge transfer by parameters instead of outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn


@torch.no_grad()
def blend(matched: Iterable[tuple[nn.Parameter, Sequence[nn.Parameter]]], keep: float) -> None:
    """Pull parameters toward the mean of others: ``theta <- keep theta + (1 - keep) mean(sources)``.

    Of A&D (Wang and Li, NeurIPS 2023, arXiv 2310.11320), with xi and psi as sources. Optimizer state
    and running statistics stay.

    Args:
        matched: pairs of a parameter and its sources, all of one shape.
        keep: share of the parameter itself, in [0, 1]; 1 changes nothing.

    Raises:
        ValueError: shapes differ.
    """
    for target, sources in matched:
        if any(source.shape != target.shape for source in sources):
            raise ValueError("a blend needs parameters of one shape")
        mean = sources[0] if len(sources) == 1 else torch.stack(list(sources)).mean(0)
        target.lerp_(mean, 1 - keep)
