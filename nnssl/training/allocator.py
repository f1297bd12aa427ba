"""Memory that training on a CPU frees and wants back in the next step."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

#: Options of mallopt and their values at the start of a process.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
DEFAULTS = {M_TRIM_THRESHOLD: 128 * 1024, M_MMAP_MAX: 65536}


@contextlib.contextmanager
def kept_memory() -> Iterator[bool]:
    """Let this process keep the memory that the block frees, and give it back afterwards; the value is whether it does.

    glibc maps every tensor above 32 MB anew, and the system fills it with zeros page by page: a tenth of a step of
    DiffRect on 3D patches. Only the C library of Linux is asked, and only where no ``MALLOC_*`` variable says what the
    user wants.
    """
    wanted = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") and not wanted else None
    if library is None or not hasattr(library, "mallopt"):
        yield False
        return
    try:
        yield bool(library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, -1))
    finally:
        for option, value in DEFAULTS.items():
            library.mallopt(option, value)
        library.malloc_trim(0)
