"""Freed memory comes back without new pages, unless the user's own choice stands."""

import subprocess
import sys

import pytest

CODE = """
import resource
from nnssl.training.allocator import kept_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    before = faults()
    for _ in range(10):
        bytearray(b"x") * 80_000_000
    return faults() - before

with kept_memory() as kept:
    work()
    print(kept, work(), end=" ")
print(work())
"""
#: New pages of ten new blocks, at two megabytes each; where they have four kilobytes there are more.
LARGE_PAGES = 10 * 80_000_000 / 2**21


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_large_blocks_are_reused_within_and_given_back_afterwards():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env={}, check=True)
    kept, within, afterwards = done.stdout.split()
    assert kept == "True"
    assert int(within) < LARGE_PAGES / 5
    assert int(afterwards) > LARGE_PAGES / 2


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_the_users_own_choice_stands():
    environment = {"MALLOC_ARENA_MAX": "4"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("False ")
