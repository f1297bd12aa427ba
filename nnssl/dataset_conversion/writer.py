"""Write a new raw data set: what importing, converting and subsetting share."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from nnssl.dataset_conversion.base import Case, Source
from nnssl.dataset_conversion.journal import NAME as JOURNAL_NAME
from nnssl.dataset_conversion.journal import Journal
from nnssl.dataset_conversion.labels import map_values, whole_values
from nnssl.errors import UserError
from nnssl.imageio import (
    Geometry,
    ImageReadError,
    read_array,
    read_grid,
    share_grid,
    split_ending,
    view,
    write_image,
    write_label,
)
from nnssl.layout import IMAGE_FOLDERS, RawDataset, variable
from nnssl.plans.domains import DOMAIN_KEYS, Domains
from nnssl.plans.parallel import InterruptionError, Workers
from nnssl.plans.verify import CaseScan, ImageScanner, Verified, listed, verify_raw_dataset

_DAY = 86400.0


@dataclass(frozen=True)
class Written:
    """What writing a case found.

    Args:
        left_out: why it had to be left out (unlabeled cases only), or None.
        label_values: value -> voxels of its label.
        note: what was mended on the way, or None.
        files: the files written, images first.
        scan: the check of these files, if it was asked for.
    """

    left_out: str | None = None
    label_values: dict[int, int] = field(default_factory=dict)
    note: str | None = None
    files: tuple[Path, ...] = ()
    scan: CaseScan | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the record that a journal keeps; the files are the journal's own."""
        record = {"left_out": self.left_out, "label_values": self.label_values, "note": self.note}
        return {**record, "scan": vars(self.scan) if self.scan else None}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Written:
        """Return what :meth:`to_json` recorded."""
        values = {int(value): voxels for value, voxels in entry["label_values"].items()}
        scan = CaseScan.from_json(entry["scan"]) if entry["scan"] else None
        return cls(entry["left_out"], values, entry["note"], (), scan)


class _Task(NamedTuple):
    root: Path
    file_ending: str
    link: bool
    label_map: dict[int, int] | None
    scan: bool = False
    share_voxels: bool = False


