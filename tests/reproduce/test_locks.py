"""Two processes never do the same work at once, and a killed one leaves no lock behind."""

from __future__ import annotations

import subprocess
import sys

from nnssl.reproduce.locks import alone

HOLDER = """
import sys, time
from pathlib import Path
from nnssl.reproduce.locks import alone
with alone(Path(sys.argv[1]), "work", print):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_waits_and_a_killed_one_frees_the_lock(tmp_path):
    path = tmp_path / "locks" / "work"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    lines: list[str] = []

    def report(line: str) -> None:  # only asked for once the lock was found taken
        lines.append(line)
        holder.kill()

    try:
        assert holder.stdout.readline() == "held\n"
        with alone(path, "planning", report):
            assert holder.wait(30) != 0
        assert lines == ["another process is at it, waiting: planning"]
        with alone(path, "planning", report):
            pass
        assert len(lines) == 1
    finally:
        holder.kill()
        holder.wait()
