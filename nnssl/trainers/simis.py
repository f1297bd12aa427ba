"""SimiS on two peers: pseudo-labels count by how far their class is behind the most frequent one.

Chen et al., "An Embarrassingly Simple Baseline for Imbalanced Semi-Supervised Learning", 2022 (arXiv 2211.11086), in
the form in which DHC (arXiv 2307.11960) compares it: cross pseudo supervision. For the shares P of the classes::

    W_c = C (max P - P_c)

The paper adds pseudo-labeled images to a class until it is as large as the largest one; this is the share to add.
"""

from __future__ import annotations

from torch import Tensor

from nnssl.trainers.two_networks import CountWeightedMethod


def missing_share(counts: Tensor) -> Tensor:
    """Return ``C (max P - P)`` (C,) of counts (C,), P their shares; 0 for the most frequent class."""
    shares = counts / counts.sum()
    return len(counts) * (shares.max() - shares)


class SimiSTrainer(CountWeightedMethod):
    """Two peers whose cross terms weigh classes by what they lack to the largest; the first predicts."""

    def rule(self, counts: Tensor) -> Tensor:
        return missing_share(counts)
