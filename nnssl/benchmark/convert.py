"""Cost of a conversion, with all its checks, against plainly reading and writing the same files."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.benchmark.timing import summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the conversion benchmark."""
    parser.add_argument("--cases", type=int, default=100, help="synthetic cases (default %(default)s)")
    parser.add_argument("--shape", type=int, nargs=3, default=[48, 128, 128], metavar=("Z", "Y", "X"), help="voxels")
    parser.add_argument("--repeats", type=int, default=3, help="timed conversions of each side (default %(default)s)")
    parser.add_argument("-np", type=int, default=1, help="processes of the conversion (default %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Convert a download in LA's layout, all of whose files change their format, and time the plain loop in turns."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_download(root / "download", args.cases, tuple(args.shape))
        seconds: dict[str, list[float]] = {"plain": [], "nnssl_convert": []}
        processor: dict[str, list[float]] = {side: [] for side in seconds}
        for number in range(args.repeats + 1):
            for side, call in (("plain", _plain), ("nnssl_convert", _convert)):
                target = root / f"{side}{number}"
                target.mkdir()
                start, before = time.perf_counter(), time.process_time()
                call(root / "download", target, args.np)
                if number:  # the first round fills the caches of both
                    seconds[side].append(time.perf_counter() - start)
                    processor[side].append(time.process_time() - before)
        sizes = {side: _bytes(root / f"{side}1") for side in seconds}
    ratio = {
        name: statistics.median(a / b for a, b in zip(taken["nnssl_convert"], taken["plain"], strict=True))
        for name, taken in (("time", seconds), ("processor", processor))
    }
    return {
        "cases": args.cases,
        "shape": list(args.shape),
        "processes": args.np,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "bytes": sizes,
        "time_ratio": ratio["time"],
        # beside other busy processes this is the steadier number; it knows this process only
        "processor_time_ratio": ratio["processor"] if args.np == 1 else None,
    }


def make_download(folder: Path, cases: int, shape: tuple[int, ...], seed: int = 0) -> None:
    """Write scans of noise on a slope and masks of a box, as the challenge distributes them."""
    import SimpleITK as sitk

    generator = np.random.default_rng(seed)
    slope = np.linspace(0, 150, shape[-1])
    for number in range(cases):
        scan = (slope + generator.normal(0, 8, shape)).clip(0, 255).astype(np.uint8)
        mask = np.zeros(shape, np.uint8)
        mask[tuple(slice(n // 4, 3 * n // 4) for n in shape)] = 255
        path = folder / f"CASE{number:04d}"
        path.mkdir(parents=True)
        for name, array in (("lgemri", scan), ("laendo", mask)):
            image = sitk.GetImageFromArray(array)
            image.SetSpacing((0.625, 0.625, 0.625))
            sitk.WriteImage(image, str(path / f"{name}.nrrd"), useCompression=True)


def _plain(download: Path, target: Path, processes: int) -> None:
    """Read and write every file, as a script of five lines would; in this process, whatever ``processes`` says."""
    import SimpleITK as sitk

    for path in sorted(download.glob("*/*.nrrd")):
        image = sitk.ReadImage(str(path))
        sitk.WriteImage(image, str(target / f"{path.parent.name}_{path.stem}.nii.gz"), useCompression=True)


def _convert(download: Path, target: Path, processes: int) -> None:
    from nnssl.dataset_conversion.convert import convert

    before = os.environ.get("nnUNet_raw")
    os.environ["nnUNet_raw"] = str(target)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # the release is not whole
            convert("LA", download, 999, num_processes=processes)
    finally:
        if before is None:
            del os.environ["nnUNet_raw"]
        else:
            os.environ["nnUNet_raw"] = before


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.nii.gz"))
