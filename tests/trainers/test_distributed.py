"""Two gloo processes train one model: what runs on many GPUs, tested on two CPU processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nnssl_test_tools import same
from torch.multiprocessing import ProcessExitedException

from nnssl.trainers.launch import supervise
from nnssl.trainers.stepping import parameters_of
from nnssl.training.signals import EXIT_STOPPED

SCRIPT = Path(__file__).parent.parent / "tools" / "gloo_step.py"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DiffCLTrainer", {"q": 128, "k": 8, "p": 16, "unlabeled_batch": 3}),
        ("MeanTeacherTrainer", {"unlabeled_batch": 2}),
        ("ProtoDiffTrainer", {}),
        ("SASSNetTrainer", {"unlabeled_batch": 2, "adversary_width": 4}),
        ("ACISISTrainer", {"window": 1, "unlabeled_batch": 2}),
        ("AdshTrainer", {"threshold": 0.4, "window": 1, "unlabeled_batch": 2}),
        ("CLDTrainer", {"bank_every": 1, "unlabeled_batch": 2}),
        ("DePLTrainer", {"threshold": 0.4, "unlabeled_batch": 3}),
        ("GenericSSLTrainer", {"unlabeled_batch": 2, "unsupervised_schedule": "constant", "joint": False}),
        (
            "DiffRectTrainer",
            {"unlabeled_batch": 3, "rectifier_width": 4, "guidance_ema": 0.5, "rect_start": 0, "pl_threshold": 0},
        ),
    ],
)
def test_ranks_have_equal_weights_after_steps_on_different_batches(toy, results, tmp_path, name, settings):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    run = subprocess.run(
        [*command, name, "toy2d", str(tmp_path), json.dumps(settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    a, b = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert a["weights"].keys() == b["weights"].keys()
    for network in a["weights"]:
        assert same(a["weights"][network], b["weights"][network]), network
    for module in a["modules"]:
        assert same(a["modules"][module], b["modules"][module]), module
    assert same([*a["guidance"].values()], [*b["guidance"].values()])
    assert not torch.equal(a["data"], b["data"])  # every rank draws its own batches
    assert [x + y for x, y in zip(a["sizes"], b["sizes"], strict=True)] == [2, settings.get("unlabeled_batch", 0)]


def test_no_parameter_is_moved_by_two_optimizers_and_every_one_by_one(build):
    trainer = build("DiffCLTrainer")
    moved = [id(p) for o in trainer.stepper.optimizers.values() for p in parameters_of(o)]
    networks = [trainer.network, *(p.module for p in trainer.partners.values())]
    assert len(moved) == len(set(moved))
    assert set(moved) == {id(p) for m in networks for p in m.parameters() if p.requires_grad}


class OneProcess:
    """Stands for torch's spawn context: a process that leaves with the stop code when it gets SIGTERM."""

    CODE = (
        f"import signal, time; signal.signal(15, lambda *_: exit({EXIT_STOPPED})); print(1, flush=True); time.sleep(60)"
    )

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", self.CODE], stdout=subprocess.PIPE)
        self.process.stdout.readline()

    def pids(self) -> list[int]:
        return [self.process.pid]

    def join(self) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        code = self.process.wait(30)
        raise ProcessExitedException("left", error_index=0, error_pid=self.process.pid, exit_code=code)


def test_the_parent_passes_a_stop_signal_on_and_leaves_with_the_code_of_the_ranks():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        supervise(OneProcess())
    assert left.value.code == EXIT_STOPPED
    assert signal.getsignal(signal.SIGTERM) is before
