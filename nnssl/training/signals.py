"""Stopping on request: without losing a step of a training, and without leaving processes behind."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

#: Exit code of a run that was asked to stop, saved its state and can go on with --c (EX_TEMPFAIL of sysexits.h).
EXIT_STOPPED = 75

#: Signals that ask a run to stop, as far as the system knows them.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """Context in which SIGTERM and SIGUSR1 set a flag instead of ending the process.

    Schedulers send these before they take a machine back. The training loop looks at :attr:`requested` between steps.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        self.requested = signal.Signals(number).name

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def leave_when_asked(code: int | None = None) -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 end this process as an exit does, worker processes included; a `StopRequest` comes first.

    By default both end a process without a word to its workers, which then wait for it for ever. Where somebody has
    given a signal another meaning already, as `nnssl_reproduce` has for the commands it runs, that stands.

    Args:
        code: exit code; None = 128 + the signal's number, as shells count.
    """
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number if code is None else code)

    free = [number for number in STOP_SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    for number in free:
        signal.signal(number, leave)
    _TAKEN.update(free)
    try:
        yield
    finally:
        _TAKEN.difference_update(free)
        for number in free:
            signal.signal(number, signal.SIG_DFL)


#: Signals that `leave_when_asked` answers at present.
_TAKEN: set[int] = set()


def _hold_back() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _TAKEN)


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TAKEN)


def _end_by_default() -> None:
    for number in _TAKEN:
        signal.signal(number, signal.SIG_DFL)
    _let_through()


if hasattr(os, "register_at_fork"):
    # A forked worker ends by the signal itself. Python forgets a signal that reaches it before it has found its feet: a
    # pool that is closed at once would wait for such a worker for ever.
    os.register_at_fork(before=_hold_back, after_in_parent=_let_through, after_in_child=_end_by_default)