class RawDatasetWriter:
    """Write a new raw data set: all of it or nothing.

    Everything goes to a hidden sibling folder, which :meth:`finish` renames and an error removes. With ``request`` the
    folder outlives a kill, an interrupt, a full disk, and a fault of the data that comes after finished cases; the next
    writer with an equal request goes on from these. A case is finished as long as its sources stay as they were.

    Args:
        dataset_id: 1 to 999, not in use.
        name: data set name without ``DatasetXXX_``.
        file_ending: ``.nii.gz`` or ``.png``.
        link: make symbolic links to files that need no conversion instead of copies.
        request: all that decides what is written, as JSON.
    """

    def __init__(
        self,
        dataset_id: int,
        name: str,
        file_ending: str = ".nii.gz",
        link: bool = False,
        request: dict[str, Any] | None = None,
    ) -> None:
        self.folder = new_dataset_folder(dataset_id, name)
        self.file_ending, self.link = file_ending, link
        self._request = request
        self._temporary: Path | None = None
        self._journal: Journal | None = None
        self._scans: dict[str, CaseScan] = {}
        self._claim: int | None = None

    def __enter__(self) -> RawDatasetWriter:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            if self._request is None:
                _remove_abandoned(self.folder)
                made = tempfile.mkdtemp(prefix=f".{self.folder.name}.", dir=self.folder.parent)
                self._claim = _claim(Path(made))
            else:
                made = str(self.folder.with_name(f".{self.folder.name}.unfinished"))
                Path(made).mkdir(exist_ok=True)
        except OSError as error:
            remedy = "name a folder you may write to in nnUNet_raw"
            raise UserError("nnUNet_raw must be writable", error, None, remedy) from error
        if self._request is not None:
            self._journal = Journal(Path(made), self._request)
            self._journal.__enter__()
        self._temporary = Path(made)
        umask = os.umask(0)
        os.umask(umask)
        self._temporary.chmod(0o777 & ~umask)  # mkdtemp's own mode would lock out the user's group
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        no_fault = isinstance(error, (OSError, InterruptionError)) or not isinstance(error, (Exception, type(None)))
        kept = self._journal is not None and (no_fault or len(self._journal) > 0)
        if self._temporary is not None and not kept:  # before another run can take the folder over
            shutil.rmtree(self._temporary, ignore_errors=True)
        if self._journal is not None:
            self._journal.__exit__(kind, error, trace)
        if self._claim is not None:
            os.close(self._claim)
        if self._temporary is not None and kept and isinstance(error, UserError) and not no_fault:
            text = f"{len(self._journal or ())} finished cases are kept in {self._temporary}"
            print(f"{text}: mend the fault and run the same command, or remove that folder", file=sys.stderr)
        if isinstance(error, OSError):
            remedy = "make room or mend rights" + (", then run the same command: it goes on" if kept else "")
            raise UserError("the raw data set must be written in full", error, None, remedy) from error

    @property
    def temporary(self) -> Path:
        """The folder under construction; valid inside the ``with`` block."""
        if self._temporary is None:
            raise RuntimeError("use the writer in a with statement")
        return self._temporary

    def write(
        self,
        cases: Iterable[Case],
        label_map: dict[int, int] | None = None,
        num_processes: int = 1,
        scan: bool = False,
        share_voxels: bool = False,
    ) -> dict[str, Written]:
        """Write cases; return by ``folder/case`` what was found.

        Args:
            cases: what to write.
            label_map: old value -> new value of the labels.
            num_processes: worker processes.
            scan: check every case right after it is written; :meth:`finish` then need not read it again.
            share_voxels: a label whose size and spacing are its image's takes over the rest of the image's grid; see
            :func:`nnssl.imageio.share_grid`.

        Raises:
            UserError: if an image or label outside imagesUn cannot be read, or a label value is not in ``label_map``.
        """
        task = _Task(self.temporary, self.file_ending, self.link, label_map, scan, share_voxels)
        jobs = {f"{case.folder}/{case.name}": (case, task) for case in cases}
        found = self._finished_before({key: case for key, (case, _) in jobs.items()})
        for folder in {case.folder for case, _ in jobs.values()}:
            (self.temporary / folder).mkdir(exist_ok=True)
        for labels in {IMAGE_FOLDERS[case.folder] for case, _ in jobs.values() if case.label}:
            (self.temporary / str(labels)).mkdir(exist_ok=True)
        failed: Exception | None = None
        with Workers(num_processes) as workers:
            todo = {key: job for key, job in jobs.items() if key not in found}
            for key, written, error in workers.run("writing cases", write_case, todo):
                failed = failed or error
                if error is not None:
                    break  # and let the cases in work finish
                if self._journal is not None:
                    self._journal.add(key, jobs[key][0].sources(), written.files, written.to_json())
                found[key] = written
        if failed is not None:
            raise failed
        self._scans = {key: written.scan for key, written in found.items() if written.scan is not None}
        return found

    def _finished_before(self, cases: dict[str, Case]) -> dict[str, Written]:
        """Return the cases that an interrupted run has finished, and remove what it left of others."""
        if self._journal is None:
            return {}
        found, kept = {}, set()
        for key, case in cases.items():
            if entry := self._journal.finished(key, case.sources()):
                found[key] = Written.from_json(entry["record"])
                kept |= {self.temporary / name for name in entry["targets"]}
        for path in self.temporary.glob("*/*"):
            if path not in kept:
                path.unlink()
        if found:
            print(f"{len(found)} of {len(cases)} cases were finished by an interrupted run", file=sys.stderr)
        return found

    def finish(self, dataset_json: dict[str, Any], num_processes: int = 1, check: bool = True) -> dict[str, str]:
        """Write dataset.json, check the data set, drop unusable unlabeled cases, give the folder its name.

        ``numTraining``, ``file_ending`` and ``name`` are filled in here.

        Returns:
            unlabeled case or file -> why it was left out; also kept as ``nnssl.set_aside`` in dataset.json.
        """
        dataset = RawDataset(self.temporary, {**dataset_json, "file_ending": self.file_ending})
        settings = dataset.json.setdefault("nnssl", {})
        dataset.json["name"] = self.folder.name
        dataset.json["numTraining"] = len(dataset.cases("imagesTr"))
        check_patients_and_domains(dataset)
        verified = Verified({}, {})
        if check:
            verified = verify_raw_dataset(dataset, num_processes, check_integrity=True, known=self._scans)
        unlabeled = dataset.cases("imagesUn")
        for case in verified.set_aside.keys() & unlabeled.keys():
            for path in unlabeled[case]:
                path.unlink()
        remaining = {case for folder in IMAGE_FOLDERS for case in dataset.cases(folder)}
        domains = Domains.from_json({"nnssl": {key: settings.pop(key, {}) for key in DOMAIN_KEYS}})
        settings.update(domains.restricted_to(remaining).to_json())
        if verified.set_aside:
            settings["set_aside"] = dict(sorted(verified.set_aside.items()))
        write_json(self.temporary / "dataset.json", dataset.json)
        if self.folder.exists():
            raise _taken(self.folder)
        self.temporary.rename(self.folder)
        self._temporary = None
        (self.folder / JOURNAL_NAME).unlink(missing_ok=True)  # last: a folder without its name and journal is lost
        return verified.set_aside


