"""Workers: the same answers in this process and in spawned ones, errors by case, a dead worker is named."""

import math
import os

import pytest

from nnssl.errors import UserError
from nnssl.plans.parallel import Workers, reason


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_results_and_errors_arrive_by_case(processes, capsys):
    with Workers(processes) as workers:
        outcomes = {c: (r, e) for c, r, e in workers.run("Roots", math.sqrt, {"a": (4,), "b": (-1,), "c": (9,)})}
        again = list(workers.run("Roots", math.sqrt, {}))
    assert outcomes["a"] == (2, None)
    assert outcomes["c"] == (3, None)
    assert isinstance(outcomes["b"][1], ValueError)
    assert again == []
    assert "Roots: 3/3 cases" in capsys.readouterr().err


def test_a_dead_worker_is_named():
    with Workers(2) as workers, pytest.raises(UserError, match="smaller -np"):
        list(workers.run("Exits", os._exit, {"a": (1,)}))


def test_reasons_are_one_short_line():
    assert reason(RuntimeError("two\nlines")) == "RuntimeError: two lines"
    assert len(reason(RuntimeError("x" * 999))) == 300
