"""A stop signal ends a call and its workers, with the code it was given; a training finishes its step first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from nnssl.training.signals import EXIT_STOPPED, STOP_SIGNALS, StopRequest, leave_when_asked


def ask(number: int) -> None:
    """Send this process a signal, and stay until it has an effect."""
    os.kill(os.getpid(), number)
    time.sleep(30)


@pytest.mark.parametrize("code", [None, EXIT_STOPPED])
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_leaves_at_once_and_the_old_handling_comes_back(number, code):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left, leave_when_asked(code):
        ask(number)
    assert left.value.code == (128 + number if code is None else code)
    assert signal.getsignal(number) == before


def test_a_command_within_another_leaves_with_the_outer_ones_code():
    with pytest.raises(SystemExit) as left, leave_when_asked(EXIT_STOPPED), leave_when_asked():
        ask(signal.SIGTERM)
    assert left.value.code == EXIT_STOPPED


def test_a_signal_that_the_parent_ignores_stays_ignored():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with leave_when_asked():
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_training_finishes_its_step_first():
    with leave_when_asked():
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.requested == "SIGTERM"
        with pytest.raises(SystemExit):
            ask(signal.SIGTERM)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_worker_ends_by_the_signal_itself_however_early_it_comes():
    with leave_when_asked():
        for _ in range(50):
            child = os.fork()
            if child == 0:
                time.sleep(30)
                os._exit(0)
            os.kill(child, signal.SIGTERM)
            assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
        with pytest.raises(SystemExit):
            ask(signal.SIGTERM)


WORKERS = """
import multiprocessing, sys, time
from nnssl.cli._common import run_command
import argparse

def execute(args):
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(60)

if __name__ == "__main__":
    sys.exit(run_command("toy", argparse.ArgumentParser, execute, []))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to handle")
def test_a_command_that_is_asked_to_end_takes_its_workers_along(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(WORKERS, encoding="utf-8")
    command = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    worker = int(command.stdout.readline())
    command.send_signal(signal.SIGTERM)
    assert command.wait(30) == 128 + signal.SIGTERM
    command.stdout.close()
    for _ in range(300):  # the system reaps it in its own time
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its command")
