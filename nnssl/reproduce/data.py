"""The data of a table: find the converted data set, hide labels by the published split, number the subset."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl.dataset_conversion.labels import parse_label_map
from nnssl.dataset_conversion.published import Protocol, find_protocol
from nnssl.dataset_conversion.subset import RECORD, SubsetRequest, choose_cases
from nnssl.errors import UserError
from nnssl.imageio import split_ending
from nnssl.layout import IMAGE_FOLDERS, RawDataset, find_dataset, variable
from nnssl.reproduce.recipe import digest
from nnssl.reproduce.table import FOLDER, Table

#: Ids that subsets take, the first free one.
IDS = range(800, 1000)
#: Folders of the cases that are predicted and of their references.
FOLDERS = {"test": ("imagesTs", "labelsTs"), "val": ("imagesVal", "labelsVal")}


@dataclass(frozen=True)
class SubsetPlan:
    """A subset that a row needs: which one, and how it is made.

    Args:
        name: its name, without ``DatasetXXX_``.
        source: the data set it is drawn from.
        protocol: the published lists; None: the source is used as it is.
        share: "few" or "all" labels.
        test_ids: ids of a substitute test set; None: the published one.
        label_map: old:new label values; empty: as they are.
    """

    name: str
    source: RawDataset
    protocol: Protocol | None
    share: str
    test_ids: tuple[str, ...] | None
    label_map: str = ""

    def existing(self) -> RawDataset | None:
        """Return the subset if it was made.

        Raises:
            UserError: if a data set of that name is another one: from another source, or with other cases.
        """
        if self.protocol is None:
            return self.source
        found = sorted(variable("nnUNet_raw").glob(f"Dataset[0-9][0-9][0-9]_{self.name}"))
        if not found:
            return None
        record = _read_record(found[0])
        made_from = record.get("source", "no record")
        if len(found) > 1 or made_from != self.source.name:
            rule = f"{self.name} must be the one subset of {self.source.name}"
            got = f"{', '.join(p.name for p in found)}, from {made_from}"
            raise UserError(rule, got, None, "rename or remove it, or name its source with -d")
        subset = RawDataset.load(found[0])
        if different := self._differences(subset, record):
            rule = f"{subset.name} must hold the cases that {self.protocol.name} asks of {self.source.name} now"
            remedy = "rename or remove it, its preprocessed data and its results, then run the same command"
            raise UserError(rule, f"another {', '.join(different)}", None, remedy)
        return subset

    def words(self, ids: Path, processes: int | None) -> list[str]:
        """Return the command that makes it.

        Args:
            ids: folder for the id files that it reads.
            processes: worker processes; None: the command's default.
        """
        assert self.protocol is not None
        self._require_published(self.protocol)
        asked = self._request()
        words = ["nnssl_make_subset", "-d", self.source.name, "-o", str(_free_id()), "-n", self.name]
        words += ["--published", asked.published] if asked.published else []
        for role, members in (("labeled", asked.labeled_ids), ("val", asked.val_ids), ("test", asked.test_ids)):
            if members:
                words += [f"--{role}_ids", _write_ids(ids / f"{self.name}_{role}.txt", members)]
        words += ["--label_map", self.label_map] if self.label_map else []
        return words + (["-np", str(processes)] if processes else []) + ["--link"]

    def missing(self) -> str:
        """Say how many unlabeled cases of the published list the source lacks; empty: none.

        Training goes on without them, other than without labeled or test cases, so every number must say it.
        """
        if self.protocol is None or self.share == "all":
            return ""
        known: set[str] = set()
        for folder in IMAGE_FOLDERS:
            for case in self.source.cases(folder):
                known |= {case, self.source.patient(case)}
        absent = sum(name not in known for name in self.protocol.unlabeled)
        return f"{absent} of {len(self.protocol.unlabeled)} unlabeled ids missing" if absent else ""

    def _request(self) -> SubsetRequest:
        """Return what the command that makes it asks for."""
        assert self.protocol is not None
        protocol, label_map = self.protocol, parse_label_map(self.label_map or None)
        if self.share == "few":
            return SubsetRequest(published=protocol.name, test_ids=self.test_ids, label_map=label_map, link=True)
        test = self.test_ids or protocol.test
        labeled = _present(self.source, [*protocol.labeled, *protocol.unlabeled], without=test)
        val, there = _present(self.source, protocol.val), _present(self.source, test)
        return SubsetRequest(
            labeled_ids=tuple(labeled),
            val_ids=tuple(val) or None,
            test_ids=tuple(there) or None,
            label_map=label_map,
            link=True,
        )

    def _differences(self, subset: RawDataset, record: dict[str, Any]) -> list[str]:
        """Name what a subset has otherwise than one that would be made now: a name says nothing about cases."""
        asked = self._request()
        with warnings.catch_warnings():  # what is worth a warning was said when the subset was made
            warnings.simplefilter("ignore")
            selection = choose_cases(self.source, asked)
        roles = {"labeled": "imagesTr", "unlabeled": "imagesUn", "val": "imagesVal", "test": "imagesTs"}
        now: dict[str, Any] = {f"list of {role} cases": sorted(getattr(selection, role)) for role in roles}
        then: dict[str, Any] = {f"list of {role} cases": sorted(subset.cases(roles[role])) for role in roles}
        now["label map"] = {str(old): new for old, new in (asked.label_map or {}).items()}
        then["label map"] = record.get("label_map", {})
        for key in ("source", "layout", "provenance"):  # a source converted anew keeps its name
            now[f"{key} of the scans"], then[f"{key} of the scans"] = self.source.nnssl.get(key), subset.nnssl.get(key)
        return [key for key in now if now[key] != then[key]]

    def _require_published(self, protocol: Protocol) -> None:
        """Refuse a source that lacks labeled or test cases: its numbers would stand beside those of the whole list."""
        wanted = [*protocol.labeled, *(protocol.unlabeled if self.share == "all" else ())]
        wanted += [] if self.test_ids else list(protocol.test)
        there = set(_present(self.source, wanted))
        if absent := [name for name in wanted if name not in there]:
            rule = f"{self.source.name} must hold every labeled and test case of {protocol.name}, with its label"
            got = f"{len(absent)} of {len(wanted)} are missing: {', '.join(absent[:5])}"
            raise UserError(rule, got, None, "convert the whole data set, or give --test_ids for other test cases")


def _read_record(folder: Path) -> dict[str, Any]:
    record = folder / RECORD
    return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}


def plan_subset(table: Table, share: str, given: str | None, test_ids: tuple[str, ...] | None) -> SubsetPlan:
    """Decide which subset the rows of a table need.

    Args:
        table: the table.
        share: "few" or "all".
        given: id or name of the converted data set; None: it is looked for.
        test_ids: ids of a substitute test set.

    Raises:
        UserError: if the data set or the split is not there.
    """
    source = find_source(table, given)
    if table.published is None:
        if test_ids:
            raise UserError(f"{table.dataset} is used as it was converted", "--test_ids", None, "leave it out")
        return SubsetPlan("", source, None, share, None)
    protocol = published(table, source.folder)
    name = "Repro_" + table.published.replace("-", "_")
    if share == "all":  # one for all numbers of labels, whose lists are the same together
        lists = [sorted([*protocol.labeled, *protocol.unlabeled]), sorted(protocol.val), sorted(protocol.test)]
        name = f"Repro_{table.dataset.replace('-', '_')}_all_{digest([lists, table.label_map])}"
    if test_ids:
        name += "_" + test_tag(test_ids)
    return SubsetPlan(name, source, protocol, share, test_ids, table.label_map)


def test_tag(test_ids: Sequence[str]) -> str:
    """Return a short name of a substitute test set: the same for the same ids in any order."""
    return "t" + digest(sorted(test_ids))[1:]


def published(table: Table, folder: Path) -> Protocol:
    """Return the published split of a table: the data set's own in ``folder``, else the package's.

    Raises:
        UserError: if this version of the package does not have it.
    """
    try:
        return find_protocol(str(table.published), folder)
    except UserError as error:
        rule = f"{table.paper} {table.name} needs the published split {table.published} of {table.dataset}"
        remedy = "update nnssl, or put the split into the data set's nnssl_published_splits.json"
        raise UserError(rule, "a version without it", error.allowed, remedy) from error


def find_source(table: Table, given: str | None) -> RawDataset:
    """Return the converted data set: the given one, else the one in nnUNet_raw that was converted from the table's.

    A data set that was imported by hand is found by its cases: it holds those that the split labels, with their labels.

    Raises:
        UserError: if none or several are found, or the given one is another data set than the table's.
    """
    if given:
        dataset = RawDataset.load(find_dataset(given))
        _require_kind(table, dataset)
        return dataset
    root = variable("nnUNet_raw")
    folders = [p for p in sorted(root.glob("Dataset[0-9][0-9][0-9]_*")) if (p / "dataset.json").is_file()]
    candidates = []
    for folder in folders:
        with contextlib.suppress(UserError):  # another data set's broken file is not this table's matter
            candidates += [RawDataset.load(folder)] if not (folder / RECORD).is_file() else []
    found = [d for d in candidates if d.nnssl.get("source") == table.dataset]
    if not found and table.published is not None:
        with contextlib.suppress(UserError):  # without the package's split only a conversion can be found
            labeled = published(table, FOLDER).labeled
            found = [d for d in candidates if "source" not in d.nnssl and _holds(d, labeled)]
    if len(found) != 1:
        rule = f"{table.paper} {table.name} needs the data set {table.dataset} in {root}"
        got = ", ".join(d.name for d in found) or "none that fits"
        convert = f"nnssl_convert {table.dataset} SRC -d ID"
        raise UserError(rule, got, "one, or -d ID", "name it with -d" if found else f"{convert}, or name it with -d")
    return found[0]


def require_references(table: Table, dataset: RawDataset) -> tuple[Path, Path]:
    """Return the folders of the cases to predict and of their references.

    Raises:
        UserError: if there is no case, or one without a reference.
    """
    images, labels = FOLDERS[table.cases]
    cases = dataset.cases(images)
    missing = [case for case in cases if not dataset.label_file(images, case).is_file()]
    if not cases or missing:
        rule = f"the {table.cases} cases of {dataset.name} need references"
        got = (
            f"none for {', '.join(missing[:5])}" if missing else f"no case in {images}: {table.dataset} lacks the list"
        )
        raise UserError(rule, got, None, "convert the whole data set, or name other labeled cases with --test_ids")
    return dataset.folder / images, dataset.folder / labels


def _require_kind(table: Table, dataset: RawDataset) -> None:
    """Refuse a data set of another kind than the table's: its numbers would stand beside those of other scans."""
    origin = dataset.nnssl.get("source")
    if origin == table.dataset:
        return
    about, allowed = f"converted from {origin or 'nothing known'}", f"one converted from {table.dataset}"
    if origin is None and table.published is not None:  # imported by hand: its cases say what it is
        labeled = published(table, dataset.folder).labeled
        if _holds(dataset, labeled):
            return
        about = f"with {len(_present(dataset, labeled))} of {len(labeled)} labeled cases"
        allowed += f", or one with the cases that {table.published} labels, with their labels"
    rule = f"{table.paper} {table.name} runs on the data set {table.dataset}"
    remedy = f"name another -d, or convert it: nnssl_convert {table.dataset} SRC -d ID"
    raise UserError(rule, f"{dataset.name}, {about}", allowed, remedy)


