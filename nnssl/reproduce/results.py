"""Our numbers beside the reported ones: means and spread over seeds, tags, flaws. Loads no torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnssl.layout import RawDataset
from nnssl.reproduce.recipe import Recipe, Request
from nnssl.reproduce.table import SHARES, Row, Table, explain, misprint

#: Metrics that are shown of our own protocol beside the paper's.
MM = {"dice": "dice", "jaccard": "jaccard", "hd95": "hd95", "asd": "assd", "miou": "miou"}
_TITLES = {"dice": "Dice %", "jaccard": "Jaccard %", "hd95": "HD95", "asd": "ASD", "miou": "mIoU %"}


def read_scores(path: Path, metrics: Sequence[str]) -> dict[str, float | None] | None:
    """Return metrics of a result of ``nnssl_evaluate``, shares in percent; None if there is no result.

    The means are over cases, then over classes; ``miou`` is over all voxels, background included.
    """
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    values = {}
    for metric in metrics:
        value = result["miou"]["mean"] if metric == "miou" else result["foreground_mean"][metric]
        values[metric] = 100 * value if value is not None and metric in SHARES else value
    return values


def over_seeds(scores: Sequence[Mapping[str, float | None]], metric: str) -> dict[str, Any]:
    """Return mean, sample standard deviation (None for one seed) and number of seeds of a metric."""
    values = [value for s in scores if (value := s[metric]) is not None]
    return {
        "mean": statistics.fmean(values) if values else None,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def tags(table: Table, request: Request, dataset: RawDataset | None, substitute: bool, missing: str = "") -> list[str]:
    """Return what every number of ours must carry: what differs from the published set-up in data and budget."""
    found = [*(["substitute test"] if substitute else []), *([missing] if missing else [])]
    if table.crop and dataset is not None:
        about = dataset.nnssl  # of a data set that was imported by hand nothing is known but what the field shares
        cut = "label-cut" in about.get("provenance", "") or ("source" not in about and table.crop == "distributed")
        found.append("label-cut crop" if cut else "whole scans, the paper's are cut around the label")
    if request.budget != 1:
        found.append(f"budget {request.budget:g}")
    if request.spacing is not None and request.spacing != table.spacing:
        found.append(f"trained at {' x '.join(f'{v:g}' for v in request.spacing)} mm")
    return [*found, *request.settings]


def row_result(
    table: Table, row: Row, recipe: Recipe | None, places: Sequence[Any], marks: Sequence[str]
) -> dict[str, Any]:
    """Return one row: reported numbers, and ours under both protocols as far as they are there."""
    result: dict[str, Any] = {
        "method": row.method,
        "labeled": row.labeled,
        "reported": dict(zip(table.metrics, row.reported, strict=True)),
        "misprint": misprint(table, row),
    }
    if recipe is None:
        return result | {"reported_only": table.why or "no such trainer in nnssl"}
    ours: dict[str, Any] = {}
    for way, names in (("paper", table.metrics), ("mm", [MM[m] for m in table.metrics])):
        scores = [s for place in places if (s := read_scores(place.scores(way), names)) is not None]
        ours[way] = {metric: over_seeds(scores, metric) for metric in names} if scores else None
    notes = [*marks, *([row.note] if row.note else [])]
    return result | {"trainer": row.trainer, "iterations": recipe.iterations, **ours, "notes": notes}


def as_data(table: Table, request: Request, rows: Sequence[Mapping[str, Any]], voxel: Sequence[float] | None) -> dict:
    """Return the whole comparison as JSON data."""
    return {
        "paper": table.title,
        "table": table.name,
        "source": table.source,
        "protocol": table.protocol,
        "cases": table.cases,
        "voxel_mm": list(voxel) if voxel else None,
        "paper_voxel_mm": list(table.spacing) if table.spacing else None,
        "budget": request.budget,
        "seeds": list(request.seeds),
        "rows": list(rows),
        "flaws": explain("flaws", table.flaws),
        "differs": explain("differs", table.differs),
    }


def as_text(data: Mapping[str, Any]) -> str:
    """Return the comparison as plain text."""
    metrics = list(data["rows"][0]["reported"])
    lines = [["method", "labeled", "", *(_TITLES[m] for m in metrics), "seeds", "notes"]]
    for row in data["rows"]:
        about = [row["method"], row["labeled"]]
        note = f"reported only: {row['reported_only']}" if "reported_only" in row else ""
        printed = [_number(row["reported"][m]) for m in metrics]
        lines.append([*about, "reported", *printed, "", "; ".join(filter(None, (note, row["misprint"])))])
        if "reported_only" in row:
            continue
        for way, title in (("paper", f"here, {data['protocol']}"), ("mm", "here, mm")):
            if row[way] is None:
                lines.append(["", "", title, *("" for _ in metrics), "0", "not run yet"])
                continue
            cells = [_spread(value) for value in row[way].values()]
            count = max(value["n"] for value in row[way].values())
            lines.append(["", "", title, *cells, str(count), ", ".join(row["notes"])])
    head = f"{data['paper']}, {data['table']}: {data['source']}; {data['cases']} cases"
    parts = [head, "", _aligned(lines), "", *_units(data, metrics)]
    for title, key in (("Known flaws of the paper's protocol", "flaws"), ("What is done otherwise here", "differs")):
        if data[key]:
            parts += ["", f"{title}:", *(f"- {line}" for line in data[key])]
    return "\n".join(parts)


def _units(data: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    lines = ["Ours: mean ± standard deviation over training seeds, last checkpoint."]
    if "hd95" in metrics or "asd" in metrics:
        voxel, theirs = data["voxel_mm"], data["paper_voxel_mm"]
        text = (
            "Reported distances and those of the paper's protocol are in voxels; under mm they are in mm, ASD is ASSD."
        )
        if voxel and theirs and voxel != theirs:
            text += f" A voxel of these files is {_size(voxel)} mm, one of the paper's {_size(theirs)} mm."
        lines.append(text)
    return lines


def _size(numbers: Sequence[float]) -> str:
    return " x ".join(f"{v:g}" for v in numbers)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _spread(value: Mapping[str, Any]) -> str:
    return _number(value["mean"]) + (f" ± {value['sd']:.2f}" if value["sd"] is not None else "")


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
