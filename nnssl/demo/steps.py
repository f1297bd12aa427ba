"""Run the steps of a chain one after the other: what they print goes to a log, the terminal shows how far it is."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from nnssl.errors import UserError
from nnssl.training.signals import EXIT_STOPPED

#: Seconds between two signs of life: on a terminal (one line, rewritten) and elsewhere (a line each).
HEARTBEAT = {True: 1.0, False: 30.0}


class StepRunner:
    """Announces, times and logs steps.

    Args:
        logs: folder for one log file a step.
        total: number of steps.
        stream: where progress goes; default: the present stderr.
        chain: what the steps belong to, for errors.
    """

    def __init__(self, logs: Path, total: int, stream: TextIO | None = None, chain: str = "the demo") -> None:
        self.logs, self.total, self.count, self.chain = logs, total, 0, chain
        self.stream = sys.stderr if stream is None else stream
        self.start = time.monotonic()
        #: Seconds each step took, by title.
        self.seconds: dict[str, float] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def skip(self, title: str) -> None:
        """Count a step that an earlier call has done."""
        self.count += 1
        with _own_stream(self.stream) as out:
            print(f"[{self.count}/{self.total}] {clock(time.monotonic() - self.start)}  {title}: done before", file=out)

    def run(self, title: str, action: Callable[[], int | None], command: str | None = None) -> None:
        """Run one step with everything it prints going to its log.

        Args:
            title: what the step does, in a few words.
            action: the step; returns None or an exit code.
            command: what a user would type for it.

        Raises:
            UserError: if the step fails; it names the log.
            SystemExit: if the step was asked to stop and has saved its state, with its exit code.
        """
        self.count += 1
        log = self.logs / f"{self.count:02d}_{''.join(c if c.isalnum() else '_' for c in title)}.log"
        begin = time.monotonic()
        with _own_stream(self.stream) as out:
            print(f"[{self.count}/{self.total}] {clock(begin - self.start)}  {title}", file=out)
            if command:
                print(f"        $ {command}", file=out, flush=True)
            with _heartbeat(out, log, f"[{self.count}/{self.total}]", self.start), _redirected(log):
                code = _exit_code(action)
        if code == EXIT_STOPPED:
            with _own_stream(self.stream) as out:
                print(f"[{self.count}/{self.total}] {title}: stopped on request; the same command goes on", file=out)
            raise SystemExit(code)
        if code:
            lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            got = f"{title!r} ended with {code}" + (f" ({lines[-1].strip()})" if lines else "")
            raise UserError(f"every step of {self.chain} must succeed", got, None, f"see {log}")
        self.seconds[title] = time.monotonic() - begin


def clock(seconds: float) -> str:
    """Return ``m:ss``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _exit_code(action: Callable[[], int | None]) -> int:
    try:
        return action() or 0
    except SystemExit as stop:  # a command may leave through argparse
        return stop.code if isinstance(stop.code, int) else 1
    except UserError:
        raise
    except Exception:
        import traceback

        traceback.print_exc()
        return 1


@contextlib.contextmanager
def _own_stream(stream: TextIO) -> Iterator[TextIO]:
    """Yield a stream to the same place that survives the redirection of file descriptors 1 and 2."""
    stream.flush()
    try:
        descriptor = os.dup(stream.fileno())
    except (OSError, AttributeError, ValueError):  # no file behind it, as in tests: nothing will redirect it
        yield stream
        return
    with open(descriptor, "w", encoding="utf-8", buffering=1) as own:
        yield own


@contextlib.contextmanager
def _redirected(log: Path) -> Iterator[None]:
    """Send Python's stdout and stderr, and the descriptors that worker processes inherit, to the end of a log file."""
    with open(log, "a", encoding="utf-8", buffering=1) as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        saved = [os.dup(1), os.dup(2)]
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            for descriptor, target in zip(saved, (1, 2), strict=True):
                os.dup2(descriptor, target)
                os.close(descriptor)


@contextlib.contextmanager
def _heartbeat(out: TextIO, log: Path, prefix: str, start: float) -> Iterator[None]:
    """Show the last line of the log now and then while a step runs."""
    done = threading.Event()
    terminal = out.isatty()

    def beat() -> None:
        while not done.wait(HEARTBEAT[terminal]):
            text = f"{prefix} {clock(time.monotonic() - start)}    {_last_line(log)}"
            print(
                f"\r\x1b[K{text[:110]}" if terminal else text[:160], end="" if terminal else "\n", file=out, flush=True
            )
        if terminal:
            print("\r\x1b[K", end="", file=out, flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _last_line(log: Path) -> str:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 2000))
            lines: Sequence[str] = file.read().decode("utf-8", errors="replace").replace("\r", "\n").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
