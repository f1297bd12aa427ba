"""Check the cases of a raw data set: what is refused, what is set aside, and the content hash of every image.

One read of a case yields everything (:func:`scan_case`), and scans can be cached by size and time of the files.
Loads no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nnssl.errors import UserError
from nnssl.imageio import Geometry, ImageReadError, read_array, split_ending
from nnssl.layout import IMAGE_FOLDERS, RawDataset
from nnssl.plans.manifest import write_json_atomically
from nnssl.plans.parallel import Workers

_CACHE_VERSION = 1
_STRICT = ("imagesTr", "imagesVal")  # folders whose cases must be sound: they are trained on or measured with


@dataclass(frozen=True)
class CaseScan:
    """What one read of a case found.

    Args:
        hash: content hash of the images; None if one is unreadable.
        channels: decoded channels of all files together.
        problem: why the images cannot be used, or None.
        label_problem: why the label cannot be used (unreadable, other grid), or None.
        label_values: (value, voxels) of the label; empty when no label was read.
    """

    hash: str | None
    channels: int
    problem: str | None
    label_problem: str | None = None
    label_values: tuple[tuple[float, int], ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping) -> CaseScan:
        """Return the scan of which ``entry`` is the dictionary, after a way through JSON."""
        return cls(**{**entry, "label_values": tuple((value, voxels) for value, voxels in entry["label_values"])})


@dataclass(frozen=True)
class Verified:
    """A raw data set that may be planned.

    Args:
        set_aside: unlabeled case or file -> why it is not used.
        hashes: image folder -> case -> content hash, without the cases set aside.
        masks: unlabeled case with a mask in ``labelsPseudo`` -> scan of both; rules: :mod:`nnssl.plans.pseudo`.
    """

    set_aside: dict[str, str]
    hashes: dict[str, dict[str, str]]
    masks: dict[str, CaseScan] = field(default_factory=dict)


class _Job(NamedTuple):
    folder: str
    case: str
    images: list[Path]
    label: Path | None


class ImageScanner:
    """Look at the channel files of a case as they come: content hash, channels, problems."""

    def __init__(self) -> None:
        self.grid: Geometry | None = None
        self._digest, self._channels = hashlib.sha256(), 0
        self._problem: str | None = None

    def add(self, name: str, array: np.ndarray, geometry: Geometry) -> None:
        """Take in one file.

        Args:
            name: how a message calls it.
            array: its voxels (c, z, y, x).
            geometry: its grid.
        """
        _update(self._digest, array, geometry)
        self._channels += len(array)
        self._problem = self._problem or _voxel_problem(name, array)
        if self.grid is not None and (difference := self.grid.difference(geometry)):
            self._problem = self._problem or f"channels differ in {difference}"
        self.grid = self.grid or geometry

    def unreadable(self, problem: str) -> CaseScan:
        """Return the scan of a case with a file that cannot be read."""
        return CaseScan(None, self._channels, problem)

    def result(
        self,
        problem: str | None = None,
        label_problem: str | None = None,
        label_values: tuple[tuple[float, int], ...] = (),
    ) -> CaseScan:
        """Return the scan; a ``problem`` found elsewhere comes before those of the voxels."""
        return CaseScan(self._digest.hexdigest(), self._channels, problem or self._problem, label_problem, label_values)


def scan_case(images: list[Path], label: Path | None) -> CaseScan:
    """Read a case once: content hash, channels, problems, and the label's values when ``label`` is given."""
    scanner = ImageScanner()
    for path in images:
        try:
            scanner.add(path.name, *read_array(path))
        except ImageReadError as error:
            return scanner.unreadable(f"{path.name}: {error}")
    problem = misnumbered(images)
    if label is None or scanner.grid is None:
        return scanner.result(problem)
    return scanner.result(problem, *_scan_label(label, scanner.grid))


def count_values(label: np.ndarray) -> dict[float, int]:
    """Return ``{value: voxels}`` of a label map; faster than a sort for small non-negative integers."""
    low, high = (float(label.min()), float(label.max())) if label.size else (0.0, 0.0)
    if low >= 0 and high < 65536 and (label.dtype.kind in "bu" or np.array_equal(label, np.floor(label))):
        counts = np.bincount(label.ravel().astype(np.int64))
        return {float(v): int(counts[v]) for v in np.flatnonzero(counts)}
    return {float(v): int(n) for v, n in zip(*np.unique(label, return_counts=True), strict=True)}


