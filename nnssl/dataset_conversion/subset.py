"""Research subsets: a new raw data set with few labeled patients, the rest unlabeled (``nnssl_make_subset``).

The hidden labels are not in the new data set, neither as files nor as links.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any, Literal

from nnssl.dataset_conversion.base import Case, Source
from nnssl.dataset_conversion.labels import label_names, merged_names
from nnssl.dataset_conversion.published import Protocol, find_protocol
from nnssl.dataset_conversion.writer import RawDatasetWriter, write_json
from nnssl.errors import UserError, nearest
from nnssl.layout import IMAGE_FOLDERS, RawDataset
from nnssl.plans.domains import DOMAIN_KEYS, Domains, channels_by_themselves
from nnssl.plans.verify import listed, misnumbered

#: Name of the record of a selection in the new raw data set.
RECORD = "nnssl_subset.json"
#: Keys of dataset.json under which nnU-Net and the Decathlon list files: they would name the hidden labels.
_FILE_LISTS = frozenset({"dataset", "training", "test", "numTest"})


@dataclass(frozen=True)
class SubsetRequest:
    """What ``nnssl_make_subset`` is asked for. Ids are cases or patients; whole patients are taken.

    Args:
        labeled: number of labeled patients, drawn by ``seed``, or all; with ``labeled_domains`` the number is spread
            over these domains as evenly as they allow.
        labeled_per_domain: labeled patients of each labeled domain, as a number or as a share of those that have
            labels there, rounded up; drawn by ``seed``, instead of ``labeled``.
        labeled_ids: labeled ids instead of a number.
        labeled_domains: domains that labels may come from; None: all.
        unseen_domains: domains whose cases leave training altogether and join the test set.
        val_ids: monitoring ids; None keeps the source's imagesVal.
        test_ids: test ids; None keeps the source's imagesTs.
        published: name of a published protocol, e.g. ``LA-4``; the other lists override its parts.
        label_map: old value -> new value.
        label_names: names of the new values 1, 2, ...
        seed: seed of the draw.
        link: symbolic links instead of copies.
    """

    labeled: int | Literal["all"] | None = None
    labeled_per_domain: int | Fraction | None = None
    labeled_ids: tuple[str, ...] | None = None
    labeled_domains: tuple[str, ...] | None = None
    unseen_domains: tuple[str, ...] = ()
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
        UserError: if ids or domains are unknown, roles overlap, or too few labeled patients exist.
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
    unseen = _unseen_cases(index, request)
    protocol = find_protocol(request.published, source.folder) if request.published else None
    if protocol:
        _say_what_is_special(protocol)
    val = _held_out(index, "imagesVal", request.val_ids, protocol.val if protocol else None)
    if request.val_ids is None:
        val = [case for case in val if case not in unseen]
    held_out_test = {*_held_out(index, "imagesTs", request.test_ids, protocol.test if protocol else None), *unseen}
    test = [case for case in index.patient if case in held_out_test]
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
    _say_watched_labels(index, request, val)
    left_out = sorted(index.patient.keys() - chosen - set(unlabeled))
    return Selection(labeled, unlabeled, val, test, left_out, list(patients))


def draw_order(patients: Iterable[str], seed: int) -> list[str]:
    """Return patients in an order fixed by ``seed``; the first n are the labeled ones.

    Each patient's place follows from a hash of the seed and its own name. So the draw of n lies inside that of n + 1,
    also when other patients are added or held out, and no library's generator can change it.
    """
    return sorted(patients, key=lambda patient: hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest())


def stratified_order(domain_of: Mapping[str, str], seed: int) -> list[str]:
    """Return patients in an order fixed by ``seed`` whose every beginning is spread evenly over the domains.

    Each domain keeps its own :func:`draw_order`; first come the first patients of all domains, then the second ones.
    So draws are nested, and with one domain they equal the plain ones.

    Args:
        domain_of: patient -> domain.
        seed: seed of the draw.
    """
    place: dict[str, int] = {}
    drawn = draw_order(domain_of, seed)
    for name in set(domain_of.values()):
        place |= {p: i for i, p in enumerate(patient for patient in drawn if domain_of[patient] == name)}
    return sorted(drawn, key=place.__getitem__)


class _Index:
    """Cases of a raw data set by folder, patient, domain and whether a label exists."""

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
        self.domains = Domains.of(source)
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

    def domain_of(self, patients: Iterable[str]) -> dict[str, str]:
        """Return the domain of each patient; only for sources in which every patient has one."""
        return {self.patient[case]: self.domains.of_case[case] for case in self.cases_of(patients)}

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


def _unseen_cases(index: _Index, request: SubsetRequest) -> set[str]:
    """Check all options about domains and return the cases of the unseen ones."""
    options = {
        "--labeled_domains": request.labeled_domains,
        "--unseen_domains": request.unseen_domains or None,
        "--labeled_per_domain": None if request.labeled_per_domain is None else (),
    }
    given = {option: names for option, names in options.items() if names is not None}
    for option, names in given.items():
        index.domains.require_known(option, names)
    if given:
        by_patient: dict[str, set[str]] = {}
        for case, patient in index.patient.items():
            by_patient.setdefault(patient, set()).add(index.domains.of_case[case])
        if several := [f"{p} ({', '.join(sorted(d))})" for p, d in by_patient.items() if len(d) > 1]:
            rule = f"with {' and '.join(given)} every patient belongs to one domain"
            raise UserError(rule, listed(several), None, "remove the cases of one domain, or mend patient_pattern")
    if both := sorted(set(request.labeled_domains or ()) & set(request.unseen_domains)):
        rule = "a domain is labeled or unseen"
        raise UserError(rule, f"both for {listed(both)}", None, "name it in one of the two options")
    return {case for case in index.patient if index.domains.of_case.get(case) in request.unseen_domains}


def _say_watched_labels(index: _Index, request: SubsetRequest, val: list[str]) -> None:
    """Warn when imagesVal shows labels of domains that are otherwise unlabeled."""
    if request.labeled_domains is None:
        return
    if others := sorted({index.domains.of_case[case] for case in val} - set(request.labeled_domains)):
        text = f"imagesVal holds labeled cases of {', '.join(others)}: they are watched; choose no setting by them"
        warnings.warn(text, stacklevel=4)


def _say_what_is_special(protocol: Protocol) -> None:
    if protocol.ours:
        warnings.warn(f"the lists of {protocol.name} are nnssl's own, since none were published", stacklevel=4)
    if protocol.withdrawn:
        text = f"{protocol.name} leaves out what was withdrawn since its publication: {listed(protocol.withdrawn)}"
        warnings.warn(text, stacklevel=4)


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
    allowed_cases = {case for case in pool if _may_be_labeled(index, request, case)}
    available = {index.patient[case] for case in allowed_cases if case in index.labeled}
    if request.labeled is not None:
        number = len(available) if request.labeled == "all" else request.labeled
        if not 1 <= number <= len(available):
            where = f" in {', '.join(request.labeled_domains)}" if request.labeled_domains else ""
            allowed = f"1 to {len(available)}, the labeled patients outside val and test{where}"
            raise UserError("--labeled counts patients", request.labeled, allowed, "choose another number")
        spread = stratified_order(index.domain_of(available), request.seed) if request.labeled_domains else None
        return dict.fromkeys((spread or draw_order(available, request.seed))[:number])
    if request.labeled_per_domain is not None:
        return _labeled_per_domain(index, request, available)
    if request.labeled_ids is not None:
        patients = sorted(index.resolve(request.labeled_ids))
    else:
        patients = index.resolve(protocol.labeled if protocol else [], missing_allowed=True)
    _refuse_overlap(set(patients), val, "labeled", "val")
    _refuse_overlap(set(patients), test, "labeled", "test")
    if elsewhere := index.patients_of(c for c in index.cases_of(patients) if not _may_be_labeled(index, request, c)):
        rule = f"labels come from --labeled_domains {' '.join(request.labeled_domains or ())}"
        got = f"patients of other domains: {listed(sorted(elsewhere))}"
        raise UserError(rule, got, None, "mend the ids or the domains")
    if without := [patient for patient in patients if patient not in available]:
        rule = "labeled patients need a label in the source's imagesTr"
        raise UserError(rule, listed(without), nearest(without[0], available), "mend --labeled_ids, or the source")
    if request.labeled_ids is not None:
        _say_whole_patients(index, request.labeled_ids, patients)
    if not patients:
        raise UserError("at least one labeled patient is needed", "none", None, "check --labeled_ids or --published")
    return dict.fromkeys(patients)


def _may_be_labeled(index: _Index, request: SubsetRequest, case: str) -> bool:
    return request.labeled_domains is None or index.domains.of_case[case] in request.labeled_domains


def _labeled_per_domain(index: _Index, request: SubsetRequest, available: set[str]) -> dict[str, None]:
    """Return the first N patients of each labeled domain's own draw."""
    wanted, home = request.labeled_per_domain, index.domain_of(available)
    names = request.labeled_domains or [name for name in index.domains.names if name not in request.unseen_domains]
    drawn: list[str] = []
    for name in names:
        members = [patient for patient, domain in home.items() if domain == name]
        number = ceil(wanted * len(members)) if isinstance(wanted, Fraction) else wanted
        if not number or not 1 <= number <= len(members):
            allowed = f"1 to {len(members)} in {name}, the labeled patients outside val and test"
            rule = "--labeled_per_domain counts patients of every labeled domain"
            raise UserError(rule, number, allowed, "choose another number, or name the domains with --labeled_domains")
        drawn += draw_order(members, request.seed)[:number]
    return dict.fromkeys(drawn)


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
    domains = Domains.from_json(source.json).restricted_to(kept)
    content["nnssl"] = {k: v for k, v in content["nnssl"].items() if k not in DOMAIN_KEYS} | domains.to_json()
    for key in ("channel_names", "modality"):
        if key in content:
            content[key], note = channels_by_themselves(content[key], domains)
            if note:
                warnings.warn(note, stacklevel=3)
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
    if request.labeled is not None or request.labeled_per_domain is not None:
        record["seed"] = request.seed
    if request.labeled_domains is not None:
        record["labeled_domains"] = list(request.labeled_domains)
    if request.unseen_domains:
        record["unseen_domains"] = list(request.unseen_domains)
    if request.published:
        record["published"] = request.published
        protocol = find_protocol(request.published, source.folder)
        record["published_source"] = protocol.source
        record |= {"ours": True} if protocol.ours else {}
        record |= {"withdrawn": list(protocol.withdrawn)} if protocol.withdrawn else {}
    if request.label_map is not None:
        record["label_map"] = {str(old): new for old, new in request.label_map.items()}
    record["labeled_patients"] = selection.patients
    for role in ("labeled", "unlabeled", "val", "test", "left_out"):
        record[role] = getattr(selection, role)
    return record
