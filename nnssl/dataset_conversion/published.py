"""Published case lists that ship with the package: who is labeled, unlabeled, val and test in a paper's protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl.errors import UserError, nearest

_FOLDER = Path(__file__).parent / "published"
#: Name of the copy in a converted raw data set.
FILE_NAME = "nnssl_published_splits.json"


@dataclass(frozen=True)
class Protocol:
    """The lists of one protocol, in the published order; ids are cases or patients.

    Args:
        name: e.g. ``LA-4``.
        labeled: the first k ids of the training list.
        unlabeled: the rest of it.
        val: published validation list, possibly empty.
        test: published test list.
        source: where the lists were published.
    """

    name: str
    labeled: list[str]
    unlabeled: list[str]
    val: list[str]
    test: list[str]
    source: str


def load_published(file_name: str) -> dict[str, Any]:
    """Return a split file of the package."""
    return json.loads((_FOLDER / file_name).read_text(encoding="utf-8"))


def find_protocol(name: str, dataset_folder: Path) -> Protocol:
    """Find a protocol in the raw data set's own split file, else in those of the package.

    Raises:
        UserError: naming the protocols that exist.
    """
    known: list[str] = []
    for lists in _split_files(dataset_folder):
        known += lists["protocols"]
        if name in lists["protocols"]:
            count, train = lists["protocols"][name], lists["train"]
            return Protocol(name, train[:count], train[count:], lists["val"], lists["test"], lists["source"])
    raise UserError("--published names a published protocol", repr(name), nearest(name, set(known)), "mend --published")


def _split_files(dataset_folder: Path) -> Iterator[dict[str, Any]]:
    own = dataset_folder / FILE_NAME
    if own.is_file():
        yield json.loads(own.read_text(encoding="utf-8"))
    for path in sorted(_FOLDER.glob("*.json")):
        yield load_published(path.name)