def write_case(case: Case, task: _Task) -> Written:
    """Copy, link or convert the files of one case; see :class:`RawDatasetWriter`."""
    scanner = ImageScanner() if task.scan else None
    images: list[Path] = []
    source = case.images[0]
    try:
        for source in case.images:
            for target, array, grid in _write_image(source, task.root / case.folder / case.name, len(images), task):
                images.append(target)
                if scanner is not None and grid is not None:
                    scanner.add(target.name, array, grid)
    except ImageReadError as error:
        for path in (task.root / case.folder).glob(f"{glob.escape(case.name)}_[0-9][0-9][0-9][0-9]{task.file_ending}"):
            path.unlink()
        if case.folder == "imagesUn":
            return Written(f"{source.path.name}: {error}")
        remedy = "repair or remove it, and its label"
        raise UserError(
            "every labeled and test image must be readable and finite", f"{source.path}: {error}", None, remedy
        ) from error
    if case.label is None:
        return Written(None, files=tuple(images), scan=scanner.result() if scanner else None)
    target = task.root / str(IMAGE_FOLDERS[case.folder]) / f"{case.name}{task.file_ending}"
    try:
        counts, grid, note = _write_label(case.label, target, images[0], task)
    except ImageReadError as error:
        remedy = "repair it, or remove it and its image"
        raise UserError("every label must be readable", f"{case.label.path}: {error}", None, remedy) from error
    scan = None
    if scanner is not None:
        difference = scanner.grid.difference(grid) if scanner.grid else None
        values = tuple((float(value), voxels) for value, voxels in counts.items())
        scan = scanner.result(None, f"{difference} (image, label)" if difference else None, values)
    return Written(None, counts, note, (*images, target), scan)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def new_dataset_folder(dataset_id: int, name: str) -> Path:
    """Return the folder of a new raw data set.

    Raises:
        UserError: if id or name is out of range, or the id is in use in any of nnU-Net's three folders.
    """
    if not 1 <= dataset_id <= 999:
        raise UserError("a data set id is a number", dataset_id, "1 to 999", "choose another -d")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or re.match(r"Dataset\d{3}_", name):
        allowed = "letters, digits, _ and -, without DatasetXXX_"
        raise UserError("a data set name has no blanks and no prefix", repr(name), allowed, "choose another -n")
    folder = variable("nnUNet_raw") / f"Dataset{dataset_id:03d}_{name}"
    if taken := sorted(folder.parent.glob(f"Dataset{dataset_id:03d}_*")):
        (taken[0] / JOURNAL_NAME).unlink(missing_ok=True)  # of a run that was killed when the data set was whole
        raise _taken(taken[0])
    for other in ("nnUNet_preprocessed", "nnUNet_results"):  # nnU-Net looks an id up in all three
        root = os.environ.get(other)
        clash = (
            [p for p in sorted(Path(root).glob(f"Dataset{dataset_id:03d}_*")) if p.name != folder.name] if root else []
        )
        if clash:
            raise _taken(clash[0])
    return folder


def _claim(folder: Path) -> int | None:
    """Lock a folder; return the descriptor that holds it until it is closed or the process ends, None if none can."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process holds it, the file system locks no folders, or another user's may not be opened
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned(folder: Path) -> None:
    """Remove what runs that were killed have left of a data set: their folders that no process holds any more."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        if not re.fullmatch(r"[a-z0-9_]{8}", path.name.removeprefix(f".{folder.name}.")):  # as mkdtemp names them
            continue
        try:
            age = time.time() - path.stat().st_mtime
        except OSError:  # gone meanwhile
            continue
        if age < _DAY or (claim := _claim(path)) is None:
            continue  # a new one may not be locked yet, or its lock may not be seen from another machine
        shutil.rmtree(path, ignore_errors=True)
        os.close(claim)