def _holds(dataset: RawDataset, ids: Sequence[str]) -> bool:
    return len(_present(dataset, ids)) == len(ids) > 0


def _present(dataset: RawDataset, ids: Sequence[str], without: Sequence[str] = ()) -> list[str]:
    """Return the ids that name a case or patient with a label in the data set, in their order."""
    known: set[str] = set()
    for folder in ("imagesTr", "imagesVal", "imagesTs"):
        for case in dataset.cases(folder):
            if dataset.label_file(folder, case).is_file():
                known |= {case, dataset.patient(case)}
    out = set(without)
    return [name for name in ids if name in known and name not in out]


def _write_ids(path: Path, ids: Sequence[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
    return str(path)


def _free_id() -> int:
    roots = [variable(name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")]
    used = {p.name[7:10] for root in roots if root.is_dir() for p in root.glob("Dataset[0-9][0-9][0-9]_*")}
    for number in IDS:
        if str(number) not in used:
            return number
    raise UserError("subsets take the ids 800 to 999", "none is free", None, "remove data sets that are not needed")


def broken_masks(folder: Path) -> list[Path]:
    """Return the masks of a folder that a kill left half written."""
    from nnssl.evaluation.masks import read_mask

    broken = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not split_ending(path.name)[1]:
            continue
        try:
            read_mask(path)
        except UserError:
            broken.append(path)
    return broken
