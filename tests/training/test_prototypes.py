"""Prototypes: Sinkhorn's laws, assignment where embeddings repeat, and what moves which prototype."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnssl.training.prototypes import ASSIGNMENTS, Prototypes, assign, choose_cells, distinct, sinkhorn


def unit(n: int, d: int = 16, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def numpy_sinkhorn(similarity: np.ndarray, share: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """Scale exp(similarity / epsilon) to its marginals by two vectors, in double precision."""
    kernel = np.exp(similarity.astype(np.float64) / epsilon)
    rows, columns = np.ones(len(kernel)), np.ones(kernel.shape[1])
    for _ in range(iterations):
        columns = 1 / kernel.shape[1] / (kernel.T @ rows)
        rows = share / (kernel @ columns)
    return rows[:, None] * kernel * columns


# ------------------------------------------------------------------------------------------------- Sinkhorn


@pytest.mark.parametrize("weighted", [False, True])
def test_sinkhorn_equals_an_independent_one_and_has_its_marginals(weighted):
    similarity = unit(50) @ unit(6, seed=1).T
    weights = torch.rand(50, generator=torch.Generator().manual_seed(2)) + 0.1 if weighted else torch.ones(50)
    share = (weights / weights.sum()).numpy()
    given = weights if weighted else None
    short = sinkhorn(similarity, given)
    np.testing.assert_allclose(
        short.numpy() * share[:, None], numpy_sinkhorn(similarity.numpy(), share, 0.05, 3), atol=1e-6
    )
    assert torch.allclose(short.sum(1), torch.ones(50), atol=1e-5)
    long = sinkhorn(similarity, given, epsilon=0.2, iterations=500)
    np.testing.assert_allclose((long.numpy() * share[:, None]).sum(0), np.full(6, 1 / 6), atol=1e-4)


def test_sinkhorn_computes_in_single_precision():
    q = sinkhorn((unit(20) @ unit(3, seed=1).T).half())
    assert q.dtype == torch.float32
    assert torch.isfinite(q).all()


# ----------------------------------------------------------------------------------------------- assignment


def test_identical_embeddings_leave_sinkhorn_uniform_and_deduplication_does_not():
    p, different = unit(4, seed=3), unit(20, seed=4)
    same = unit(1, seed=5).expand(180, -1)
    _, plain = assign(same @ p.T, same, "sinkhorn")
    assert torch.allclose(plain, torch.full((180, 4), 0.25), atol=1e-4)
    hard, _ = assign(same @ p.T, same, "sinkhorn_dedup")
    assert torch.equal(hard, (same @ p.T).argmax(1))
    rows = torch.cat([same, different])
    hard, soft = assign(rows @ p.T, rows, "sinkhorn_dedup")
    assert len(hard[:180].unique()) == 1
    assert len(hard.unique()) == 4
    # what repeats counts by the logarithm of its number: it takes no prototype away from the others
    weights = torch.cat([torch.tensor([181.0]).log(), torch.full((20,), 2.0).log()])
    once = torch.cat([same[:1], different])
    assert torch.allclose(soft[179:], sinkhorn(once @ p.T, weights), atol=1e-5)


def test_too_few_distinct_embeddings_take_the_most_similar_prototype():
    p, rows = unit(4, seed=3), unit(7, seed=4).repeat(30, 1)
    hard, soft = assign(rows @ p.T, rows)
    assert torch.equal(hard, (rows @ p.T).argmax(1))
    assert torch.equal(soft.sum(1), torch.ones(len(rows)))


@pytest.mark.parametrize("how", ASSIGNMENTS)
def test_separated_clusters_go_to_their_own_prototype(how):
    centers = torch.eye(16)[:4]
    rows = F.normalize(centers.repeat(10, 1) + 0.05 * torch.randn(40, 16, generator=torch.Generator().manual_seed(0)))
    hard, _ = assign(rows @ centers.T, rows, how)
    assert torch.equal(hard, torch.arange(4).repeat(10))


def test_distinct_rows_are_found_with_their_counts():
    kinds = unit(5)
    order = torch.tensor([0, 1, 1, 4, 2, 0, 3, 1, 4])
    first, kind, counts = distinct(kinds[order] + 1e-6)
    assert len(first) == 5
    assert sorted(counts.tolist()) == [1, 1, 2, 2, 3]
    assert all(torch.equal(order[first[k]], order[n]) for n, k in enumerate(kind))
    assert first[kind[0]] == 0


def test_cells_are_chosen_boundaries_first_up_to_the_limit():
    labels = torch.tensor([0] * 50 + [1] * 5 + [2] * 50 + [3] * 7)
    edge = torch.zeros(112, dtype=torch.bool)
    edge[10:14] = True
    chosen = choose_cells(labels, edge, 8, 3)
    assert [int((labels[chosen] == c).sum()) for c in range(4)] == [8, 5, 8, 0]  # 3 = ignored
    assert set(range(10, 14)) <= set(chosen.tolist())
    assert len(chosen.unique()) == len(chosen)


# --------------------------------------------------------------------------------------------- the prototypes


def make(**changes) -> Prototypes:
    torch.manual_seed(0)
    return Prototypes(**{"classes": 3, "per_class": 4, "dim": 16, "momentum": 0.9, **changes})


def data(n: int = 60, classes: int = 3, seed: int = 1):
    return unit(n, seed=seed), torch.arange(n) % classes


def test_rows_are_unit_vectors_from_the_start_and_after_updates():
    bank = make()
    for seed in range(3):
        assert torch.allclose(bank.value.norm(dim=2), torch.ones(3, 4), atol=1e-5)
        bank.update(*data(seed=seed))
    assert torch.allclose(bank.value.norm(dim=2), torch.ones(3, 4), atol=1e-5)


def test_a_first_sight_puts_prototypes_among_their_class_and_leaves_absent_classes_alone():
    bank = make()
    before = bank.value.clone()
    embeddings, _ = data(40)
    bank.update(embeddings, torch.zeros(40, dtype=torch.int64))
    assert bank.seen.tolist() == [True, False, False]
    assert (bank.value[0] @ embeddings.T).amax(1).min() > 0.95
    assert torch.equal(bank.value[1:], before[1:])
    later = bank.value.clone()
    bank.update(embeddings[:20], torch.ones(20, dtype=torch.int64))
    assert torch.equal(bank.value[[0, 2]], later[[0, 2]])
    assert not torch.equal(bank.value[1], later[1])


def test_a_used_prototype_moves_by_the_momentum_rule_and_an_unused_one_stays():
    bank = make(how="cosine")
    bank.update(*data())
    before = bank.value.clone()
    embeddings = F.normalize(before[1, 2] + 0.1 * unit(5, seed=7), dim=1)
    assigned = bank.update(embeddings, torch.ones(5, dtype=torch.int64))
    assert assigned.tolist() == [2] * 5
    mean = F.normalize(embeddings.sum(0), dim=0)
    expected = F.normalize(0.9 * before[1, 2] + 0.1 * mean, dim=0)
    assert torch.allclose(bank.value[1, 2], expected, atol=1e-6)
    before[1, 2] = bank.value[1, 2]
    assert torch.equal(bank.value, before)


def test_one_prototype_is_the_running_mean_of_its_class():
    bank = make(per_class=1, how="cosine")
    bank.update(*data())
    before, (embeddings, labels) = bank.value.clone(), data(seed=9)
    bank.update(embeddings, labels)
    for c in range(3):
        mean = F.normalize(embeddings[labels == c].sum(0), dim=0)
        assert torch.allclose(bank.value[c, 0], F.normalize(0.9 * before[c, 0] + 0.1 * mean, dim=0), atol=1e-6)


def test_clusters_are_found():
    """Four clusters a class: in the end each prototype lies on one of them."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.eye(16)[:12].view(3, 4, 16)
    bank = make()
    for _ in range(60):
        labels = torch.arange(3).repeat_interleave(40)
        rows = centers.repeat_interleave(10, 1).flatten(0, 1)
        bank.update(F.normalize(rows + 0.05 * torch.randn(120, 16, generator=generator), dim=1), labels)
    nearest = torch.einsum("ckd,cjd->ckj", bank.value, centers)
    assert (nearest.amax(2) > 0.9).all()
    assert all(len(nearest[c].argmax(1).unique()) == 4 for c in range(3))


