"""Small helpers that several test modules import."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from nnssl.data.loader import wrap_loader

#: Shape of a toy case: z, y, x in voxels.
SHAPE = (12, 40, 40)


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    """Return copies of every parameter and buffer."""
    return [t.detach().clone() for t in [*module.parameters(), *module.buffers()]]


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    """Return whether two sequences of tensors agree bit for bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def on_two_processes(script: str, *words: str, **environment: str) -> None:
    """Run a script of this folder on two gloo processes, as torchrun starts them, and wait for its success."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    path = str(Path(__file__).with_name(script))
    run = subprocess.run([*launch, path, *words], env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-30000:]


def take(loader, count: int, workers: int = 0) -> list[dict]:
    """Return the first batches of a loader."""
    batches = wrap_loader(loader, workers)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def equal(a, b) -> bool:
    """Return whether two batches agree bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def toy_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image with a bright ball in a brighter-rimmed box, and its labels (1 box, 2 ball)."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))
    center = np.array([n / 2 + rng.uniform(-2, 2) for n in SHAPE]).reshape(3, 1, 1, 1)
    scale = np.array([2.0, 1.0, 1.0]).reshape(3, 1, 1, 1)
    distance = np.sqrt((((grid - center) * scale) ** 2).sum(0))
    label = np.where(distance < 12, 1, 0) + np.where(distance < 6, 1, 0)
    image = 100.0 * label + rng.normal(0, 25, SHAPE) + 50
    return image.astype(np.float32), label.astype(np.uint8)


def write_nifti(path: Path, array: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 2.0)) -> None:
    """Write an array (z, y, x) with spacing (x, y, z) in mm."""
    import SimpleITK as sitk

    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))


@contextlib.contextmanager
def nnunet_variables(root: Path) -> Iterator[None]:
    """Point nnU-Net's variables below ``root``, one process and no data workers."""
    values = {
        "nnUNet_raw": str(root / "raw"),
        "nnUNet_preprocessed": str(root / "preprocessed"),
        "nnUNet_results": str(root / "results"),
        "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": "1",
    }
    before = {k: os.environ.get(k) for k in values}
    os.environ.update(values)
    for folder in ("raw", "preprocessed", "results"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
