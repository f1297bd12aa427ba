"""Memory that training on a CPU frees and wants back in the next step."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees; return whether it does.

    glibc maps every tensor above 32 MB anew, and the system fills it with zeros page by page: a tenth of a step of
    DiffRect on 3D patches. Only the C library of Linux is asked, and only where no ``MALLOC_*`` variable says what the
    user wants.
    """
    wanted = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if wanted or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
