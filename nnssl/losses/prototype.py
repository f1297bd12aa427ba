"""Prototype losses: embeddings against the class prototypes they belong to.

Of Xi et al. 2025 (arXiv 2507.16429): i an l2-normalized embedding, p_ck prototype k of class c, k(n) the prototype
embedding n is assigned to, tau the temperature. And of SS-Net (Wu et al. 2022, arXiv 2203.01324). Prototypes are
constants here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nnssl.losses.precision import fp32


@fp32
def inter_loss(
    embeddings: Tensor,
    labels: Tensor,
    assigned: Tensor,
    prototypes: Tensor,
    tau: float = 0.1,
    active: Tensor | None = None,
) -> Tensor:
    """Contrast each embedding's prototype with those of all other classes (L_inter).

    ``-log(e^(i.p_ck/tau) / (e^(i.p_ck/tau) + sum_(c' != c, k') e^(i.p_c'k'/tau)))``, mean over embeddings. The other
    prototypes of the same class are no negatives.

    Args:
        embeddings: i, unit rows (n, D).
        labels: classes c (n,), int64.
        assigned: k(n) (n,), int64.
        prototypes: p, unit rows (C, K, D).
        tau: temperature.
        active: bool (C,), classes that serve as negatives (one that was never seen has no prototype yet); None: all.

    Returns:
        A scalar; 0, with a (zero) gradient, without embeddings.

    Raises:
        ValueError: shapes do not fit, or tau is not positive.
    """
    _check(embeddings, labels, assigned, prototypes)
    if not tau > 0:
        raise ValueError(f"tau must be greater than 0, got {tau}")
    if len(embeddings) == 0:
        return embeddings.sum() * 0
    classes, per_class = prototypes.shape[:2]
    similarity = embeddings @ prototypes.detach().to(embeddings).flatten(0, 1).T / tau
    owner = torch.arange(classes, device=labels.device).repeat_interleave(per_class)
    target = labels * per_class + assigned
    counts = owner != labels[:, None]
    if active is not None:
        counts &= active[owner]
    counts[torch.arange(len(labels), device=labels.device), target] = True
    return functional.cross_entropy(similarity.masked_fill(~counts, -torch.inf), target)


@fp32
def intra_loss(embeddings: Tensor, labels: Tensor, assigned: Tensor, prototypes: Tensor) -> Tensor:
    """Return ``(1 - i.p_ck)^2``, mean over embeddings (L_intra); arguments as for :func:`inter_loss`."""
    _check(embeddings, labels, assigned, prototypes)
    if len(embeddings) == 0:
        return embeddings.sum() * 0
    own = prototypes.detach().to(embeddings)[labels, assigned]
    return (1 - (embeddings * own).sum(1)).square().mean()


@fp32
def weighted_cosine_distance(
    embeddings: Tensor, prototypes: Tensor, weights: Tensor, prototype_weights: Tensor | None = None
) -> Tensor:
    """Return ``mean_(i, j) w_i v_j (1 - cos(e_i, m_j))`` of one class, the weights scaled to a mean of 1 (SS-Net).

    Args:
        embeddings: e (n, D), n at least 1.
        prototypes: m (K, D), K at least 1; treated as constants.
        weights: w (n,), positive, with gradient: those weigh more that are near.
        prototype_weights: v (K,), positive, with gradient; None: all 1.
    """
    cosine = functional.normalize(embeddings, dim=1) @ functional.normalize(prototypes.detach(), dim=1).T
    distance = (weights / weights.mean())[:, None] * (1 - cosine)
    return (distance if prototype_weights is None else distance * (prototype_weights / prototype_weights.mean())).mean()


def _check(embeddings: Tensor, labels: Tensor, assigned: Tensor, prototypes: Tensor) -> None:
    if embeddings.ndim != 2 or prototypes.ndim != 3 or embeddings.shape[1] != prototypes.shape[2]:
        shapes = f"{tuple(embeddings.shape)} and {tuple(prototypes.shape)}"
        raise ValueError(f"embeddings (n, D) and prototypes (C, K, D) must fit, got {shapes}")
    if labels.shape != assigned.shape or labels.shape != embeddings.shape[:1]:
        raise ValueError(f"labels and assigned must have shape ({len(embeddings)},)")
