"""Paired comparison: Holm's example, degenerate differences, signs, exclusion."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from nnssl.evaluation.compare import bootstrap_interval, compare, holm, wilcoxon


def result(values, classes=("1",)):
    """Return what compare reads of an evaluation; values {case: {class: dice}}, HD95 = 10 (1 - Dice)."""
    cases = {
        case: {n: {"dice": v, "hd95": None if v is None else 10 * (1 - v)} for n, v in by_class.items()}
        for case, by_class in values.items()
    }
    return {"labels": {n: int(n) for n in classes}, "cases": cases}


def single(values):
    return result({f"c{i}": {"1": v} for i, v in enumerate(values)})


def test_holm_known_example():
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_differences_are_second_minus_first_with_the_sign_of_each_metric():
    rng = np.random.default_rng(0)
    first = rng.uniform(0.5, 0.7, 12)
    gain = rng.uniform(0.02, 0.1, 12)
    rows = compare({"old": single(first), "new": single(first + gain)})
    dice, hd95 = rows
    assert (dice["first"], dice["second"], dice["metric"], dice["label"]) == ("old", "new", "dice", "1")
    assert dice["mean_difference"] == pytest.approx(gain.mean())
    assert hd95["mean_difference"] == pytest.approx(-10 * gain.mean())
    assert gain.min() < dice["ci_low"] < gain.mean() < dice["ci_high"] < gain.max()
    assert dice["p"] == pytest.approx(2 / 2**12) == dice["p_holm"]  # all of one sign: the smallest exact p
    assert dice["note"] == ""


def test_comparison_is_seeded_and_antisymmetric():
    rng = np.random.default_rng(1)
    a, b = single(rng.uniform(size=9)), single(rng.uniform(size=9))
    there, back = compare({"a": a, "b": b})[0], compare({"b": b, "a": a})[0]
    assert compare({"a": a, "b": b})[0] == there
    assert there["mean_difference"] == pytest.approx(-back["mean_difference"])
    assert there["p"] == pytest.approx(back["p"])


def test_equal_predictions_have_p_1_and_an_interval_of_zero():
    row = compare({"a": single([0.3, 0.5, 0.9, 0.2, 0.1, 0.7]), "b": single([0.3, 0.5, 0.9, 0.2, 0.1, 0.7])})[0]
    assert (row["p"], row["p_holm"], row["ci_low"], row["ci_high"], row["mean_difference"]) == (1, 1, 0, 0, 0)
    assert wilcoxon(np.array([1e-17, 0.0])) == 1


def test_excluded_cases_leave_the_pair():
    a = result({"x": {"1": None, "2": 0.5}, "y": {"1": 0.4, "2": 0.6}}, "12")
    b = result({"x": {"1": 0.0, "2": 0.7}, "y": {"1": 0.5, "2": 0.9}}, "12")
    rows = {(r["metric"], r["label"]): r for r in compare({"a": a, "b": b})}
    assert (rows["dice", "1"]["n"], rows["dice", "1"]["excluded"]) == (1, 1)
    assert rows["dice", "1"]["ci_low"] is None
    assert rows["dice", "foreground"]["n"] == 2
    assert rows["dice", "foreground"]["mean_difference"] == pytest.approx((0.2 + (0.1 + 0.3) / 2) / 2)
    assert "too few" in rows["dice", "foreground"]["note"]


def test_a_class_without_pairs_is_not_tested():
    empty = single([None, None])
    row = compare({"a": empty, "b": empty})[0]
    assert (row["n"], row["p"], row["p_holm"], row["mean_difference"]) == (0, None, None, None)


def test_every_pair_is_corrected_together():
    rng = np.random.default_rng(2)
    results = {name: single(rng.uniform(size=10)) for name in "abc"}
    rows = [r for r in compare(results) if r["metric"] == "dice"]
    assert [(r["first"], r["second"]) for r in rows] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [r["p_holm"] for r in rows] == pytest.approx(holm([r["p"] for r in rows]))


def test_five_pairs_cannot_reach_significance_and_six_can():
    assert wilcoxon(np.arange(1.0, 6)) >= 0.05
    assert wilcoxon(np.arange(1.0, 7)) < 0.05
    notes = [compare({"a": single([0.1] * n), "b": single(0.2 + 0.1 * np.arange(n))})[0]["note"] for n in (5, 6)]
    assert "too few" in notes[0]
    assert notes[1] == ""


def test_bootstrap_interval_is_near_the_normal_one_for_many_cases():
    values = np.random.default_rng(3).normal(0.3, 1, 400)
    low, high = bootstrap_interval(values)
    half = stats.norm.ppf(0.975) * values.std(ddof=1) / np.sqrt(values.size)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
