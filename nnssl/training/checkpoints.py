"""Checkpoints that survive a kill at any moment and load without executing anything."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnssl.errors import UserError
from nnssl.layout import require_writable

#: Builders of numpy numbers: plain data, they execute nothing.
_NUMPY_SCALARS = [
    np.dtype,
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    *{type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)},
]


def plain(value: Any) -> Any:
    """Return ``value`` with numpy scalars and arrays turned into Python's own, so that it loads as weights only."""
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v) for v in value) if type(value) in (list, tuple) else [plain(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value) if type(value) is not str and isinstance(value, str) else value


def save_atomically(checkpoint: dict, path: Path) -> None:
    """Write a checkpoint beside ``path``, flush it to the disk, and only then give it its name.

    A kill or a full disk at any moment leaves the old file whole.

    Raises:
        UserError: if the file can't be written; the old checkpoint stays.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        remedy = "free space or mend the folder's rights, then continue with --c"
        raise UserError(
            "a checkpoint must be written", f"{error} at {path}", "the old checkpoint stays", remedy
        ) from error


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, where the system knows how."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_safely(path: Path, numpy_scalars: bool = False) -> dict:
    """Load a checkpoint to the CPU with ``weights_only=True``.

    Args:
        path: the file.
        numpy_scalars: also admit numpy's numbers, which nnU-Net's own checkpoints hold in their log.

    Raises:
        UserError: if the file is missing, damaged, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("a checkpoint must exist", f"no {path}", None, "check -tr, -p, --run, -c, -f and -chk")
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS if numpy_scalars else []):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        first_line = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        rule = "a checkpoint must load as weights only (tensors and plain values, nothing executed)"
        raise UserError(rule, f"{path}: {first_line}", None, "use a checkpoint written by nnssl_train") from error
    if not isinstance(checkpoint, dict) or "network_weights" not in checkpoint:
        raise UserError("a checkpoint must hold network_weights", f"{path} holds none", None, "check the path")
    return checkpoint


def require_safe(path: Path) -> None:
    """Refuse a checkpoint that :func:`load_safely` refuses, before a stock loader sees it."""
    load_safely(path)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse a folder that can't be written or has no room for ``needed_bytes``, before any work is done."""
    folder = Path(folder)
    require_writable(folder, "the results folder must be writable", "mend rights or nnUNet_results")
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        got = f"{free / 1e6:.0f} MB free in {folder}"
        raise UserError(
            "the results folder needs room for two checkpoints",
            got,
            f"{needed_bytes / 1e6:.0f} MB or more",
            "free space",
        )
