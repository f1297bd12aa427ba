"""``nnssl_demo``: the whole chain on invented scans, in a few minutes on a CPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nnssl.cli._common import run_command

DESCRIPTION = """Make a small synthetic data set, train SupervisedTrainer and DiffCLTrainer on it under the same budget,
predict, evaluate, and write summary.json, report.html and overlay pictures. At most ten minutes on two cores."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; loads nothing heavy."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument("-o", default="nnssl_demo_output", metavar="DIR", help="output folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of scans and trainings (default: %(default)s)")
    parser.add_argument("--iterations", type=int, metavar="N", help="steps of each training (default: the demo's own)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier demo in DIR")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Run the demo and print its table."""
    from nnssl.demo.run import ITERATIONS, DemoSettings, run_demo

    iterations = ITERATIONS if args.iterations is None else args.iterations
    settings = DemoSettings(Path(args.o), args.seed, iterations, args.overwrite)
    summary = run_demo(settings)
    print(table(summary))
    print(f"\n{summary['iterations']} steps each, seed {summary['seed']}, {summary['seconds_total']:.0f} s in all")
    print(f"open {settings.folder / 'report.html'}; numbers are in {settings.folder / 'summary.json'}")
    return 0


def table(summary: dict) -> str:
    """Return the results as a plain table."""
    trainers = summary["trainers"]
    classes = list(next(iter(trainers.values()))["dice"])
    lines = [["trainer", "Dice", *classes, "HD95 mm", "training s"]]
    for name, scores in trainers.items():
        dice = [scores["dice_mean"], *scores["dice"].values()]
        numbers = [f"{v:.3f}" if v is not None else "n/a" for v in dice]
        distance = "n/a" if scores["hd95_mm"] is None else f"{scores['hd95_mm']:.1f}"
        lines.append([name, *numbers, distance, f"{scores['seconds']:.0f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = (
        "  ".join(t.rjust(w) if i else t.ljust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True)))
        for row in lines
    )
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``nnssl_demo``."""
    return run_command("nnssl_demo", build_parser, execute, argv)


if __name__ == "__main__":
    sys.exit(main())
