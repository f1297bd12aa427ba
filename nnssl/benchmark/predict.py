"""Cost of prediction: ``nnssl_predict`` against ``nnUNetv2_predict`` on the same model, or against another model."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from nnssl.benchmark.timing import interleaved, summary

#: Stock prediction in a process of its own, also where torchvision and torch do not fit (see mend_torchvision).
STOCK_PREDICT = (
    "from nnssl.environment import mend_torchvision; mend_torchvision(); "
    "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as main; main()"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the prediction benchmark."""
    parser.add_argument("-i", required=True, help="folder of images")
    parser.add_argument("-m", required=True, help="model folder (TRAINER__PLANS__CONFIGURATION)")
    parser.add_argument("--control", help="compare with nnssl_predict of this model folder instead of stock prediction")
    parser.add_argument("-f", default="all", help="fold")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side (default %(default)s)")
    parser.add_argument("-device", default="cpu")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time whole processes in turns and compare the masks bit for bit."""
    from nnssl.trainers.registry import shim_folder

    environment = {**os.environ, "nnUNet_extTrainer": str(shim_folder())}
    other = "control" if args.control else "nnUNetv2_predict"
    with tempfile.TemporaryDirectory() as folder:
        common = ["-i", args.i, "-f", args.f, "-device", args.device]
        ours = "import sys; from nnssl.cli.predict import main; sys.exit(main())"

        def call(code: str, model: str, out: str) -> None:
            command = [sys.executable, "-c", code, *common, "-m", model, "-o", str(Path(folder, out))]
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)

        sides = {
            other: lambda: call(ours if args.control else STOCK_PREDICT, args.control or args.m, "other"),
            "nnssl_predict": lambda: call(ours, args.m, "ours"),
        }
        seconds = interleaved(sides, args.repeats)
        names = sorted(p.name for p in Path(folder, "other").glob("*.nii.gz"))
        same = [n for n in names if Path(folder, "ours", n).read_bytes() == Path(folder, "other", n).read_bytes()]
    pairs = zip(seconds["nnssl_predict"], seconds[other], strict=True)
    return {
        "cases": len(names),
        "identical_masks": len(same),
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "time_ratio": statistics.median(a / b for a, b in pairs),
    }
