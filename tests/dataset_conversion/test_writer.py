"""A new raw data set appears whole or not at all, and what killed runs have left goes with the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnssl.dataset_conversion.writer import RawDatasetWriter

HOLDER = """
import time
from nnssl.dataset_conversion.writer import RawDatasetWriter
with RawDatasetWriter(60, "X") as writer:
    (writer.temporary / "imagesTr").mkdir()
    print(writer.temporary, flush=True)
    time.sleep(60)
"""


def start() -> tuple[subprocess.Popen, Path]:
    """Start a run that is busy; return it and its folder, made to look two days old."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    folder = Path(process.stdout.readline().strip())
    os.utime(folder, (time.time() - 200_000,) * 2)
    return process, folder


@pytest.mark.skipif(os.name == "nt", reason="no locks there")
def test_folders_of_killed_runs_are_removed_and_those_of_others_are_not(raw: Path):
    killed, left = start()
    killed.kill()
    assert killed.wait(30) == -signal.SIGKILL
    busy, kept = start()
    try:
        new, others = raw / ".Dataset060_X.abcd1234", [raw / ".Dataset060_X.unfinished", raw / ".Dataset061_X.abcd1234"]
        for path in (new, *others):
            path.mkdir()
        for path in others:
            os.utime(path, (time.time() - 200_000,) * 2)
        assert left.parent == raw
        assert not left.exists(), "the second run has removed it"
        with RawDatasetWriter(60, "X") as writer:
            assert kept.is_dir()
            assert {*raw.iterdir()} == {kept, new, *others, writer.temporary}
        assert {*raw.iterdir()} == {kept, new, *others}
    finally:
        busy.kill()
        busy.wait()
