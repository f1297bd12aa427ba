"""Stop signals outside a training: leave with the code that says the same command goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from nnssl.training.signals import EXIT_STOPPED, STOP_SIGNALS


@contextlib.contextmanager
def leave_when_asked() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 end this process with exit code 75 at once; a training's own handling comes first.

    What a step has written stays and is taken up by the next call. Child processes end as without this.
    """
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
        yield
        return
    owner = os.getpid()

    def leave(number: int, frame: object) -> None:
        if os.getpid() != owner:  # a forked worker, which its parent asks to end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise SystemExit(EXIT_STOPPED)

    before = {number: signal.signal(number, leave) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