def check_patients_and_domains(dataset: RawDataset) -> None:
    """Refuse a patient pattern that misses a case, domains of cases that do not exist, and cases without a domain.

    Raises:
        UserError: naming the pattern, or the cases.
    """
    known = {case for folder in IMAGE_FOLDERS for case in dataset.cases(folder)}
    for case in sorted(known):
        dataset.patient(case)
    check_domains(Domains.from_json(dataset.json), known)


def check_domains(domains: Domains, cases: Collection[str], absent: Collection[str] = ()) -> None:
    """Refuse domains of cases that do not exist, and cases without one where others have one.

    Args:
        domains: as given.
        cases: the cases of the data set.
        absent: cases that were left out of it; they may have a domain.

    Raises:
        UserError: naming the cases.
    """
    if unknown := sorted(domains.of_case.keys() - set(cases) - set(absent)):
        raise UserError("domains are given for cases of the data set", listed(unknown), None, "mend the case ids")
    domains.require_all(cases)


def summary_line(folder: Path) -> str:
    """Return the counts of a raw data set as one line."""
    dataset = RawDataset.load(folder)
    names = {"imagesTr": "labeled", "imagesUn": "unlabeled", "imagesVal": "val", "imagesTs": "test"}
    counts = ", ".join(f"{len(dataset.cases(key))} {name}" for key, name in names.items())
    return f"{folder.name}: {counts} cases in {folder}"


def _taken(folder: Path) -> UserError:
    return UserError("a data set id is used once", f"{folder} exists", None, "choose another id, or remove that folder")


def _write_image(
    source: Source, stem: Path, first: int, task: _Task
) -> Iterator[tuple[Path, np.ndarray, Geometry | None]]:
    """Write the channels of one source as ``stem_FIRST``, ...; yield each file with its voxels and grid.

    Voxels and grid are those in memory, or read from the file if that was copied; empty if nobody asks for a scan.
    """
    target = stem.with_name(f"{stem.name}_{first:04d}{task.file_ending}")
    if _place(source, target, task.file_ending, task.link):
        yield (target, *(read_array(target) if task.scan else (np.empty(0), None)))
        return
    loaded = source.load()
    for channel, image in enumerate(loaded if isinstance(loaded, list) else [loaded], start=first):
        colored = image.GetNumberOfComponentsPerPixel() > 1 and task.file_ending != ".png"  # nnU-Net reads RGB from PNG
        if colored or image.GetDimension() > 3:
            what = f"{image.GetDimension()} axes, {image.GetNumberOfComponentsPerPixel()} values a voxel"
            raise ImageReadError(f"{what}; split it into CASE_0000, CASE_0001, ... of one channel each")
        target = stem.with_name(f"{stem.name}_{channel:04d}{task.file_ending}")
        write_image(image, target)
        if task.file_ending == ".png" and task.scan:
            yield (target, *read_array(target))
        else:
            yield target, view(image), Geometry.of(image)


def _place(source: Source, target: Path, file_ending: str, link: bool) -> bool:
    """Copy or link a file that needs no conversion; return False if it needs one."""
    if source.read is not None or not source.path.name.endswith(file_ending) or source.path.is_dir():
        return False
    if not source.path.is_file():
        raise ImageReadError("file not found")
    if link:
        target.symlink_to(source.path.resolve())
    else:
        shutil.copyfile(source.path, target)
    return True


def _write_label(
    source: Source, target: Path, image_file: Path, task: _Task
) -> tuple[dict[int, int], Geometry, str | None]:
    """Write a label, mapped if a map is given; return its values and their counts, its grid, and what was mended."""
    note = None
    if source.read is None and split_ending(source.path.name)[1] == ".png":
        label, (array, grid) = None, read_array(source.path)
        if len(array) != 1:
            raise ImageReadError(f"{len(array)} colour channels; a label is a grey PNG whose values are the classes")
        array = array[0]
    else:
        label = source.load()
        if label.GetDimension() > 3 or label.GetNumberOfComponentsPerPixel() > 1:
            what = f"{label.GetDimension()} axes, {label.GetNumberOfComponentsPerPixel()} values a voxel"
            raise ImageReadError(f"{what}; a label has 2 or 3, and one")
        if task.share_voxels:
            label, note = share_grid(label, read_grid(image_file))
        array, grid = view(label)[0], Geometry.of(label)
    counts = whole_values(array)
    if task.label_map is not None:
        array, counts = map_values(array, counts, task.label_map, str(source.path))
    if task.label_map is not None or note or not _place(source, target, task.file_ending, task.link):
        write_label(array, label, target)
    return counts, grid, note
