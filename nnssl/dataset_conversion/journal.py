"""What an interrupted conversion has finished: a file of one JSON line a case, written when its files are closed."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from nnssl.errors import UserError

#: Name of the journal in the folder under construction.
NAME = "nnssl_journal.jsonl"


class Journal:
    """Remember finished cases across runs of one request.

    Args:
        folder: folder under construction.
        request: what is asked for, as JSON; what another request left in the folder is removed.
    """

    def __init__(self, folder: Path, request: dict[str, Any]) -> None:
        self.folder, self.request = folder, json.loads(json.dumps(request))
        self._finished: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Journal:
        self._file = (self.folder / NAME).open("a+", encoding="utf-8")
        _lock(self._file, self.folder)
        self._file.seek(0)
        lines = _complete_lines(self._file.read())
        if lines and lines[0] == self.request:
            self._finished = {entry["key"]: entry for entry in lines[1:]}
            self._file.write("\n")  # ends a line that a kill cut short
            return self
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != NAME:
                path.unlink()
        self._file.truncate(0)
        self._append(self.request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def finished(self, key: str, sources: Iterable[Path]) -> dict[str, Any] | None:
        """Return ``{"record", "targets": {file: bytes}}`` of a case.

        None if it is not finished, its sources have changed, or a file it wrote has not its size.
        """
        entry = self._finished.get(key)
        if entry is None or entry["sources"] != stamps(sources):
            return None
        sizes = {name: _size(self.folder / name) for name in entry["targets"]}
        return entry if sizes == entry["targets"] else None

    def add(self, key: str, sources: Iterable[Path], targets: Iterable[Path], record: dict[str, Any]) -> None:
        """Record a finished case; ``targets`` are files below the folder, closed already.

        They reach the disk before the line that says so: after a loss of power the sizes, which :meth:`finished` looks
        at, may be right where the bytes are not.
        """
        targets = list(targets)
        for path in targets:
            _sync(path)
        sizes = {str(path.relative_to(self.folder)): _size(path) for path in targets}
        entry = {"key": key, "sources": stamps(sources), "targets": sizes, "record": record}
        self._append(entry)
        self._finished[key] = entry

    def __len__(self) -> int:
        """Return the number of cases that this run or one before it has finished."""
        return len(self._finished)

    def _append(self, content: dict[str, Any]) -> None:
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def stamps(paths: Iterable[Path]) -> list[list[Any]]:
    """Return path, size and time of files; those of a folder are its files'."""
    found = []
    for path in paths:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            stat = file.stat() if file.is_file() else None
            found.append([str(file), stat.st_size if stat else -1, stat.st_mtime_ns if stat else -1])
    return found


def _sync(path: Path) -> None:
    if path.is_symlink() or not path.is_file():  # what a link leads to was not written here
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _complete_lines(text: str) -> list[dict[str, Any]]:
    """Return the lines of a journal; one that a kill cut short counts as not written."""
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def _lock(file: Any, folder: Path) -> None:
    """Keep a second process out; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        warnings.warn(f"this system has no file locks: run no second conversion into {folder}", stacklevel=2)
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        rule = "one process at a time writes a data set"
        raise UserError(rule, f"another one at work in {folder}", None, "wait for it, or choose another -d") from error