def allowed_label_values(labels: dict) -> set[int]:
    """Return every value that ``labels`` of dataset.json declares, regions (lists) and ``ignore`` included."""
    values: set[int] = set()
    for value in labels.values():
        values.update(int(v) for v in (value if isinstance(value, (list, tuple)) else [value]))
    return values


def verify_raw_dataset(
    dataset: RawDataset,
    num_processes: int = 1,
    check_integrity: bool = True,
    cache_path: Path | None = None,
    known: Mapping[str, CaseScan] | None = None,
) -> Verified:
    """Check every case of a raw data set and hash every image.

    Refused: no labeled case; a case id in both imagesTr and imagesUn; an unreadable, constant or non-finite image or a
    wrong channel count in imagesTr or imagesVal; an unlabeled image equal to one of imagesTr, imagesVal or imagesTs.
    Set aside: the same faults in imagesUn, files that are no image, and unlabeled images of a patient of imagesVal
    or imagesTs.

    Args:
        dataset: the raw data set.
        num_processes: worker processes.
        check_integrity: also read the labels of imagesTr and imagesVal and check grid and values.
        cache_path: JSON file that keeps the scans of unchanged files for the next call.
        known: ``folder/case`` -> its scan, for cases that need not be read again.

    Raises:
        UserError: on every refusal.
    """
    cases = {folder: dataset.cases(folder) for folder in IMAGE_FOLDERS}
    _refuse_layout(dataset, cases)
    pseudo = dataset.pseudo_masks() if check_integrity else {}
    jobs = [
        _Job(folder, case, images, _mask(dataset, folder, case, pseudo) if check_integrity else None)
        for folder, members in cases.items()
        for case, images in members.items()
    ]
    scans = _scan_all(jobs, num_processes, cache_path, known or {})
    allowed = allowed_label_values(dataset.json["labels"])
    expected = len(dataset.channel_names)
    for folder in _STRICT:
        for case in cases[folder]:
            _refuse_labeled(f"{folder}/{case}", scans[folder][case], allowed, expected)
    for case, scan in scans["imagesTs"].items():
        if scan.label_problem or scan.label_values:  # only ``known`` scans of test cases come with a label
            _refuse_labeled(f"imagesTs/{case}", replace(scan, problem=None), allowed, None)
    set_aside = _set_aside(dataset, cases, scans, expected)
    unusable = {case for case, scan in scans["imagesUn"].items() if scan.problem}
    _refuse_duplicates(_hashes(scans, unusable))  # also a copy that its patient's role would set aside
    _warn_shared_patients(dataset, cases)
    if check_integrity:
        _warn_absent_classes(dataset, scans["imagesTr"])
    masks = {case: scan for case, scan in scans["imagesUn"].items() if case in pseudo}
    return Verified(set_aside, _hashes(scans, set_aside.keys()), masks)


def _mask(dataset: RawDataset, folder: str, case: str, pseudo: dict[str, Path]) -> Path | None:
    """Return the label or mask that is read beside a case's images."""
    if folder == "imagesUn":
        return pseudo.get(case)
    return dataset.label_file(folder, case) if folder in _STRICT else None


def _refuse_layout(dataset: RawDataset, cases: dict[str, dict[str, list[Path]]]) -> None:
    if not cases["imagesTr"]:
        rule, allowed = "at least one labeled case is needed", f"CASE_0000{dataset.file_ending}"
        remedy = "add labeled images and their labels (nnssl_import --labeled, --labels)"
        raise UserError(rule, f"none in {dataset.folder / 'imagesTr'}", allowed, remedy)
    if both := sorted(cases["imagesTr"].keys() & cases["imagesUn"].keys()):
        rule = "a case is either labeled or unlabeled"
        raise UserError(rule, f"in imagesTr and imagesUn: {listed(both)}", None, "rename or remove one of the two")
    for folder in _STRICT:
        if missing := [case for case in cases[folder] if not dataset.label_file(folder, case).is_file()]:
            remedy = "add the labels, or move the images to imagesUn"
            raise UserError(f"every image of {folder} needs a label", f"none for {listed(missing)}", None, remedy)
        if strays := [p.name for p in dataset.stray_files(folder)]:
            warnings.warn(f"files in {folder} that are no image of a case are ignored: {listed(strays)}", stacklevel=3)


