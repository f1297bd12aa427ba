"""Label values and names: found, mapped, merged."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from nnssl.errors import UserError
from nnssl.imageio import ImageReadError
from nnssl.plans.verify import count_values, listed


def label_names(values: Iterable[int], names: list[str] | None) -> dict[str, int]:
    """Return ``labels`` of dataset.json for the values found: background 0, then ``names`` or label1, label2, ...

    Raises:
        UserError: if the values are not 0..n, or fewer names than values are given.
    """
    found = sorted(set(values) - {0})
    if names is None and found != list(range(1, len(found) + 1)):
        proposal = ",".join(f"{value}:{i}" for i, value in enumerate(found, start=1))
        rule = "label values must be 0 (background), 1, 2, ... without gaps"
        raise UserError(
            rule, f"0, {listed(found)}", None, f"add --label_map {proposal}, or --label_names for all classes"
        )
    if names is None and not found:
        raise UserError("the labels must show at least one class", "background only", None, "check --labels")
    names = [f"label{value}" for value in found] if names is None else list(names)
    if len(set(names)) != len(names) or "background" in names:
        raise UserError("label names must differ, and leave out background", names, None, "mend --label_names")
    if found and found[-1] > len(names):
        rule = "--label_names names the values 1, 2, ... in order"
        raise UserError(
            rule, f"{len(names)} names for values up to {found[-1]}", None, "name every class, or use --label_map"
        )
    return {"background": 0, **{name: i for i, name in enumerate(names, start=1)}}


def parse_label_map(text: str | None) -> dict[int, int] | None:
    """Read ``"1:1,2:1"``: old value to new value; 0 drops a class. Background stays 0.

    Raises:
        UserError: if the text has another form, maps 0 away, or its new values leave a gap.
    """
    if text is None:
        return None
    form = "OLD:NEW,OLD:NEW, e.g. 1:1,2:1"
    if not re.fullmatch(r"\s*\d+\s*:\s*\d+\s*(,\s*\d+\s*:\s*\d+\s*)*", text):
        raise UserError("--label_map lists pairs of label values", repr(text), form, "mend --label_map")
    pairs = [(int(old), int(new)) for old, _, new in (pair.partition(":") for pair in text.split(","))]
    mapping = dict(pairs)
    if len(mapping) != len(pairs) or mapping.get(0, 0) != 0:
        raise UserError(
            "--label_map maps each value once and keeps 0 as background", repr(text), form, "mend --label_map"
        )
    used = sorted(set(mapping.values()) - {0})
    if not used or used != list(range(1, len(used) + 1)):
        raise UserError("new label values must be 1, 2, ... without gaps", used, None, "mend --label_map")
    return {0: 0, **mapping}


def merged_names(labels: dict, label_map: dict[int, int]) -> dict[str, int]:
    """Return ``labels`` of dataset.json after a label map; merged classes are joined with ``+``.

    Raises:
        UserError: if the labels are regions, or the map misses a class or names one that does not exist.
    """
    if any(isinstance(value, (list, tuple)) for value in labels.values()):
        raise UserError("--label_map works on plain labels", "regions", None, "leave --label_map out")
    plain = {name: int(value) for name, value in labels.items()}
    if missing := [f"{name} ({value})" for name, value in plain.items() if value not in label_map]:
        raise UserError(
            "--label_map names every class", f"without {listed(missing)}", None, "add them; OLD:0 drops one"
        )
    if unknown := sorted(label_map.keys() - set(plain.values()) - {0}):
        allowed = sorted(plain.values())
        raise UserError("--label_map names classes of the data set", listed(unknown), allowed, "mend --label_map")
    joined: dict[int, list[str]] = {}
    for name, value in sorted(plain.items(), key=lambda item: item[1]):
        if name != "background" and label_map[value] != 0:
            joined.setdefault(label_map[value], []).append(name)
    if any("ignore" in names and (len(names) > 1 or value != max(joined)) for value, names in joined.items()):
        remedy = "map ignore to the highest new value"
        raise UserError("the label ignore stays alone and highest", joined, None, remedy)
    return {"background": 0, **{"+".join(names): value for value, names in sorted(joined.items())}}


def whole_values(label: np.ndarray) -> dict[int, int]:
    """Return ``{value: voxels}`` of a label map.

    Raises:
        ImageReadError: if a value is no whole number from 0 up.
    """
    values = count_values(label)
    if odd := [f"{v:g}" for v in values if not np.isfinite(v) or v < 0 or v != int(v)]:
        raise ImageReadError(f"label values must be whole numbers from 0 up, found {listed(odd)}")
    return {int(value): voxels for value, voxels in values.items()}


def map_values(
    label: np.ndarray, counts: dict[int, int], label_map: dict[int, int], name: str
) -> tuple[np.ndarray, dict[int, int]]:
    """Apply a label map.

    Args:
        label: whole numbers of any type.
        counts: its values, from :func:`whole_values`.
        label_map: old value -> new value.
        name: what a message calls the label.

    Returns:
        the mapped label, and its values with their voxels.

    Raises:
        UserError: if the label holds a value that the map does not name.
    """
    if unknown := sorted(counts.keys() - label_map.keys()):
        remedy = "add " + ",".join(f"{value}:0" for value in unknown) + " to drop them"
        raise UserError("--label_map names every value of the labels", f"{listed(unknown)} in {name}", None, remedy)
    table = np.zeros(max(counts, default=0) + 1, np.int64)
    mapped: dict[int, int] = {}
    for value, voxels in counts.items():
        table[value] = label_map[value]
        mapped[label_map[value]] = mapped.get(label_map[value], 0) + voxels
    return table[label.astype(np.int64)], mapped