def test_an_unused_prototype_starts_again_from_its_class():
    bank = make(how="cosine", patience=3)
    bank.update(*data())
    bank.value[0, 1] = -unit(1, seed=1)[0]  # away from everything
    embeddings = F.normalize(unit(1, seed=1) + 0.05 * unit(30, seed=2), dim=1)
    for step in range(4):
        assert (bank.value[0, 1] @ embeddings[0]) < 0, step
        bank.update(embeddings, torch.zeros(30, dtype=torch.int64))
    assert (bank.value[0, 1] @ embeddings[0]) > 0.9
    never = make(how="cosine", patience=0)
    never.update(*data())
    never.value[0, 1] = -unit(1, seed=1)[0]
    kept = never.value[0, 1].clone()
    for _ in range(6):
        never.update(embeddings, torch.zeros(30, dtype=torch.int64))
    assert torch.equal(never.value[0, 1], kept)


def test_occupancy_is_the_share_of_used_prototypes_of_seen_classes():
    bank = make(how="cosine")
    embeddings = unit(1).expand(10, -1)
    bank.update(embeddings, torch.zeros(10, dtype=torch.int64))
    assert bank.occupancy().item() == pytest.approx(0.25)


def test_no_embeddings_change_nothing():
    bank = make()
    bank.update(*data())
    before = {k: v.clone() for k, v in bank.state_dict().items()}
    assert len(bank.update(torch.zeros(0, 16), torch.zeros(0, dtype=torch.int64))) == 0
    assert all(torch.equal(before[k], v) for k, v in bank.state_dict().items())


