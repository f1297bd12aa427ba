"""Research subsets: a new raw data set with few labeled patients, the rest unlabeled (``nnssl_make_subset``).

The hidden labels are not in the new data set, neither as files nor as links.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnssl.dataset_conversion.base import Case, RawDatasetWriter, Source, write_json
from nnssl.dataset_conversion.labels import label_names, merged_names
from nnssl.dataset_conversion.published import Protocol, find_protocol
from nnssl.errors import UserError, nearest
from nnssl.layout import IMAGE_FOLDERS, RawDataset
from nnssl.plans.verify import listed, misnumbered

#: Name of the record of a selection in the new raw data set.
RECORD = "nnssl_subset.json"
#: Keys of dataset.json under which nnU-Net and the Decathlon list files: they would name the hidden labels.
_FILE_LISTS = frozenset({"dataset", "training", "test", "numTest"})


@dataclass(frozen=True)
class SubsetRequest:
    """What ``nnssl_make_subset`` is asked for. Ids are cases or patients; whole patients are taken.

    Args:
        labeled: number of labeled patients, drawn by ``seed``.
        labeled_ids: labeled ids instead of a number.
        val_ids: monitoring ids; None keeps the source's imagesVal.
        test_ids: test ids; None keeps the source's imagesTs.
        published: name of a published protocol, e.g. ``LA-4``; the other lists override its parts.
        label_map: old value -> new value.
        label_names: names of the new values 1, 2, ...
        seed: seed of the draw.
        link: symbolic links instead of copies.
    """

    labeled: int | None = None
    labeled_ids: tuple[str, ...] | None = None
    val_ids: tuple[str, ...] | None = None
    test_ids: tuple[str, ...] | None = None
    published: str | None = None
    label_map: dict[int, int] | None = None
    label_names: tuple[str, ...] | None = None
    seed: int = 0
    link: bool = False


@dataclass
class Selection:
    """Cases of a subset by role, and the source's cases that are in none."""

    labeled: list[str] = field(default_factory=list)
    unlabeled: list[str] = field(default_factory=list)
    val: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    patients: list[str] = field(default_factory=list)  # labeled ones, in the order drawn


def make_subset(
    source: RawDataset, dataset_id: int, name: str | None, request: SubsetRequest, command: str, num_processes: int = 1
) -> tuple[Path, Selection]:
    """Make a subset as a new raw data set; ``nnssl_subset.json`` in it repeats the selection.

    Args:
        source: the raw data set to draw from.
        dataset_id: id of the new one.
        name: its name; default the source's with the number of labeled patients.
        request: what to draw.
        command: the command line, for the record.
        num_processes: worker processes.

    Returns:
        folder of the new raw data set, and the selection.

    Raises:
        UserError: if ids are unknown, roles overlap, or too few labeled patients exist.
    """
    selection = choose_cases(source, request)
    content = _dataset_json(source, request, selection)
    name = name or f"{source.name[len('Dataset000_') :]}_labeled{len(selection.patients)}"
    with RawDatasetWriter(dataset_id, name, source.file_ending, request.link) as writer:
        writer.write(_cases(source, selection), request.label_map, num_processes)
        write_json(writer.temporary / RECORD, _record(source, request, selection, command))
        writer.finish(content, num_processes, check=False)
        return writer.folder, selection


def choose_cases(source: RawDataset, request: SubsetRequest) -> Selection:
    """Choose the cases of every role; see :class:`SubsetRequest`."""
    index = _Index(source)
    protocol = find_protocol(request.published, source.folder) if request.published else None
    val = _held_out(index, "imagesVal", request.val_ids, protocol.val if protocol else None)
    test = _held_out(index, "imagesTs", request.test_ids, protocol.test if protocol else None)
    val_patients, test_patients = index.patients_of(val), index.patients_of(test)
    _refuse_overlap(val_patients, test_patients, "val", "test")
    held_out = val_patients | test_patients
    pool = [case for case in index.training if index.patient[case] not in held_out]
    if protocol:
        listed_patients = set(index.resolve([*protocol.labeled, *protocol.unlabeled], missing_allowed=True))
        pool = [case for case in pool if index.patient[case] in listed_patients]
    patients = _labeled_patients(index, request, protocol, pool, val_patients, test_patients)
    labeled = [case for case in pool if index.patient[case] in patients and case in index.labeled]
    chosen = {*labeled, *val, *test}
    unlabeled = [case for case in pool if case not in chosen]
    left_out = sorted(index.patient.keys() - chosen - set(unlabeled))
    return Selection(labeled, unlabeled, val, test, left_out, list(patients))


