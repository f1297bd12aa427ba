"""Steps are announced, timed and logged; a failing one names its log."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nnssl.demo.steps import StepRunner, clock
from nnssl.errors import UserError


def test_output_of_a_step_goes_to_its_log_also_from_children(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    def step() -> None:
        print("from python")
        os.write(1, b"from the descriptor\n")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
        print("to stderr", file=sys.stderr)

    stream = io.StringIO()
    runner = StepRunner(tmp_path / "logs", 3, stream)
    runner.run("do it", step, "nnssl_x -o y")
    (log,) = (tmp_path / "logs").iterdir()
    assert {"from python", "from the descriptor", "from a child", "to stderr"} <= set(log.read_text().splitlines())
    assert capfd.readouterr().out == ""
    assert re.match(r"\[1/3\] 0:0\d  do it\n +\$ nnssl_x -o y\n", stream.getvalue())
    assert runner.seconds["do it"] > 0
    print("afterwards")
    assert capfd.readouterr().out == "afterwards\n"


def fail_with_code() -> int:
    print("the reason")
    return 2


def fail_with_exception() -> None:
    raise ValueError("the reason")


def fail_with_exit() -> None:
    print("the reason")
    raise SystemExit(2)


@pytest.mark.parametrize("step", [fail_with_code, fail_with_exception, fail_with_exit])
def test_failing_step_is_one_line_with_reason_and_log(tmp_path: Path, step) -> None:
    runner = StepRunner(tmp_path, 1, io.StringIO())
    with pytest.raises(UserError, match="the reason") as refusal:
        runner.run("break", step)
    assert str(tmp_path / "01_break.log") in refusal.value.remedy
    assert "break" not in runner.seconds


def test_a_line_shows_life_during_long_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnssl.demo.steps.HEARTBEAT", {True: 0.01, False: 0.01})
    stream = io.StringIO()

    def step() -> None:
        print("epoch 3 of 8")
        while "epoch 3 of 8" not in stream.getvalue():
            pass

    StepRunner(tmp_path, 1, stream).run("train", step)
    assert re.search(r"\[1/1\] 0:0\d +epoch 3 of 8", stream.getvalue())


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.9, 60, 605)] == ["0:00", "0:59", "1:00", "10:05"]