def test_the_gumbel_sample_moves_other_prototypes_than_the_assigned_ones():
    bank = make(update="gumbel")
    bank.update(*data())
    before, (embeddings, labels) = bank.value.clone(), data(seed=3)
    assigned = bank.update(embeddings, labels)
    by_rule = make()
    by_rule.load_state_dict(bank.state_dict())
    by_rule.value.copy_(before)
    assert torch.equal(by_rule.update(embeddings, labels), assigned)
    assert not torch.equal(by_rule.value, bank.value)


def test_no_gradient_reaches_the_buffers_and_the_state_survives():
    bank = make()
    embeddings, labels = data()
    bank.update(embeddings.requires_grad_(), labels)
    assert not bank.value.requires_grad
    copy = make()
    copy.load_state_dict(bank.state_dict())
    torch.manual_seed(5)
    first = bank.update(*data(seed=2))
    torch.manual_seed(5)
    assert torch.equal(copy.update(*data(seed=2)), first)
    assert torch.equal(copy.value, bank.value)


def test_two_ranks_keep_equal_prototypes_as_one_process_with_both_batches_would(tmp_path):
    script = Path(__file__).parent.parent / "tools" / "gloo_prototypes.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    a, b = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(a["state"][k], b["state"][k]) for k in a["state"])
    assert a["state"]["seen"].tolist() == [True, True, False]
    untouched = a["parts"][0]["before"]["value"][2]
    assert torch.equal(a["state"]["value"][2], untouched)
    for x, y in list(zip(a["parts"], b["parts"], strict=True))[1:]:  # the first step has the starts
        bank = make(dim=8, momentum=0.5, how="cosine")
        bank.load_state_dict(x["before"])
        bank.update(torch.cat([x["embeddings"], y["embeddings"]]), torch.cat([x["labels"], y["labels"]]))
        torch.testing.assert_close(bank.value, x["after"])


@pytest.mark.parametrize("wrong", [{"momentum": 1.0}, {"classes": 0}, {"how": "kmeans"}, {"update": "mean"}])
def test_impossible_choices_are_refused(wrong):
    with pytest.raises(ValueError, match=r"unknown|at least"):
        make(**wrong)