def draw_order(patients: Iterable[str], seed: int) -> list[str]:
    """Return patients in an order fixed by ``seed``; the first n are the labeled ones.

    Each patient's place follows from a hash of the seed and its own name. So the draw of n lies inside that of n + 1,
    also when other patients are added or held out, and no library's generator can change it.
    """
    return sorted(patients, key=lambda patient: hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest())


class _Index:
    """Cases of a raw data set by folder, patient and whether a label exists."""

    def __init__(self, source: RawDataset) -> None:
        self.source = source
        self.folder: dict[str, str] = {}
        for folder in IMAGE_FOLDERS:
            for case in source.cases(folder):
                if case in self.folder:
                    got = f"{case} in {self.folder[case]} and {folder}"
                    raise UserError("a case id occurs once in a raw data set", got, None, "rename one of the two")
                self.folder[case] = folder
        self.patient = {case: source.patient(case) for case in sorted(self.folder)}
        self.labeled = {case for case in self.folder if self._has_label(case)}
        self.training = [case for case in self.patient if self.folder[case] in ("imagesTr", "imagesUn")]

    def _has_label(self, case: str) -> bool:
        folder = self.folder[case]
        return IMAGE_FOLDERS[folder] is not None and self.source.label_file(folder, case).is_file()

    def patients_of(self, cases: Iterable[str]) -> set[str]:
        return {self.patient[case] for case in cases}

    def cases_of(self, patients: Iterable[str]) -> list[str]:
        wanted = set(patients)
        return [case for case, patient in self.patient.items() if patient in wanted]

    def resolve(self, ids: Iterable[str], missing_allowed: bool = False) -> list[str]:
        """Return the patients of case or patient ids, each once, in order."""
        known = set(self.patient.values())
        found: dict[str, None] = {}
        missing = []
        for name in ids:
            patient = name if name in known else self.patient.get(name)
            if patient is None:
                missing.append(name)
            else:
                found[patient] = None
        if missing and not missing_allowed:
            hint = nearest(missing[0], known | self.patient.keys())
            raise UserError("ids name cases or patients of the source", listed(missing), hint, "mend the id file")
        if missing:
            warnings.warn(f"{len(missing)} published ids are not in the source: {listed(missing)}", stacklevel=4)
        return list(found)


def _held_out(index: _Index, folder: str, ids: tuple[str, ...] | None, published: list[str] | None) -> list[str]:
    """Return the cases of val or test: those asked for, else the protocol's, else the source's own."""
    if ids is None and published is None:
        return [case for case in index.patient if index.folder[case] == folder]
    patients = index.resolve(published or [] if ids is None else ids, missing_allowed=ids is None)
    cases = index.cases_of(patients)
    if folder == "imagesTs":
        return cases
    without = sorted(set(patients) - index.patients_of(case for case in cases if case in index.labeled))
    if without:
        raise UserError("val cases need a label in the source", f"none for {listed(without)}", None, "mend --val_ids")
    return [case for case in cases if case in index.labeled]


