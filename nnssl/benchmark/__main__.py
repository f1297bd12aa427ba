"""``python -m nnssl.benchmark PART``: performance side by side in one run, as ratios; ``-h`` names the parts."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

from nnssl.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark, print its table as JSON, and store it with ``-o``."""
    from nnssl.benchmark import branches, convert, flops, predict, preprocess, scan, steps

    parser = argparse.ArgumentParser(prog="python -m nnssl.benchmark", description=__doc__)
    parser.add_argument("-o", type=Path, help="also write the result to this JSON file")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    commands = parser.add_subparsers(dest="what", required=True)
    parts = {
        "steps": steps,
        "branches": branches,
        "scan": scan,
        "predict": predict,
        "preprocess": preprocess,
        "convert": convert,
        "flops": flops,
    }
    for name, module in parts.items():
        module.add_arguments(commands.add_parser(name, description=module.__doc__))
    args = parser.parse_args(argv)
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        result = parts[args.what].run(args)
    except UserError as error:
        print(f"nnssl.benchmark: error: {error}", file=sys.stderr)
        return 2
    result = {
        "benchmark": args.what,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        **result,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.o:
        args.o.parent.mkdir(parents=True, exist_ok=True)
        args.o.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