def _refuse_labeled(name: str, scan: CaseScan, allowed: set[int], expected_channels: int | None) -> None:
    """Raise for a case that is trained on or measured with; ``name`` is how the message calls it."""
    if scan.problem:
        rule = "a labeled image must be readable, finite and not constant"
        raise UserError(rule, f"{name}: {scan.problem}", None, "repair the image, or remove it and its label")
    if expected_channels is not None and scan.channels != expected_channels:
        rule = "every labeled image has the channels that dataset.json names"
        raise UserError(
            rule, f"{name}: {scan.channels}", expected_channels, "add the missing files or mend channel_names"
        )
    if scan.label_problem:
        rule = "image and label must share one grid"
        raise UserError(
            rule, f"{name}: {scan.label_problem}", None, "resample the label to its image, or remove the case"
        )
    wrong = {f"{value:g}": voxels for value, voxels in scan.label_values if value not in allowed}
    if wrong:
        got = f"{name}: " + ", ".join(f"value {v} in {n} voxels" for v, n in wrong.items())
        remedy = "mend the label, declare the value in dataset.json, or map it (--label_map)"
        raise UserError("a label holds only the values of dataset.json", got, sorted(allowed), remedy)


def _unlabeled_reason(scan: CaseScan, expected_channels: int) -> str | None:
    if scan.problem:
        return scan.problem
    if scan.channels != expected_channels:
        return f"has {scan.channels} channels instead of {expected_channels}"
    return None


def _set_aside(
    dataset: RawDataset, cases: dict[str, dict], scans: dict[str, dict[str, CaseScan]], expected: int
) -> dict[str, str]:
    """Name the unlabeled cases and files that cannot be used, and warn of unreadable test images."""
    kept_out = dataset.nnssl.get("set_aside", {})  # by nnssl_import; a case that came back is judged anew
    aside = {name: reason for name, reason in kept_out.items() if name not in cases["imagesUn"]}
    for path in dataset.stray_files("imagesUn"):
        aside[path.name] = f"is no image named CASE_0000{dataset.file_ending}"
    held_out = {dataset.patient(case): folder for folder in ("imagesVal", "imagesTs") for case in cases[folder]}
    for case, scan in scans["imagesUn"].items():
        reason = _unlabeled_reason(scan, expected)
        if reason is None and (folder := held_out.get(dataset.patient(case))):
            reason = f"its patient {dataset.patient(case)} is held out in {folder}"
        if reason:
            aside[case] = reason
    if bad := [f"{case} ({scan.problem})" for case, scan in scans["imagesTs"].items() if scan.problem]:
        warnings.warn(f"test images that cannot be predicted: {listed(bad)}", stacklevel=3)
    return aside


def _hashes(scans: dict[str, dict[str, CaseScan]], left_out: Collection[str]) -> dict[str, dict[str, str]]:
    """Return the hashes by folder and case, without the unlabeled cases named in ``left_out``."""
    return {
        folder: {
            case: scan.hash
            for case, scan in members.items()
            if scan.hash is not None and not (folder == "imagesUn" and case in left_out)
        }
        for folder, members in scans.items()
    }


def _refuse_duplicates(hashes: dict[str, dict[str, str]]) -> None:
    """Refuse an unlabeled image that is also labeled, val or test; warn of other pairs across or inside folders."""
    owner = {
        h: (folder, case) for folder in ("imagesTs", "imagesVal", "imagesTr") for case, h in hashes[folder].items()
    }
    for case, value in hashes["imagesUn"].items():
        if value in owner:
            folder, other = owner[value]
            got = f"imagesUn/{case} equals {folder}/{other}"
            raise UserError(
                "an unlabeled image must not also be a labeled, val or test image", got, None, f"remove {case}"
            )
    seen: dict[str, str] = {}
    for folder, members in hashes.items():
        for case, value in members.items():
            if value in seen:
                warnings.warn(f"{folder}/{case} is the same image as {seen[value]}", stacklevel=4)
            seen.setdefault(value, f"{folder}/{case}")


def _warn_shared_patients(dataset: RawDataset, cases: dict[str, dict]) -> None:
    """Warn of labeled patients who are also held out: numbers on them say nothing about new patients."""
    labeled = {dataset.patient(case) for case in cases["imagesTr"]}
    for folder in ("imagesVal", "imagesTs"):
        if shared := sorted(labeled & {dataset.patient(case) for case in cases[folder]}):
            warnings.warn(
                f"patients in imagesTr and {folder}, whose results are too good: {listed(shared)}", stacklevel=3
            )


