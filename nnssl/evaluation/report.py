"""Results as files and as text: JSON without NaN, one CSV row per case and class, tables for the terminal."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nnssl.errors import UserError

_TITLES = {"dice": "Dice", "jaccard": "Jaccard", "hd95": "HD95", "assd": "ASSD", "asd": "ASD", "nsd": "NSD"}
_DISTANCES = ("hd95", "assd", "asd")


def result_table(result: Mapping[str, Any]) -> str:
    """Return the tables of one evaluation: means over cases, and IoU over the voxels of all cases.

    The first has mean ± standard deviation per class, and the means of foreground and domains.
    """
    metrics = result["metrics"]
    head = ["class", *(_title(m, result) for m in metrics), "n", "both empty", "one empty"]
    rows = [head]
    for name in result["labels"]:
        cells = [_cell(m, result["mean"][name][m], result["std"][name][m]) for m in metrics]
        empty = result["empty"][name]
        count = result["count"][name][metrics[0]]
        rows.append([name, *cells, str(count), str(empty["both_empty"]), str(empty["one_empty"])])
    rows.append(["mean of classes", *(_cell(m, result["foreground_mean"][m], None) for m in metrics), "", "", ""])
    over_cases = zip(metrics, *(_row(result, f"foreground_{k}_over_cases") for k in ("mean", "std")), strict=True)
    rows.append(["mean of cases", *(_cell(*cell) for cell in over_cases), str(len(result["cases"])), "", ""])
    for domain, over in result["domains"].items():
        cells = [_cell(m, over["foreground_mean"][m], None) for m in metrics]
        rows.append([f"mean of classes, domain {domain}", *cells, str(len(over["cases"])), "", ""])
    title = f"{result['prediction']}: {len(result['cases'])} cases, protocol {result['protocol']}"
    notes = [f"note: {note}" for note in result["notes"]]
    return "\n".join([title, _align(rows), "", _align(_pooled_rows(result)), *notes])


def _pooled_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the IoU over all voxels: a row a class, a column for the whole set and for each domain."""
    over = {"all cases": result, **{f"domain {name}": part for name, part in result["domains"].items()}}
    found = [part["miou"] for part in over.values()]
    rows = [["IoU of the set", *over]]
    rows += [[name, *(_cell("iou", miou["iou"][name], None) for miou in found)] for name in found[0]["iou"]]
    for title, key in (("mIoU", "mean"), ("mIoU without background", "mean_without_background")):
        rows.append([title, *(_cell("iou", miou[key], None) for miou in found)])
    return rows


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of paired differences."""
    lines = [["second - first", "metric", "class", "difference [95 %]", "p", "p (Holm)", "n", "excluded", ""]]
    for row in rows:
        interval = ""
        if row["ci_low"] is not None:
            interval = f" [{_signed(row['metric'], row['ci_low'])}, {_signed(row['metric'], row['ci_high'])}]"
        difference = _signed(row["metric"], row["mean_difference"]) + interval
        pair = f"{row['second']} - {row['first']}"
        tests = [_p(row["p"]), _p(row["p_holm"])]
        counts = [str(row["n"]), str(row["excluded"])]
        lines.append([pair, _TITLES[row["metric"]], row["label"], difference, *tests, *counts, row["note"]])
    return _align(lines)


def as_csv(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one row per prediction, case and class; undefined values are empty cells.

    If a case has a domain, there is a column of domains.
    """
    metrics = next(iter(results.values()))["metrics"]
    homes = {n: {c: d for d, over in r["domains"].items() for c in over["cases"]} for n, r in results.items()}
    extra = ["domain"] if any(homes.values()) else []
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["prediction", "case", *extra, "class", *metrics, "empty"])
    for name, result in results.items():
        for case, by_class in result["cases"].items():
            for label, values in by_class.items():
                empty = result["empty"][label]["cases"].get(case, "")
                numbers = ["" if values[m] is None else values[m] for m in metrics]
                writer.writerow([name, case, *(homes[name].get(case, "") for _ in extra), label, *numbers, empty])
    return buffer.getvalue()


def write_files(files: Mapping[Path, str]) -> None:
    """Write texts so that each file is either the old or the whole new one: to a temporary file, then renamed.

    Raises:
        UserError: if a file can't be written.
    """
    temporary: dict[Path, str] = {}
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(handle, "w", encoding="utf-8", newline="") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary[path], 0o666 & ~_umask())  # mkstemp makes private files
        for path, name in temporary.items():
            os.replace(name, path)
    except OSError as error:
        for name in temporary.values():
            with suppress(OSError):
                os.unlink(name)
        raise UserError("the result must be writable", error, None, "choose another place with -o") from error


def to_json(data: Any) -> str:
    """Return JSON text; NaN and infinity are an error of the program, never output."""
    return json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _title(metric: str, result: Mapping[str, Any]) -> str:
    if metric in _DISTANCES:
        return f"{_TITLES[metric]} ({result['unit']})"
    return f"NSD ({result['nsd_tolerance_mm']:g} {result['unit']})" if metric == "nsd" else _TITLES[metric]


def _row(result: Mapping[str, Any], key: str) -> list[float | None]:
    return [result[key][m] for m in result["metrics"]]


def _cell(metric: str, mean: float | None, std: float | None) -> str:
    if mean is None:
        return "-"
    digits = 2 if metric in _DISTANCES else 4
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def _signed(metric: str, value: float | None) -> str:
    return "-" if value is None else f"{value:+.{2 if metric in _DISTANCES else 4}f}"


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.0001" if value < 1e-4 else f"{value:.4f}"


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
