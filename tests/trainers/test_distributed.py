"""Two gloo processes train one model: what runs on many GPUs, tested on two CPU processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from nnssl_test_tools import on_two_processes, same
from torch.multiprocessing import ProcessExitedException

from nnssl.trainers.launch import supervise
from nnssl.trainers.stepping import parameters_of
from nnssl.training.signals import EXIT_STOPPED

#: What runs on two processes: every mechanism that shares something between ranks.
TRAINERS = {
    "ACISISTrainer": {"window": 1, "unlabeled_batch": 2},
    "AdshTrainer": {"threshold": 0.4, "window": 1, "unlabeled_batch": 2},
    "CAMLTrainer": {"unlabeled_batch": 2},
    "CLDTrainer": {"bank_every": 1, "unlabeled_batch": 2},
    "CReSTTrainer": {"unlabeled_batch": 2},
    "DHCTrainer": {"unlabeled_batch": 3},
    "DSTTrainer": {"threshold": 0.4, "unlabeled_batch": 2},
    "DTCTrainer": {"unlabeled_batch": 3},
    "DePLTrainer": {"threshold": 0.4, "unlabeled_batch": 3},
    "DiffCLTrainer": {"q": 128, "k": 8, "p": 16, "unlabeled_batch": 3},
    "DiffRectTrainer": {
        "unlabeled_batch": 3,
        "rectifier_width": 4,
        "guidance_ema": 0.5,
        "rect_start": 0,
        "pl_threshold": 0,
    },
    "GenericSSLTrainer": {"unlabeled_batch": 2, "unsupervised_schedule": "constant", "joint": False},
    "INCLTrainer": {"unlabeled_batch": 3, "tokens": 64, "dim": 16},
    "MLRPLTrainer": {"unlabeled_batch": 2},
    "MeanTeacherTrainer": {"unlabeled_batch": 2},
    "ProtoDiffTrainer": {},
    "SASSNetTrainer": {"unlabeled_batch": 2, "adversary_width": 4},
    "SSNetTrainer": {"unlabeled_batch": 2},
    "SimiSTrainer": {"unlabeled_batch": 2},
}
BANKS = {"CAMLTrainer": "memory", "DiffCLTrainer": "bank"}


@pytest.fixture(scope="module")
def steps(toy, tmp_path_factory):
    """The folder of what both ranks have after steps of every trainer; one launch, since starting takes the time."""
    out = tmp_path_factory.mktemp("ranks")
    on_two_processes("gloo_step.py", "toy2d", str(out), json.dumps(TRAINERS), nnUNet_results=str(out / "results"))
    return out


@pytest.mark.parametrize("name", TRAINERS)
def test_ranks_know_the_same_after_steps_on_different_batches(steps, name):
    a, b = (torch.load(steps / f"{name}.rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for part in ("weights", "modules"):
        assert a[part].keys() == b[part].keys()
        for key in a[part]:
            assert a[part][key].keys() == b[part][key].keys(), key
            assert same([*a[part][key].values()], [*b[part][key].values()]), key
    assert not torch.equal(a["data"], b["data"])  # every rank draws its own batches
    labeled, unlabeled = (x + y for x, y in zip(a["sizes"], b["sizes"], strict=True))
    assert (labeled, unlabeled) == (2, TRAINERS[name].get("unlabeled_batch", 0))
    if name in BANKS:
        assert a["modules"][BANKS[name]]


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
