"""One process at a time for what several share: rows of a table may run on many machines at once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Lock files that this process has open.
_OPEN: set[Any] = set()


def _let_go() -> None:
    """Close the lock files in a forked worker: it would hold them on when it outlives this process."""
    for file in _OPEN:
        file.close()
    _OPEN.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def alone(path: Path, what: str, report: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock while the block runs; wait for another process that holds it.

    The system takes the lock away from a process that dies, so that a kill leaves none behind, nor do workers that
    outlive it. It holds across machines where the file system passes ``flock`` on (NFS from Linux 2.6.12 on; Lustre
    when mounted with ``flock``); where there is none, a line says so.

    Args:
        path: the lock file; created, never removed.
        what: what is waited for, to tell the user.
        report: takes a line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        if not _lock(file, lambda: report(f"another process is at it, waiting: {what}")):
            report(f"there are no file locks here: run no second nnssl_reproduce beside this one ({what})")
            yield
            return
        _OPEN.add(file)
        try:
            yield
        finally:
            _OPEN.discard(file)
            if not file.closed:
                fcntl.flock(file, fcntl.LOCK_UN)


def _lock(file: Any, wait: Callable[[], None]) -> bool:
    """Lock an open file, after calling ``wait`` if another process has it; return False where that is impossible."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        wait()
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # ENOLCK, ENOSYS: the file system has none
        return False
    return True
