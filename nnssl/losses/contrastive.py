"""Contrastive label propagation L_cl of Diff-CL (Guo et al. 2025, arXiv 2503.09408, equations 11 to 15)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nnssl.losses.precision import fp32

COSINE_EPS = 1e-8
#: Correlations (voxels times features of the bank) that are held at once: 64 MB in single precision.
MOST_CORRELATIONS = 2**24


@fp32
def label_propagation_loss(
    b: Tensor,
    bank: Mapping[int, Tensor] | Sequence[Tensor],
    k: int,
    tau: float,
    k_per_class: Mapping[int, int] | None = None,
) -> Tensor:
    """Pull unlabeled voxels that resemble a class's labeled features to them, against those that resemble them least.

    With cosines ``cos(b_j, a_i)`` (eq. 11), the positives P of a class are the k unlabeled features of largest summed
    similarity to its bank features, the negatives N the k of smallest (eqs. 12, 13). Each bank feature a_i and
    positive b_j contribute ``-log(e^(cos(b_j, a_i)/tau) / (e^(cos(b_j, a_i)/tau) + sum_N e^(cos(b_n, a_i)/tau)))``
    (eq. 14, with b_j in P as the text of the paper means it), here in its stable softplus form. The result is the
    mean over all (class, i, j) instead of the sum that eq. 15 prints, so that its scale does not depend on k and p.

    Args:
        b: projected features of unlabeled voxels (q, d), with gradient.
        bank: per class, projected features of labeled voxels (p, d); treated as constants. A sequence is read as
            class 0, 1, and so on; classes without a feature are skipped.
        k: number of positives, and of negatives, per class; at least 1 and at most q / 2.
        tau: temperature, greater than 0.
        k_per_class: optional smaller k of single classes; a class with 0 is skipped.

    Returns:
        A scalar; 0, with a (zero) gradient, when no class is usable.

    Raises:
        ValueError: shapes do not fit, ``2 k > q``, or ``k`` or ``tau`` is out of range.
    """
    features = dict(bank) if isinstance(bank, Mapping) else dict(enumerate(bank))
    chosen = {c: min(k, (k_per_class or {}).get(c, k)) for c, a in sorted(features.items()) if len(a)}
    _check(b, features, k, tau, chosen)
    usable = [c for c, k_class in chosen.items() if k_class > 0]
    if not usable:
        return b.sum() * 0
    unit_b = functional.normalize(b, dim=1, eps=COSINE_EPS)
    terms = [_class_terms(unit_b, features[c].detach().to(b), chosen[c], tau).flatten() for c in usable]
    return torch.cat(terms).mean()


def _class_terms(unit_b: Tensor, a: Tensor, k: int, tau: float) -> Tensor:
    """Return the terms of eq. 14 for one class, (p, k)."""
    unit_a = functional.normalize(a, dim=1, eps=COSINE_EPS)
    with torch.no_grad():
        # one sort instead of two top-k: positives and negatives stay disjoint even among equal scores
        order = (unit_b @ unit_a.sum(0)).argsort()
    positives = unit_a @ unit_b[order[-k:]].T / tau
    negatives = unit_a @ unit_b[order[:k]].T / tau
    return functional.softplus(negatives.logsumexp(1, keepdim=True) - positives)


def _check(b: Tensor, features: Mapping[int, Tensor], k: int, tau: float, chosen: Mapping[int, int]) -> None:
    if b.ndim != 2:
        raise ValueError(f"b must have shape (q, d), got {tuple(b.shape)}")
    for c, a in features.items():
        if a.ndim != 2 or a.shape[1] != b.shape[1]:
            raise ValueError(f"class {c} of the bank must have shape (p, {b.shape[1]}), got {tuple(a.shape)}")
    if not tau > 0:
        raise ValueError(f"tau must be greater than 0, got {tau}")
    if k < 1 or min(chosen.values(), default=0) < 0:
        raise ValueError(f"k must be at least 1 and k_per_class at least 0, got {k} and {dict(chosen)}")
    if 2 * k > len(b):
        raise ValueError(f"2 k must not exceed the {len(b)} unlabeled features, got k = {k}")


@fp32
def correlation_consistency(
    learner: Tensor, teacher: Tensor, bank: Mapping[int, Tensor], tau: float, detach: bool = True
) -> Tensor:
    """Compute the omni-correlation consistency of CAML (Gao et al. 2023, arXiv 2307.06312).

    ``mean_i -sum_j a_ij ln v_ij`` with ``v_i = softmax(e_i M^T / tau)`` of the learner and a_i likewise of the teacher,
    M all features of the bank: both must find a voxel alike to the same labeled ones. n times the features of M grows
    with the square of the number of classes; beyond `MOST_CORRELATIONS` of them voxels are taken in chunks, whose
    correlations are computed again in the backward pass instead of being kept.

    Args:
        learner: e, features of voxels (n, d).
        teacher: features of the same voxels (n, d).
        bank: features by class (p, d), constants.
        tau: temperature, greater than 0.
        detach: the teacher's correlations are constants; False lets the gradient through them too.

    Returns:
        A scalar; 0, with a (zero) gradient, without a voxel or a feature.

    Raises:
        ValueError: shapes do not fit, or tau is out of range.
    """
    if learner.ndim != 2 or learner.shape != teacher.shape:
        raise ValueError(f"both must have one shape (n, d), got {tuple(learner.shape)} and {tuple(teacher.shape)}")
    if not tau > 0:
        raise ValueError(f"tau must be greater than 0, got {tau}")
    if not len(learner) or not bank:
        return (learner.sum() + teacher.sum()) * 0
    memory = torch.cat([bank[c] for c in sorted(bank)]).detach().to(learner).T / tau
    rows = max(1, MOST_CORRELATIONS // memory.shape[1])
    if len(learner) <= rows:
        return _summed_correlations(learner, teacher, memory, detach) / len(learner)
    chunks = zip(learner.split(rows), teacher.split(rows), strict=True)
    sums = [
        checkpoint(_summed_correlations, e, a, memory, detach, use_reentrant=False, preserve_rng_state=False)
        for e, a in chunks
    ]
    return torch.stack(sums).sum() / len(learner)


def _summed_correlations(learner: Tensor, teacher: Tensor, memory: Tensor, detach: bool) -> Tensor:
    """Return ``sum_i -sum_j a_ij ln v_ij`` of some voxels (n, d), for features over tau (d, m)."""
    target = (teacher @ memory).softmax(1)
    return -((target.detach() if detach else target) * (learner @ memory).log_softmax(1)).sum()
