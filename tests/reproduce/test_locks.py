"""Two processes never do the same work at once, and a killed one leaves no lock behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nnssl.cli import make_subset
from nnssl.inference.models import FINAL_CHECKPOINT
from nnssl.layout import variable
from nnssl.reproduce.chain import Chain
from nnssl.reproduce.data import plan_subset
from nnssl.reproduce.locks import alone
from nnssl.reproduce.recipe import Request, make_recipe
from nnssl.reproduce.table import find_table

HOLDER = """
import sys, time
from pathlib import Path
from nnssl.reproduce.locks import alone
with alone(Path(sys.argv[1]), "work", print):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_waits_and_a_killed_one_frees_the_lock(tmp_path):
    path = tmp_path / "locks" / "work"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    lines: list[str] = []

    def report(line: str) -> None:  # only asked for once the lock was found taken
        lines.append(line)
        holder.kill()

    try:
        assert holder.stdout.readline() == "held\n"
        with alone(path, "planning", report):
            assert holder.wait(30) != 0
        assert lines == ["another process is at it, waiting: planning"]
        with alone(path, "planning", report):
            pass
        assert len(lines) == 1
    finally:
        holder.kill()
        holder.wait()


ORPHAN = """
import os, sys, time
from pathlib import Path
from nnssl.reproduce.locks import alone
with alone(Path(sys.argv[1]), "work", print):
    worker = os.fork()
    if worker == 0:
        print(os.getpid(), flush=True)
        time.sleep(15)
        Path(sys.argv[1] + ".ended").touch()
        os._exit(0)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_worker_that_outlives_a_killed_process_holds_no_lock(tmp_path):
    path = tmp_path / "work"
    holder = subprocess.Popen([sys.executable, "-c", ORPHAN, str(path)], stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    lines: list[str] = []

    def free(line: str) -> None:
        lines.append(line)
        if holder.poll() is None:
            holder.kill()
        else:  # the worker holds it
            os.kill(worker, signal.SIGKILL)

    try:
        with alone(path, "work", free):
            assert holder.wait(30) != 0
        assert lines == ["another process is at it, waiting: work"], "the process held it while it lived"
        assert not (tmp_path / "work.ended").exists(), "it was waited for the worker"
        with alone(path, "work", free):
            pass
        assert len(lines) == 1
    finally:
        holder.kill()
        holder.wait()
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


#: Folder of the toy table's subset.
MADE = "Dataset800_Repro_Toy_1"


class ToyChain(Chain):
    """A chain whose commands leave what the real ones do, and which notes them.

    Args:
        root: folder as of ``-o``.
        entered: set by the first command.
        waiting: awaited by the first command; set by a call that waits.
    """

    def __init__(self, root: Path, entered: threading.Event, waiting: threading.Event) -> None:
        self.table, self.root, self.runner = find_table("toy", "Toy-1"), root, self
        self.entered, self.waiting, self.commands = entered, waiting, []

    def skip(self, title: str) -> None:
        pass

    def _say(self, line: str) -> None:
        self.waiting.set()

    def _command(self, title, words) -> None:
        self.commands.append(words[0])
        self.entered.set()
        self.waiting.wait(2)  # without a lock nobody waits, and both do the work
        if words[0] == "nnssl_make_subset":
            (variable("nnUNet_raw").parent / "made").rename(variable("nnUNet_raw") / MADE)
        elif words[0] == "nnssl_plan_and_preprocess":
            (variable("nnUNet_preprocessed") / words[2] / f"{words[-1]}.json").write_text("{}")
        elif words[0] == "nnssl_train":
            fold = self._model(self.recipe, self.dataset, 0) / "fold_all"
            fold.mkdir(parents=True)
            (fold / FINAL_CHECKPOINT).touch()
        elif words[0] == "nnssl_predict":
            Path(words[4]).mkdir()
        else:
            Path(words[-1]).touch()

    def all(self, step: str) -> None:
        """Do the steps up to this one."""
        self.recipe = make_recipe(self.table, self.table.row("Control"), Request())
        self.dataset = self.subset(plan_subset(self.table, "few", None, None), 1)
        if step != "subset":
            self.plan(self.recipe, self.dataset)
        if step == "train":
            self.seed(self.recipe, self.dataset, 0)


def make_aside(root: Path) -> None:
    """Make the subset and put it aside: the real command forks, which does not go with the threads of a test."""
    plan = plan_subset(find_table("toy", "Toy-1"), "few", None, None)
    assert make_subset.main(plan.words(root / "ids", 1)[1:]) == 0
    (root / "raw" / MADE).rename(root / "made")


@pytest.mark.usefixtures("workspace", "toy_paper")
@pytest.mark.parametrize(
    ("before", "step", "command"),
    [
        (None, "subset", "nnssl_make_subset"),
        ("subset", "plan", "nnssl_plan_and_preprocess"),
        ("plan", "train", "nnssl_train"),
    ],
)
def test_calls_with_different_folders_do_nothing_at_the_same_time_and_nothing_twice(tmp_path, before, step, command):
    done = threading.Event()
    done.set()
    make_aside(tmp_path)
    if before:
        ToyChain(tmp_path / "first", done, done).all(before)
    entered, waiting = threading.Event(), threading.Event()
    one, other = (ToyChain(tmp_path / name, entered, waiting) for name in ("one", "other"))
    thread = threading.Thread(target=one.all, args=(step,))
    thread.start()
    assert entered.wait(30)
    other.all(step)
    thread.join(30)
    assert waiting.is_set()
    assert [*one.commands, *other.commands].count(command) == 1


@pytest.mark.usefixtures("workspace", "toy_paper")
def test_masks_of_a_model_that_another_call_has_trained_anew_do_not_count(tmp_path):
    event = threading.Event()
    event.set()
    make_aside(tmp_path)
    first, second = (ToyChain(tmp_path / name, event, event) for name in ("first", "second"))
    first.all("train")
    fold = first._model(first.recipe, first.dataset, 0) / "fold_all"
    (fold / FINAL_CHECKPOINT).unlink()
    fold.rmdir()
    second.all("train")
    first.commands.clear()
    first.all("train")
    assert first.commands == ["nnssl_predict", "nnssl_evaluate"] * 2
    first.commands.clear()
    first.all("train")
    assert first.commands == []