def _warn_absent_classes(dataset: RawDataset, scans: dict[str, CaseScan]) -> None:
    present = {int(value) for scan in scans.values() for value, _ in scan.label_values}
    absent = []
    for name, value in dataset.json["labels"].items():
        values = set(value) if isinstance(value, (list, tuple)) else {value}
        if name not in ("background", "ignore") and not {int(v) for v in values} & present:
            absent.append(name)
    if absent:
        warnings.warn(f"classes of dataset.json that no labeled case shows: {', '.join(absent)}", stacklevel=3)


def _update(digest, array: np.ndarray, geometry: Geometry) -> None:
    digest.update(json.dumps(geometry.rounded()).encode())
    for part in array.reshape(-1, *array.shape[-2:]):  # a slice at a time stays in the processor's cache
        values = np.ascontiguousarray(part, dtype=np.float32)
        digest.update(values if array.dtype.kind in "bui" else values + np.float32(0))  # + 0 turns -0.0 into 0.0


def _voxel_problem(name: str, array: np.ndarray) -> str | None:
    if array.size == 0:
        return f"{name}: holds no voxel"
    bad = 0 if array.dtype.kind in "biu" else array.size - int(np.isfinite(array).sum())
    if bad:
        return f"{name}: {bad} voxels are NaN or infinite"
    if array.min() == array.max():
        return f"{name}: constant, every voxel is {array.flat[0]:g}"
    return None


def misnumbered(images: list[Path]) -> str | None:
    """Return how channel files deviate from CASE_0000, CASE_0001, ..., or None."""
    numbers = [split_ending(path.name)[0][-5:] for path in images]
    expected = [f"_{i:04d}" for i in range(len(images))]
    if all(n[:1] == "_" and n[1:].isdigit() for n in numbers) and numbers != expected:
        return f"channel files are numbered {', '.join(numbers)} instead of {', '.join(expected)}"
    return None


def _scan_label(label: Path, grid: Geometry) -> tuple[str | None, tuple[tuple[float, int], ...]]:
    try:
        array, geometry = read_array(label)
    except ImageReadError as error:
        return f"label {label.name}: {error}", ()
    if len(array) != 1:
        return f"label {label.name}: {len(array)} channels instead of 1", ()
    difference = grid.difference(geometry)
    return (f"{difference} (image, label)" if difference else None), tuple(count_values(array).items())


def _scan_all(
    jobs: list[_Job], num_processes: int, cache_path: Path | None, given: Mapping[str, CaseScan]
) -> dict[str, dict[str, CaseScan]]:
    """Scan the cases whose files have changed since the cache was written, and return all scans by folder.

    What was scanned is kept also when the rest fails or is interrupted: an archive takes hours.
    """
    known = _load_cache(cache_path)
    entries, todo = {}, {}
    for job in jobs:
        key = f"{job.folder}/{job.case}"
        if key in given:
            continue
        stamp = _stamp(job)
        if known.get(key, {}).get("stamp") == stamp:
            entries[key] = known[key]
        else:
            todo[key] = (job, stamp)
    try:
        with Workers(num_processes) as workers:
            files = {key: (job.images, job.label) for key, (job, _) in todo.items()}
            for key, scan, error in workers.run("checking images", scan_case, files):
                if error is not None:
                    raise error
                entries[key] = {"stamp": todo[key][1], "scan": asdict(scan)}
    finally:
        if cache_path is not None:
            write_json_atomically(cache_path, {"version": _CACHE_VERSION, "scans": dict(sorted(entries.items()))})
    scans: dict[str, dict[str, CaseScan]] = {folder: {} for folder in IMAGE_FOLDERS}
    for job in jobs:
        key = f"{job.folder}/{job.case}"
        scans[job.folder][job.case] = given[key] if key in given else CaseScan.from_json(entries[key]["scan"])
    return scans


def _stamp(job: _Job) -> list[list]:
    """Return name, size and time of every file a scan depends on; a scan without a label is not one with it."""
    files = [*job.images, *([job.label] if job.label else [])]
    return [[path.name, stat.st_size, stat.st_mtime_ns] for path in files for stat in [_stat(path)]]


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError:  # a dangling link: the scan itself reports it
        return path.lstat()


def _load_cache(path: Path | None) -> dict[str, dict]:
    """Return the stored scans; an unreadable or older cache counts as empty, since it only saves time."""
    if path is None or not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return stored.get("scans", {}) if stored.get("version") == _CACHE_VERSION else {}


def listed(names: Iterable[object], limit: int = 10) -> str:
    """Join names for a message: all of them up to ``limit``, then how many more there are."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more
