"""What a published table is: its rows, their reported numbers, and how each is run here. Loads no torch.

``tables/PAPER.json`` holds the tables of one paper, ``flaws.json`` what is known to be wrong with their protocols
(``flaws``) and what is done otherwise here (``differs``), by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from nnssl.errors import UserError, nearest

FOLDER = Path(__file__).parent
#: Metrics of a table that names none, in the order of its rows' numbers.
METRICS = ("dice", "jaccard", "hd95", "asd")
#: Metrics in percent; the others are distances.
SHARES = ("dice", "jaccard", "miou")
#: Rounding of printed percentages, which the Jensen bound may be missed by.
ROUNDING = 0.06


@dataclass(frozen=True)
class Row:
    """One row of a published table.

    Args:
        method: name of the row.
        labeled: what was labeled, as printed.
        reported: the printed numbers in the table's order, percent and voxels; None where there is none.
        trainer: trainer that runs it; None: the system does not exist here.
        preset: preset with its plan, training and prediction.
        set: settings on top of the preset.
        iterations: training steps; None: the preset's.
        share: "few" labels, as the table's split says, or "all" of its training cases.
        note: what a reader of our number must know.
    """

    method: str
    labeled: str
    reported: tuple[float | None, ...]
    trainer: str | None = None
    preset: str | None = None
    set: dict[str, Any] = field(default_factory=dict)
    iterations: int | None = None
    share: str = "few"
    note: str = ""

    @property
    def slug(self) -> str:
        """The method as part of a file name: small letters, digits and single hyphens."""
        text = self.method.lower().replace("+", " plus ").replace("&", " and ")
        return "-".join("".join(c if c.isalnum() else " " for c in text).split())


@dataclass(frozen=True)
class Table:
    """A published table, or the part of it with one data set and number of labels.

    Args:
        paper: key of the paper on the command line.
        name: key of the table there.
        title: name of the proposed method.
        source: the paper and the number of the table.
        dataset: data set, as ``nnssl_convert`` names it.
        published: published split, as ``nnssl_make_subset --published`` names it; None: the converted data set is used
            as it is.
        label_map: old:new label values of the paper's classes, as for ``nnssl_make_subset``; empty: as converted.
        cases: "test" or "val": where the numbers were measured.
        protocol: the paper's protocol, as ``nnssl_evaluate`` names it.
        metrics: metrics of the reported numbers.
        spacing: voxel size in mm (z, y, x) of the paper's grid; None: not fixed.
        crop: "distributed" where the files that the field shares were cut around the label, "preprocessing" where the
            authors' own preparation did that; None: no crop.
        flaws: names of flaws of the protocol.
        differs: names of what is done otherwise here.
        why: why no row can be run, if so.
        rows: the rows.
    """

    paper: str
    name: str
    title: str
    source: str
    dataset: str
    published: str | None
    protocol: str
    rows: tuple[Row, ...]
    label_map: str = ""
    cases: str = "test"
    metrics: tuple[str, ...] = METRICS
    spacing: tuple[float, ...] | None = None
    crop: str | None = None
    flaws: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()
    why: str = ""

    def row(self, name: str) -> Row:
        """Return a row by its method, whatever the case of its letters, or by its slug.

        Raises:
            UserError: if there is none of that name, with the nearest.
        """
        for row in self.rows:
            if name.lower() in (row.method.lower(), row.slug):
                return row
        known = nearest(name, [row.method for row in self.rows])
        raise UserError(f"--row must name a row of {self.paper} {self.name}", repr(name), known, "see --list")


def papers() -> list[str]:
    """Return the papers that have tables."""
    return sorted(path.stem for path in (FOLDER / "tables").glob("*.json"))


@cache
def tables_of(paper: str) -> dict[str, Table]:
    """Return ``{name: table}`` of a paper.

    Raises:
        UserError: if there are none of that paper.
    """
    if paper not in papers():
        raise UserError("PAPER must have tables", repr(paper), nearest(paper, papers()), "nnssl_reproduce --list")
    content = json.loads((FOLDER / "tables" / f"{paper}.json").read_text(encoding="utf-8"))
    return {name: _table(paper, name, content, dict(entry)) for name, entry in content["tables"].items()}


def find_table(paper: str, name: str) -> Table:
    """Return a table by paper and name.

    Raises:
        UserError: if there is none, with the nearest.
    """
    known = tables_of(paper)
    for table in known.values():
        if table.name.lower() == name.lower():
            return table
    remedy = f"nnssl_reproduce {paper} --list"
    raise UserError(f"TABLE must be one of {paper}'s", repr(name), nearest(name, known), remedy)


def explain(kind: str, names: tuple[str, ...]) -> list[str]:
    """Return ``name: what it means`` for flaws (``kind="flaws"``) or differences (``"differs"``)."""
    known = json.loads((FOLDER / "flaws.json").read_text(encoding="utf-8"))[kind]
    return [f"{name}: {known[name]}" for name in names]


def misprint(table: Table, row: Row) -> str:
    """Say why a row's numbers can't all be right; empty if they can.

    Per case J = D / (2 - D) is convex in D, so the mean of J is at least D / (2 - D) of the mean of D (Jensen).
    """
    numbers = dict(zip(table.metrics, row.reported, strict=True))
    dice, jaccard = numbers.get("dice"), numbers.get("jaccard")
    if dice is None or jaccard is None:
        return ""
    least = 100 * dice / (200 - dice)
    return f"misprint: Jaccard can't be below {least:.2f} with this Dice" if jaccard < least - ROUNDING else ""


def _table(paper: str, name: str, content: dict[str, Any], entry: dict[str, Any]) -> Table:
    source = f"{content['source']}, {entry.pop('where')}"
    rows = tuple(Row(**{**row, "reported": tuple(row["reported"])}) for row in entry.pop("rows"))
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Table(paper, name, content["paper"], source, rows=rows, **values)
