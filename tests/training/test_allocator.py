"""Freed memory comes back without new pages, unless the user's own choice stands."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys
from nnssl.training.allocator import keep_freed_memory
kept = keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(80_000_000)
before = faults()
for _ in range(10):
    bytearray(b"x") * 80_000_000
print(kept, faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(("environment", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "4"}, False)])
def test_large_blocks_are_reused_without_new_pages(environment, kept):
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=True)
    said, faults = done.stdout.split()
    assert said == str(kept)
    pages = 10 * 80_000_000 / 4096
    assert (int(faults) < pages / 5) == kept
