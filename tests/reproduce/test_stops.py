"""A stop signal between trainings ends the call with the code that asks for the same command again."""

from __future__ import annotations

import os
import signal
import time

import pytest

from nnssl.reproduce.stops import leave_when_asked
from nnssl.training.signals import EXIT_STOPPED, STOP_SIGNALS, StopRequest


def ask(number: int) -> None:
    """Send this process a signal, and stay until it has an effect."""
    os.kill(os.getpid(), number)
    time.sleep(30)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_leaves_at_once_and_the_old_handling_comes_back(number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left, leave_when_asked():
        ask(number)
    assert left.value.code == EXIT_STOPPED
    assert signal.getsignal(number) == before


def test_a_training_finishes_its_step_first():
    with leave_when_asked():
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.requested == "SIGTERM"
        with pytest.raises(SystemExit):
            ask(signal.SIGTERM)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_worker_ends_by_the_signal_itself():
    reading, writing = os.pipe()
    with leave_when_asked():
        child = os.fork()
        if child == 0:
            os.write(writing, b"x")
            time.sleep(30)
            os._exit(0)
        os.read(reading, 1)  # Python drops signals that reach a child while it is being forked
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
