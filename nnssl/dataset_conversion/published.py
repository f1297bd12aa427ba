"""Case lists that ship with the package: who is labeled, unlabeled, val and test in a paper's protocol.

A split file holds ``dataset``, ``unit``, ``source``, ``note``, and ``protocols`` {name: protocol}. A protocol is a
number k, which labels the first k ids of the list ``train``, leaves its rest unlabeled and takes the lists ``val`` and
``test``; or an object with the roles ``labeled``, ``unlabeled``, ``val`` and ``test``, each a list of ids, in which
``@NAME`` stands for a list of the file. Labeled ids leave ``unlabeled``. ``ours`` marks lists that no paper published;
ids in ``withdrawn`` are in no role.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
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
        labeled: the labeled ids of the training list.
        unlabeled: the rest of it.
        val: published validation list, possibly empty.
        test: published test list.
        source: where the lists were published.
        withdrawn: ids of the published lists that are left out, since their scans were withdrawn.
        ours: whether the lists are this package's own.
    """

    name: str
    labeled: list[str]
    unlabeled: list[str]
    val: list[str]
    test: list[str]
    source: str
    withdrawn: tuple[str, ...] = ()
    ours: bool = False


def load_published(file_name: str) -> dict[str, Any]:
    """Return a split file of the package."""
    return json.loads((_FOLDER / file_name).read_text(encoding="utf-8"))


def protocol_names(file_name: str | None) -> list[str]:
    """Return the protocols of a split file of the package."""
    return list(load_published(file_name)["protocols"]) if file_name else []


def find_protocol(name: str, dataset_folder: Path) -> Protocol:
    """Find a protocol in the raw data set's own split file, else in those of the package.

    Raises:
        UserError: naming the protocols that exist.
    """
    known: list[str] = []
    for lists in _split_files(dataset_folder):
        known += lists["protocols"]
        if name in lists["protocols"]:
            return _protocol(name, lists)
    raise UserError("--published names a published protocol", repr(name), nearest(name, set(known)), "mend --published")


def _protocol(name: str, lists: dict[str, Any]) -> Protocol:
    roles = lists["protocols"][name]
    if isinstance(roles, int):
        roles = {"labeled": lists["train"][:roles], "unlabeled": ["@train"], "val": ["@val"], "test": ["@test"]}
    ids = {role: _resolved(roles.get(role, ()), lists) for role in ("labeled", "unlabeled", "val", "test")}
    labeled, withdrawn = set(ids["labeled"]), set(lists.get("withdrawn", ()))
    ids["unlabeled"] = [one for one in ids["unlabeled"] if one not in labeled]
    gone = sorted({one for listed in ids.values() for one in listed} & withdrawn)
    kept = {role: [one for one in listed if one not in withdrawn] for role, listed in ids.items()}
    return Protocol(name, **kept, source=lists["source"], withdrawn=tuple(gone), ours=lists.get("ours", False))


def _resolved(ids: Iterable[str], lists: dict[str, Any]) -> list[str]:
    found: list[str] = []
    for one in ids:
        found += lists[one[1:]] if one.startswith("@") else [one]
    return found


def _split_files(dataset_folder: Path) -> Iterator[dict[str, Any]]:
    own = dataset_folder / FILE_NAME
    if own.is_file():
        yield json.loads(own.read_text(encoding="utf-8"))
    for path in sorted(_FOLDER.glob("*.json")):
        yield load_published(path.name)
