"""Which classes are evaluated: labels and regions of a dataset.json, or the values found in the references."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.errors import UserError
from nnssl.plans.domains import Domains


@dataclass(frozen=True)
class LabelSet:
    """The evaluated classes.

    Args:
        classes: class name to the label values that form it (several: a region).
        ignore: value of the ignore label, if there is one; its voxels in the reference are left out.
        known: all values a mask may hold; None if any value is accepted (others than the classes' are background).
    """

    classes: dict[str, tuple[int, ...]]
    ignore: int | None = None
    known: frozenset[int] | None = None

    @classmethod
    def from_block(cls, block: Mapping[str, object], source: str = "labels", closed: bool = False) -> LabelSet:
        """Read nnU-Net's block ``labels``: names to a value or a list of values, ``background`` and ``ignore`` apart.

        Args:
            block: the block.
            source: where it comes from, for errors.
            closed: whether a mask must not hold other values.
        """
        values = {str(name): _values(name, value, source) for name, value in block.items()}
        ignore = values.get("ignore")
        classes = {n: v for n, v in values.items() if n not in ("background", "ignore") and v != (0,)}
        if not classes:
            raise UserError("there must be a class besides the background", f"{dict(block)} in {source}")
        known = frozenset({0}.union(*values.values())) if closed else None
        return cls(classes, ignore[0] if ignore else None, known)

    @classmethod
    def from_dataset_json(cls, path: Path) -> LabelSet:
        """Read the labels of a dataset.json; a mask with a value that is not in it is then an error."""
        return cls.from_block(_load(path)["labels"], str(path), closed=True)

    @classmethod
    def from_values(cls, values: Iterable[int]) -> LabelSet:
        """Make one class, named by its value, of each value but 0."""
        values = sorted(set(values) - {0})
        if not values:
            raise UserError(
                "there must be a class besides the background", "empty references only", None, "give -djfile"
            )
        return cls({str(v): (v,) for v in values})

    def unknown(self, array: np.ndarray) -> list[int]:
        """Return the values of a mask that are not in the label set."""
        known = self.known if self.known is not None else {0, self.ignore}.union(*self.classes.values())
        return [v for v in label_values(array) if v not in known]

    def mask(self, array: np.ndarray, name: str) -> np.ndarray:
        """Return the boolean mask of a class."""
        values = self.classes[name]
        return array == values[0] if len(values) == 1 else np.isin(array, values)

    def as_json(self) -> dict[str, int | list[int]]:
        """Return the classes as in a dataset.json."""
        return {name: v[0] if len(v) == 1 else list(v) for name, v in self.classes.items()}


def read_domains(path: Path) -> dict[str, str]:
    """Return the domain of each case that a dataset.json names (block ``nnssl``); empty if it names none."""
    return Domains.from_json(_load(path)).of_case


def read_provenance(path: Path) -> str | None:
    """Return what a dataset.json says of its scans that a reader of numbers must know (block ``nnssl``), or None."""
    found = _load(path).get("nnssl", {}).get("provenance")
    return str(found) if found else None


def label_values(array: np.ndarray) -> list[int]:
    """Return the sorted values of a label map."""
    if array.min() < 0 or array.max() >= 2**16:
        return np.unique(array).tolist()
    present = np.zeros(2**16, bool)  # many times faster than sorting the voxels
    present[array] = True
    return np.flatnonzero(present).tolist()


def _load(path: Path) -> dict[str, Any]:
    """Read a dataset.json that holds a block ``labels``."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError("-djfile must name a readable dataset.json", path) from error
    except json.JSONDecodeError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("labels"), dict):
        raise UserError("dataset.json must hold a block 'labels'", path, None, "repair the file")
    return content


def _values(name: object, value: object, source: str) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not values or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        got = f"{name}: {value!r} in {source}"
        raise UserError("a label must be an integer, a region a list of integers", got, None, "repair the labels")
    return values
