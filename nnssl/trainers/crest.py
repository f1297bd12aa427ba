"""CReST on two peers: pseudo-labels of rare classes count in full, those of frequent classes by their rank.

Wei et al., "CReST: A Class-Rebalancing Self-Training Framework for Imbalanced Semi-Supervised Learning", CVPR 2021
(arXiv 2102.09559), in the form in which DHC (arXiv 2307.11960) compares it: cross pseudo supervision. With classes in
descending order of their counts, N_1 >= ... >= N_L, a pseudo-label of class l is used with rate (eq. 1)::

    mu_l = (N_(L+1-l) / N_1) ^ alpha

The rate is a weight of the cross-entropy here; the paper takes that share of the images of a class, the most certain
ones, and counts N in the labeled set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nnssl.trainers.settings import option
from nnssl.trainers.two_networks import CountWeightedMethod, CountWeightSettings


@dataclass(frozen=True)
class CReSTSettings(CountWeightSettings):
    """Settings of CReST."""

    alpha: float = option(1 / 3, "exponent of the rate; near 0 all classes weigh alike", low=1e-3)


def reversed_rank_rate(counts: Tensor, alpha: float = 1 / 3) -> Tensor:
    """Return mu (C,) of counts (C,) above 0: each class has the relative frequency of its mirror in the ranking."""
    order = counts.argsort(descending=True, stable=True)
    frequency = (counts[order] / counts.max()) ** alpha
    return torch.empty_like(frequency).scatter(0, order, frequency.flip(0))


class CReSTTrainer(CountWeightedMethod):
    """Two peers whose cross terms weigh classes by the reversed ranking of their frequency; the first predicts."""

    settings_class = CReSTSettings
    settings: CReSTSettings

    def rule(self, counts: Tensor) -> Tensor:
        return reversed_rank_rate(counts, self.settings.alpha)