def _labeled_patients(
    index: _Index,
    request: SubsetRequest,
    protocol: Protocol | None,
    pool: list[str],
    val: set[str],
    test: set[str],
) -> dict[str, None]:
    """Return the labeled patients in order; the values mean nothing."""
    available = {index.patient[case] for case in pool if case in index.labeled}
    if request.labeled is not None:
        if not 1 <= request.labeled <= len(available):
            allowed = f"1 to {len(available)}, the labeled patients outside val and test"
            raise UserError("--labeled counts patients", request.labeled, allowed, "choose another number")
        return dict.fromkeys(draw_order(available, request.seed)[: request.labeled])
    if request.labeled_ids is not None:
        patients = sorted(index.resolve(request.labeled_ids))
    else:
        patients = index.resolve(protocol.labeled if protocol else [], missing_allowed=True)
    _refuse_overlap(set(patients), val, "labeled", "val")
    _refuse_overlap(set(patients), test, "labeled", "test")
    if without := [patient for patient in patients if patient not in available]:
        rule = "labeled patients need a label in the source's imagesTr"
        raise UserError(rule, listed(without), nearest(without[0], available), "mend --labeled_ids, or the source")
    if request.labeled_ids is not None:
        _say_whole_patients(index, request.labeled_ids, patients)
    if not patients:
        raise UserError("at least one labeled patient is needed", "none", None, "check --labeled_ids or --published")
    return dict.fromkeys(patients)


def _say_whole_patients(index: _Index, ids: tuple[str, ...], patients: list[str]) -> None:
    """Warn when the id file names some cases of a patient but not all: the labels of all are kept."""
    named = {*ids, *index.cases_of(set(ids) & set(patients))}
    if extra := [c for c in index.cases_of(patients) if c in index.labeled and c not in named]:
        warnings.warn(f"whole patients are labeled, so these cases are too: {listed(extra)}", stacklevel=4)


def _refuse_overlap(a: set[str], b: set[str], name_a: str, name_b: str) -> None:
    if both := sorted(a & b):
        rule = "a patient has one role"
        raise UserError(rule, f"{listed(both)} in {name_a} and {name_b}", None, "mend the id files")


def _cases(source: RawDataset, selection: Selection) -> list[Case]:
    files = {case: (folder, paths) for folder in IMAGE_FOLDERS for case, paths in source.cases(folder).items()}
    roles = {
        "imagesTr": selection.labeled,
        "imagesUn": selection.unlabeled,
        "imagesVal": selection.val,
        "imagesTs": selection.test,
    }
    cases = []
    for role, names in roles.items():
        for name in names:
            folder, paths = files[name]
            if problem := misnumbered(paths):
                remedy = "rename them in the source, or remove the case"
                raise UserError("every case has all its channel files", f"{folder}/{name}: {problem}", None, remedy)
            label = source.label_file(folder, name) if role != "imagesUn" and folder != "imagesUn" else None
            label_source = Source(label) if label is not None and label.is_file() else None
            cases.append(Case(name, tuple(Source(path) for path in paths), label_source, role))
    return cases


def _dataset_json(source: RawDataset, request: SubsetRequest, selection: Selection) -> dict[str, Any]:
    content = {key: value for key, value in source.json.items() if key not in _FILE_LISTS}
    content["nnssl"] = {k: v for k, v in source.nnssl.items() if k != "set_aside"}
    kept = {*selection.labeled, *selection.unlabeled, *selection.val, *selection.test}
    if "domains" in source.nnssl:
        domains = source.nnssl["domains"]
        content["nnssl"]["domains"] = {case: domain for case, domain in domains.items() if case in kept}
    labels = source.json["labels"]
    if request.label_map is not None:
        labels = merged_names(labels, request.label_map)
    if request.label_names is not None:
        if any(isinstance(value, (list, tuple)) for value in labels.values()):
            raise UserError("--label_names works on plain labels", "regions", None, "leave --label_names out")
        if len(request.label_names) != len(labels) - 1:
            rule = "--label_names names every class"
            raise UserError(rule, len(request.label_names), len(labels) - 1, "name the values 1, 2, ... in order")
        labels = label_names(range(len(labels)), list(request.label_names))
    content["labels"] = labels
    return content


def _record(source: RawDataset, request: SubsetRequest, selection: Selection, command: str) -> dict[str, Any]:
    record: dict[str, Any] = {"version": 1, "source": source.name, "command": command}
    if request.labeled is not None:
        record["seed"] = request.seed
    if request.published:
        record["published"] = request.published
        record["published_source"] = find_protocol(request.published, source.folder).source
    if request.label_map is not None:
        record["label_map"] = {str(old): new for old, new in request.label_map.items()}
    record["labeled_patients"] = selection.patients
    for role in ("labeled", "unlabeled", "val", "test", "left_out"):
        record[role] = getattr(selection, role)
    return record
