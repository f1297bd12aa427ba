"""``nnssl_info``: what exists, as a table or as JSON. Loads no torch (``system`` asks it for the device last)."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence

from nnssl.cli._common import run_command

Rows = list[dict[str, object]]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; loads nothing heavy."""
    parser = argparse.ArgumentParser(description="List trainers, data set converters, presets, or describe the system.")
    parser.add_argument("what", choices=sorted(TOPICS), help="what to list")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Print one topic."""
    rows = TOPICS[args.what]()
    if args.json:
        print(json.dumps({row["fact"]: row["value"] for row in rows} if args.what == "system" else rows, indent=2))
    else:
        print(_table(rows, args.what))
    return 0


def trainers() -> Rows:
    """Return one row a trainer: method, paper, family, cost of a step and memory against the supervised trainer."""
    from nnssl.trainers.registry import TRAINERS

    return [{"trainer": name, **dataclasses.asdict(info)} for name, info in sorted(TRAINERS.items())]


def datasets() -> Rows:
    """Return one row a public data set that ``nnssl_convert`` reads: terms, source, layouts and published splits."""
    from nnssl.dataset_conversion import CONVERTERS
    from nnssl.dataset_conversion.published import load_published, protocol_names

    rows: Rows = []
    for name, converter in sorted(CONVERTERS.items()):
        protocols = protocol_names(converter.PUBLISHED)
        ours = bool(protocols) and load_published(str(converter.PUBLISHED)).get("ours", False)
        rows.append(
            {
                "dataset": name,
                "title": converter.TITLE,
                "licence": converter.LICENCE,
                "source": converter.SOURCE_URL,
                "published_splits": [] if ours else protocols,
                "own_splits": protocols if ours else [],
                "converter": f"nnssl_convert {name} SRC -d ID",
                "layouts": list(converter.LAYOUTS.values()),
                "literature_crop": list(converter.CROPS),
                "page": f"documentation/datasets/{converter.PAGE}.md",
            }
        )
    return rows


def presets() -> Rows:
    """Return one row a preset: its name, what it is and the commands it has a section for."""
    from nnssl.plans.preset import available_presets, load_preset

    rows: Rows = []
    for name, path in available_presets().items():
        preset = load_preset(str(path))
        about = {k: v for k, v in preset.items() if isinstance(v, (str, int, float)) and k != "name"}
        sections = [k for k, v in preset.items() if isinstance(v, dict)]
        rows.append({"preset": name, **about, "sections": sections})
    return rows


def system() -> Rows:
    """Return one row a fact: versions, device, nnU-Net's variables, the trainer shim."""
    from nnssl.layout import VARIABLES
    from nnssl.trainers.registry import shim_folder

    facts: dict[str, object] = {"python": platform.python_version(), "platform": platform.platform()}
    for distribution in ("nnssl-semi", "nnunetv2", "torch", "mamba-ssm"):
        facts[distribution] = _version(distribution)
    facts |= _devices()
    facts["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts |= {name: os.environ.get(name) or "unset" for name in (*VARIABLES, "nnUNet_extTrainer")}
    facts["trainer shim"] = str(shim_folder())
    facts["for stock nnUNetv2_predict"] = f'export nnUNet_extTrainer="{shim_folder()}"'
    return [{"fact": name, "value": value} for name, value in facts.items()]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, object]:
    try:
        import torch
    except ImportError as error:  # the rest of the table helps to mend this
        return {"device": f"unknown: torch can't be imported ({error})"}
    there = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    device = "cuda" if there else "mps" if torch.backends.mps.is_available() else "cpu"
    return {"device": device, "GPUs": ", ".join(there) or "none"}


#: Columns whose name leaves their unit open.
LABELS = {"step_cost": "step cost (supervised step = 1)", "memory_factor": "memory (supervised = 1)"}
#: Topic -> its rows.
TOPICS: dict[str, Callable[[], Rows]] = {
    "trainers": trainers,
    "datasets": datasets,
    "presets": presets,
    "system": system,
}


def _table(rows: Rows, topic: str) -> str:
    """Return rows as a table when it fits the terminal, else as one block a row."""
    if not rows:
        return f"no {topic}"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_text(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    if sum(widths) + 2 * len(widths) <= 120 or len(columns) == 2:
        lines = [
            "  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip() for line in [columns, *cells]
        ]
        return "\n".join(lines if topic != "system" else lines[1:])
    names = [LABELS.get(c, c.replace("_", " ")) for c in columns[1:]]
    label = max(map(len, names))
    blocks = []
    for line in cells:
        details = [f"  {name.ljust(label)}  {text}" for name, text in zip(names, line[1:], strict=True) if text]
        blocks.append("\n".join([line[0], *details]))
    return "\n\n".join(blocks)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``nnssl_info``."""
    return run_command("nnssl_info", build_parser, execute, argv)


if __name__ == "__main__":
    sys.exit(main())
