"""Class prototypes: K unit vectors a class, moved by the embeddings assigned to them, without gradient.

Online clustering as in Zhou et al. 2022 (ProtoSeg, arXiv 2203.15102), applied to label embeddings as in Xi et al. 2025
(arXiv 2507.16429). Label embeddings of a class are mostly identical (every voxel whose neighborhood holds one label),
and identical rows make Sinkhorn's assignment uniform; ``sinkhorn_dedup`` clusters what differs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from nnssl.losses.precision import fp32

ASSIGNMENTS = ("sinkhorn_dedup", "sinkhorn", "cosine")
UPDATES = ("argmax", "gumbel")
#: Entropy weight and iterations of Sinkhorn, and temperature of the Gumbel softmax, as ProtoSeg has them.
EPSILON, ITERATIONS, GUMBEL_TAU = 0.05, 3, 0.5
#: Embeddings that agree to this step in every component count as one.
RESOLUTION = 1e-3
#: Standard deviation of the noise that tells rows apart that start from one embedding.
SEED_NOISE = 0.01


@fp32
@torch.no_grad()
def sinkhorn(
    similarity: Tensor, weights: Tensor | None = None, epsilon: float = EPSILON, iterations: int = ITERATIONS
) -> Tensor:
    """Return a soft assignment (n, K) whose rows sum to 1 and whose columns share the weight evenly.

    Sinkhorn-Knopp on ``exp(similarity / epsilon)`` (Cuturi 2013); after finitely many iterations the rows are exact
    and the columns nearly so.

    Args:
        similarity: (n, K).
        weights: weight of each row (n,), positive; None: all equal.
        epsilon: entropy weight.
        iterations: of normalizing columns, then rows.
    """
    n, k = similarity.shape
    share = torch.full((n,), 1 / n, device=similarity.device) if weights is None else weights / weights.sum()
    # exp(20) is no number in half precision; a constant factor changes nothing
    q = ((similarity - similarity.max()) / epsilon).exp()
    q = q / q.sum()
    for _ in range(iterations):
        q = q / (q.sum(0, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny) * k)
        q = q * (share / q.sum(1).clamp_min(torch.finfo(q.dtype).tiny))[:, None]
    return q / share[:, None]


@torch.no_grad()
def distinct(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (index of one row of each kind, kind of every row (n,), rows of each kind) for rows (n, D).

    Rows are alike that agree to `RESOLUTION`. They are compared by a hash: sorting whole rows takes a hundred times as
    long.
    """
    levels = (rows.float() / RESOLUTION).round().to(torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator).to(rows.device)
    _, kind, counts = (levels * factors).sum(1).unique(return_inverse=True, return_counts=True)
    first = torch.full((len(counts),), len(rows), device=rows.device)
    first.scatter_reduce_(0, kind, torch.arange(len(rows), device=rows.device), "amin")
    return first, kind, counts


@torch.no_grad()
def assign(similarity: Tensor, embeddings: Tensor, how: str = "sinkhorn_dedup") -> tuple[Tensor, Tensor]:
    """Assign the embeddings of one class to its prototypes.

    Args:
        similarity: embeddings times prototypes (n, K).
        embeddings: unit rows (n, D).
        how: "cosine" takes the most similar prototype; "sinkhorn" shares the embeddings evenly among prototypes;
            "sinkhorn_dedup" does so with distinct embeddings, each weighted by ``log(1 + its number)``, and falls back
            to "cosine" with fewer than 2 K of them.

    Returns:
        (k(n) (n,), soft assignment (n, K), rows sum to 1; one-hot for "cosine").

    Raises:
        ValueError: unknown way.
    """
    if how not in ASSIGNMENTS:
        raise ValueError(f"how must be one of {ASSIGNMENTS}, got {how!r}")
    k = similarity.shape[1]
    if how == "sinkhorn_dedup":
        first, kind, counts = distinct(embeddings)
        if len(first) >= 2 * k:
            soft = sinkhorn(similarity[first], counts.float().log1p())[kind]
            return soft.argmax(1), soft
    elif how == "sinkhorn":
        soft = sinkhorn(similarity)
        return soft.argmax(1), soft
    hard = similarity.argmax(1)
    return hard, functional.one_hot(hard, k).to(similarity)


@torch.no_grad()
def choose_cells(labels: Tensor, boundary: Tensor, limit: int, classes: int) -> Tensor:
    """Return indices of at most ``limit`` cells of each class, those at a boundary first, random otherwise.

    Args:
        labels: classes (n,); values of ``classes`` and above are left out.
        boundary: bool (n,), cells whose neighborhood holds several labels.
        limit: cells a class.
        classes: C.
    """
    chosen = []
    for c in range(classes):
        own = (labels == c).nonzero()[:, 0]
        if len(own) > limit:
            rank = torch.rand(len(own), device=labels.device) + boundary[own]
            own = own[rank.topk(limit).indices].sort().values
        chosen.append(own)
    return torch.cat(chosen)


