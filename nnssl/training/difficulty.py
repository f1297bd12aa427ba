"""Difficulty-aware re-weighting (DRS) of A&D: classes that are learned slowly, or forgotten, weigh more.

Wang and Li, NeurIPS 2023 (arXiv 2310.11320), equations 3 to 5, with the authors' code where the two
differ. For the Dice lambda_k of class k at iteration e, ``delta = lambda_e - lambda_(e-1)``::

    learn    dl_k = EMA[max(delta, 0) ln(lambda_e / lambda_(e-1))]      unlearn    du_k = EMA[min(delta, 0) ln(...)]
    d_k = ((du_k + eps) / (dl_k + eps)) ^ alpha                         w_k = EMA[1 - lambda_k]
    W_k = K d_k w_k

Both terms have the form of the population stability index and are at least 0. EMA is a moving average of decay
``1 - 1/tau``, as in the code; the paper sums over the last tau iterations instead, which is the other memory.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nnssl.losses.precision import fp32

EPS = 1e-8
NORMS = ("none", "paper", "max")
MEMORIES = ("average", "sum")
STATE = ("dice", "learn", "unlearn", "reversed_dice", "latest", "filled")


class Difficulty:
    """Weights of classes from the history of their Dice; everything is float32 on one device.

    Args:
        classes: K, background included.
        alpha: exponent of the difficulty d.
        window: tau, iterations that are remembered.
        memory: "average" is a moving average over about tau iterations, "sum" is equation 3, a sum over the last tau
            iterations (for w their mean).
        norm: "none" is ``K d w``, the authors' code; "paper" is ``d w``, equation 5; "max" is ``K d w / max d w``.
        hold_absent: leave a class alone in iterations where neither labels nor prediction hold it; False counts it as
            Dice 1/2, as the code does, which moves both d and w of classes that are often absent.
        device: where the state lies.

    Raises:
        ValueError: an unknown norm or memory.
    """

    def __init__(
        self,
        classes: int,
        alpha: float = 0.2,
        window: int = 50,
        norm: str = "none",
        memory: str = "average",
        hold_absent: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        if norm not in NORMS or memory not in MEMORIES:
            raise ValueError(f"norm is one of {NORMS} and memory one of {MEMORIES}, got {norm!r} and {memory!r}")
        self.alpha, self.norm, self.hold_absent, self.sums = alpha, norm, hold_absent, memory == "sum"
        self.decay = 1 - 1 / window
        self.dice = torch.full((classes,), EPS, device=device)  # lambda
        self.learn, self.unlearn = torch.zeros(classes, device=device), torch.zeros(classes, device=device)
        self.reversed_dice = torch.ones(classes, device=device)  # w
        # what the last iterations added to the three above, the newest last, and how many of them there were
        self.latest = torch.zeros(3, window if self.sums else 0, classes, device=device)
        self.filled = torch.zeros(classes, device=device)

    @torch.no_grad()
    @fp32
    def update(self, counts: Tensor) -> Tensor:
        """Take in a batch and return the new weights W (K,).

        Args:
            counts: overlap, predicted and labeled voxels of each class, (3, K), see :func:`count_voxels`.
        """
        overlap, predicted, labeled = counts.to(self.dice)
        total = predicted + labeled
        dice = (2 * overlap + EPS) / (total + 2 * EPS)
        delta, ratio = dice - self.dice, (dice / self.dice).log()
        added = torch.stack([delta.clamp_min(0) * ratio, delta.clamp_max(0) * ratio, 1 - dice])
        moved = self._summed(added) if self.sums else self._averaged(added)
        seen = (total > 0) if self.hold_absent else torch.ones_like(total, dtype=torch.bool)
        for name, value in {"dice": dice, **moved}.items():
            setattr(self, name, torch.where(seen, value, getattr(self, name)))
        return self.weights()

    def _averaged(self, added: Tensor) -> dict[str, Tensor]:
        old = torch.stack([self.learn, self.unlearn, self.reversed_dice])
        learn, unlearn, reversed_dice = self.decay * old + (1 - self.decay) * added
        return {"learn": learn, "unlearn": unlearn, "reversed_dice": reversed_dice}

    def _summed(self, added: Tensor) -> dict[str, Tensor]:
        latest = torch.cat([self.latest[:, 1:], added[:, None]], 1)
        filled = (self.filled + 1).clamp_max(latest.shape[1])
        learn, unlearn, missing = latest.sum(1)
        state = {"learn": learn, "unlearn": unlearn, "reversed_dice": missing / filled}
        return {**state, "latest": latest, "filled": filled}

    def weights(self) -> Tensor:
        """Return W (K,) of the present state."""
        product = ((self.unlearn + EPS) / (self.learn + EPS)) ** self.alpha * self.reversed_dice
        if self.norm == "paper":
            return product
        return len(product) * (product / product.max().clamp_min(EPS) if self.norm == "max" else product)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that is remembered of the classes."""
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for name, value in self.state_dict().items():
            setattr(self, name, state[name].to(value))


@torch.no_grad()
def count_voxels(predicted: Tensor, labeled: Tensor, all_ranks: bool = False) -> Tensor:
    """Return overlap, predicted and labeled voxels of each class, (3, K).

    Args:
        predicted: one-hot prediction (b, K, ...), zero where no voxel counts.
        labeled: one-hot label (b, K, ...), zero where no voxel counts.
        all_ranks: sum over all processes, so that every one weighs alike (one collective).
    """
    axes = [0, *range(2, labeled.ndim)]
    counts = torch.stack([(predicted * labeled).sum(axes), predicted.sum(axes), labeled.sum(axes)])
    if all_ranks:
        dist.all_reduce(counts)
    return counts
