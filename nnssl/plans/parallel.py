"""Run one function over many cases: in this process or in spawned ones, with progress and errors by case."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any

from nnssl.errors import UserError


class InterruptionError(UserError):
    """Work that broke off without a fault in the data; what is finished may be kept."""


def default_processes() -> int:
    """Return the number of worker processes: ``nnUNet_def_n_proc``, else the cores of this machine, at most 8.

    Raises:
        UserError: if the variable is no positive number.
    """
    text = os.environ.get("nnUNet_def_n_proc", "")
    if text and not (text.isdigit() and int(text) > 0):
        raise UserError("nnUNet_def_n_proc must be a number of processes", repr(text), "1 or more", "mend the variable")
    return int(text) if text else min(8, os.cpu_count() or 1)


class Workers:
    """A pool of spawned processes that starts with its first job and serves several of them.

    nnU-Net takes seconds to import, so one pool serves image statistics and preprocessing alike.

    Args:
        processes: number of processes; 1 or fewer works in this process.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def run(
        self, title: str, function: Callable[..., Any], jobs: Mapping[str, tuple]
    ) -> Iterator[tuple[str, Any, Exception | None]]:
        """Call ``function(*jobs[case])`` for every case and yield ``(case, result, error)`` as they finish.

        Args:
            title: what the progress lines say.
            function: a function of a module (it crosses to other processes).
            jobs: arguments by case.

        Raises:
            UserError: if a worker process dies (mostly for want of memory).
        """
        progress = Progress(title, len(jobs))
        for outcome in self._outcomes(function, jobs):
            progress.advance()
            yield outcome

    def _outcomes(
        self, function: Callable[..., Any], jobs: Mapping[str, tuple]
    ) -> Iterator[tuple[str, Any, Exception | None]]:
        if self.processes <= 1 or not jobs:
            for case, arguments in jobs.items():
                try:
                    yield case, function(*arguments), None
                except Exception as caught:
                    yield case, None, caught
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.processes, mp_context=context)
        futures: dict[Future, str] = {self._pool.submit(function, *a): case for case, a in jobs.items()}
        try:
            for future in as_completed(futures):
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise InterruptionError(
                        "worker processes must stay alive",
                        "a process that was killed, most often for want of memory",
                        None,
                        "run again with a smaller -np; finished cases are kept",
                    ) from error
                if error is not None and not isinstance(error, Exception):
                    raise error
                yield futures[future], None if error else future.result(), error
        finally:
            for future in futures:
                future.cancel()


class Progress:
    """Count finished cases: a live line on a terminal, a plain line every few seconds elsewhere.

    Args:
        title: what is being done.
        total: number of cases.
    """

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self.start = self.last = time.monotonic()
        self.live = sys.stderr.isatty()
        self.interval = 0.2 if self.live else 5.0

    def advance(self) -> None:
        """Count one more finished case."""
        self.done += 1
        now, finished = time.monotonic(), self.done == self.total
        if finished or now - self.last >= self.interval:
            self.last, elapsed = now, now - self.start
            left = "" if finished else f", {_clock(elapsed / self.done * (self.total - self.done))} left"
            line = f"{self.title}: {self.done}/{self.total} cases, {_clock(elapsed)}{left}"
            end = "\n" if finished or not self.live else "\r"
            print(line + " " * (8 if self.live else 0), end=end, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


def reason(error: Exception) -> str:
    """Return an exception as one short line for a list of set-aside cases."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:300]