class Prototypes(nn.Module):
    """Prototypes p (C, K, D) as buffers, equal on all ranks.

    A class gets its prototypes from its own embeddings when it is first seen; a prototype that nothing was assigned to
    for long starts again from an embedding of its class.

    Args:
        classes: C.
        per_class: K.
        dim: D.
        momentum: of the prototypes.
        how: assignment, see :func:`assign`.
        update: "argmax" moves a prototype by the embeddings assigned to it; "gumbel" by those of a random hard sample
            of the soft assignment, as ProtoSeg's code does.
        patience: updates of its class after which an unused prototype starts again; 0 = never.

    Raises:
        ValueError: a number is out of range, or a name is unknown.
    """

    value: Tensor
    seen: Tensor
    idle: Tensor
    used: Tensor

    def __init__(
        self,
        classes: int,
        per_class: int = 10,
        dim: int = 256,
        momentum: float = 0.999,
        how: str = "sinkhorn_dedup",
        update: str = "argmax",
        patience: int = 1000,
    ) -> None:
        super().__init__()
        if min(classes, per_class, dim) < 1 or not 0 <= momentum < 1 or patience < 0:
            raise ValueError("classes, per_class and dim are at least 1, momentum in [0, 1), patience at least 0")
        if how not in ASSIGNMENTS or update not in UPDATES:
            raise ValueError(f"unknown assignment {how!r} or update {update!r}")
        self.momentum, self.how, self.mode, self.patience = momentum, how, update, patience
        start = nn.init.trunc_normal_(torch.empty(classes, per_class, dim), std=0.02)
        self.register_buffer("value", functional.normalize(start, dim=2))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))
        self.register_buffer("idle", torch.zeros(classes, per_class, dtype=torch.int64))
        self.register_buffer("used", torch.zeros(classes, per_class, dtype=torch.bool))

    @fp32
    @torch.no_grad()
    def update(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Assign embeddings to prototypes and move these: ``p <- l2(m p + (1 - m) l2(sum of its embeddings))``.

        Under DDP every rank must call it equally often; sums go over all ranks before the momentum step.

        Args:
            embeddings: i, unit rows (n, D); n may be 0.
            labels: classes (n,), int64, in 0..C-1.

        Returns:
            k(n) (n,), by the prototypes before they moved.
        """
        members = {c: (labels == c).nonzero()[:, 0] for c in labels.unique().tolist()}
        self._seed(embeddings, members)
        assigned = torch.zeros_like(labels)
        sums, counts = torch.zeros_like(self.value), torch.zeros_like(self.value[..., 0])
        for c, rows in members.items():
            own = embeddings[rows]
            assigned[rows], soft = assign(own @ self.value[c].T, own, self.how)
            moves = assigned[rows]
            if self.mode == "gumbel" and self.value.shape[1] > 1:
                moves = functional.gumbel_softmax(soft, GUMBEL_TAU, hard=True).argmax(1)
            sums[c].index_add_(0, moves, own)
            counts[c].index_add_(0, moves, torch.ones_like(own[:, 0]))
        _all_reduce(sums, counts)
        self._move(sums, counts)
        return assigned

    def occupancy(self) -> Tensor:
        """Return the share of prototypes of the seen classes that the last update of their class used."""
        seen = self.seen[:, None].expand_as(self.used)
        return (self.used & seen).sum() / seen.sum().clamp_min(1)

    def _move(self, sums: Tensor, counts: Tensor) -> None:
        present, used = counts.sum(1) > 0, counts > 0
        blended = self.momentum * self.value + (1 - self.momentum) * functional.normalize(sums, dim=2)
        self.value.copy_(torch.where(used[..., None], functional.normalize(blended, dim=2), self.value))
        self.used.copy_(torch.where(present[:, None], used, self.used))
        self.idle.copy_(torch.where(used, 0, self.idle + present[:, None]))

    def _seed(self, embeddings: Tensor, members: dict[int, Tensor]) -> None:
        """Give new classes and unused prototypes a start among the embeddings of their class."""
        stale = self.idle >= self.patience if self.patience else torch.zeros_like(self.used)
        wanted = (stale | ~self.seen[:, None]).expand_as(self.used)
        if not wanted.any():  # equal on all ranks, as the buffers are: the collective below is met by all or by none
            return
        candidates = torch.zeros_like(self.value)
        has = torch.zeros(len(self.value), device=self.value.device)
        for c, rows in members.items():
            if wanted[c].any():
                candidates[c], has[c] = _spread(embeddings[rows], self.value.shape[1]), 1
        candidates, has = _first_rank_with(candidates, has)
        take = wanted & (has > 0)[:, None]
        self.value.copy_(torch.where(take[..., None], candidates, self.value))
        self.idle.masked_fill_(take, 0)
        self.seen.logical_or_(has > 0)


def _spread(rows: Tensor, count: int) -> Tensor:
    """Return ``count`` unit rows: distinct ones of ``rows`` in random order, repeated where too few, plus noise."""
    different = rows[distinct(rows)[0]]
    order = torch.randperm(len(different), device=rows.device)
    chosen = different[order.repeat(-(-count // len(order)))[:count]]
    return functional.normalize(chosen + SEED_NOISE * torch.randn_like(chosen), dim=1)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _all_reduce(*tensors: Tensor) -> None:
    """Sum tensors over all ranks, in one collective."""
    if not _distributed():
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    for tensor, chunk in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(chunk.view_as(tensor))


def _first_rank_with(candidates: Tensor, has: Tensor) -> tuple[Tensor, Tensor]:
    """Return each class's candidates from the first rank that has some, and whether any rank has."""
    if not _distributed():
        return candidates, has
    everyone = [torch.zeros_like(has) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, has)
    first = torch.stack(everyone).argmax(0)  # the first of equal ones
    mine = (first == dist.get_rank()) & (has > 0)
    candidates = candidates * mine.view(-1, 1, 1)
    dist.all_reduce(candidates)
    return candidates, torch.stack(everyone).amax(0)
