"""What importing, converting and subsetting share: cases, the writer of a new raw data set, the form of a converter.

A converter is one short file: a subclass of :class:`Converter` that recognizes a download and lists its cases.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NamedTuple

import numpy as np

from nnssl.dataset_conversion.labels import map_values, whole_values
from nnssl.errors import UserError
from nnssl.imageio import ImageReadError, read_array, read_image, split_ending, write_image, write_label
from nnssl.layout import IMAGE_FOLDERS, RawDataset, variable
from nnssl.plans.domains import DOMAIN_KEYS, Domains
from nnssl.plans.parallel import Workers
from nnssl.plans.verify import Verified, listed, verify_raw_dataset


@dataclass(frozen=True)
class Source:
    """One image or label as found.

    Args:
        path: file, or folder of one DICOM series.
        read: function of a module (or ``functools.partial`` of one) that turns ``path`` into a SimpleITK image and
            raises ImageReadError if it cannot. None: the path is read, or copied, as it is.
    """

    path: Path
    read: Callable[[Path], Any] | None = None


@dataclass(frozen=True)
class Case:
    """A case to be written.

    Args:
        name: case id.
        images: one source a channel file.
        label: its label, or None.
        folder: image folder it goes to, a key of :data:`nnssl.layout.IMAGE_FOLDERS`.
    """

    name: str
    images: tuple[Source, ...]
    label: Source | None = None
    folder: str = "imagesTr"


class Written(NamedTuple):
    """What writing a case found: why it had to be left out (unlabeled cases only), and the values of its label."""

    left_out: str | None
    label_values: dict[int, int]


class _Task(NamedTuple):
    root: Path
    file_ending: str
    link: bool
    label_map: dict[int, int] | None


class RawDatasetWriter:
    """Write a new raw data set: all of it or nothing.

    Everything goes to a hidden sibling folder, which :meth:`finish` renames and an error removes.

    Args:
        dataset_id: 1 to 999, not in use.
        name: data set name without ``DatasetXXX_``.
        file_ending: ``.nii.gz`` or ``.png``.
        link: make symbolic links to files that need no conversion instead of copies.
    """

    def __init__(self, dataset_id: int, name: str, file_ending: str = ".nii.gz", link: bool = False) -> None:
        self.folder = new_dataset_folder(dataset_id, name)
        self.file_ending, self.link = file_ending, link
        self._temporary: Path | None = None

    def __enter__(self) -> RawDatasetWriter:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            made = tempfile.mkdtemp(prefix=f".{self.folder.name}.", dir=self.folder.parent)
        except OSError as error:
            remedy = "name a folder you may write to in nnUNet_raw"
            raise UserError("nnUNet_raw must be writable", error, None, remedy) from error
        self._temporary = Path(made)
        umask = os.umask(0)
        os.umask(umask)
        self._temporary.chmod(0o777 & ~umask)  # mkdtemp's own mode would lock out the user's group
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(
                "the raw data set must be written in full", error, None, "make room or mend rights"
            ) from error

    @property
    def temporary(self) -> Path:
        """The folder under construction; valid inside the ``with`` block."""
        if self._temporary is None:
            raise RuntimeError("use the writer in a with statement")
        return self._temporary

    def write(
        self, cases: Iterable[Case], label_map: dict[int, int] | None = None, num_processes: int = 1
    ) -> dict[str, Written]:
        """Write cases; return by ``folder/case`` what was found.

        Raises:
            UserError: if an image or label outside imagesUn cannot be read, or a label value is not in ``label_map``.
        """
        task = _Task(self.temporary, self.file_ending, self.link, label_map)
        jobs = {f"{case.folder}/{case.name}": (case, task) for case in cases}
        for folder in {case.folder for case, _ in jobs.values()}:
            (self.temporary / folder).mkdir(exist_ok=True)
        for labels in {IMAGE_FOLDERS[case.folder] for case, _ in jobs.values() if case.label}:
            (self.temporary / str(labels)).mkdir(exist_ok=True)
        found: dict[str, Written] = {}
        failed: Exception | None = None
        with Workers(num_processes) as workers:
            for key, written, failed in workers.run("writing cases", write_case, jobs):
                if failed is not None:
                    break  # and let the cases in work finish: the folder is removed next
                found[key] = written
        if failed is not None:
            raise failed
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
        verified = verify_raw_dataset(dataset, num_processes, check_integrity=True) if check else Verified({}, {})
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
        return verified.set_aside


def write_case(case: Case, task: _Task) -> Written:
    """Copy, link or convert the files of one case; see :class:`RawDatasetWriter`."""
    written: list[Path] = []
    try:
        for channel, source in enumerate(case.images):
            target = task.root / case.folder / f"{case.name}_{channel:04d}{task.file_ending}"
            written.append(target)
            _write_image(source, target, task)
    except ImageReadError as error:
        for path in written:
            path.unlink(missing_ok=True)
        if case.folder == "imagesUn":
            return Written(f"{case.images[len(written) - 1].path.name}: {error}", {})
        remedy = "repair or remove it, and its label"
        raise UserError(
            "every labeled and test image must be readable and finite", f"{source.path}: {error}", None, remedy
        ) from error
    if case.label is None:
        return Written(None, {})
    target = task.root / str(IMAGE_FOLDERS[case.folder]) / f"{case.name}{task.file_ending}"
    try:
        return Written(None, _write_label(case.label, target, task))
    except ImageReadError as error:
        remedy = "repair it, or remove it and its image"
        raise UserError("every label must be readable", f"{case.label.path}: {error}", None, remedy) from error


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
        raise _taken(taken[0])
    for other in ("nnUNet_preprocessed", "nnUNet_results"):  # nnU-Net looks an id up in all three
        root = os.environ.get(other)
        clash = (
            [p for p in sorted(Path(root).glob(f"Dataset{dataset_id:03d}_*")) if p.name != folder.name] if root else []
        )
        if clash:
            raise _taken(clash[0])
    return folder


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


def below_test_folder(source: Path, folder: Path) -> bool:
    """Whether a case's folder lies in ``testing`` or the like; a download may have a name such as ``test_LA``."""
    name = folder.parent.name.lower()
    return name in ("test", "testing", "testing set") if folder.parent == source else name.startswith("test")


def _taken(folder: Path) -> UserError:
    return UserError("a data set id is used once", f"{folder} exists", None, "choose another id, or remove that folder")


def _write_image(source: Source, target: Path, task: _Task) -> None:
    if _place(source, target, task.file_ending, task.link):
        return
    image = source.read(source.path) if source.read else read_image(source.path)
    colored = image.GetNumberOfComponentsPerPixel() > 1 and task.file_ending != ".png"  # nnU-Net reads RGB from PNG
    if colored or image.GetDimension() > 3:
        what = f"{image.GetDimension()} axes, {image.GetNumberOfComponentsPerPixel()} values a voxel"
        raise ImageReadError(f"{what}; split it into CASE_0000, CASE_0001, ... of one channel each")
    write_image(image, target)


def _place(source: Source, target: Path, file_ending: str, link: bool) -> bool:
    """Copy or link a file that needs no conversion; return False if it needs one."""
    if source.read is not None or not source.path.name.endswith(file_ending) or source.path.is_dir():
        return False
    if link:
        target.symlink_to(source.path.resolve())
    else:
        shutil.copyfile(source.path, target)
    return True


def _write_label(source: Source, target: Path, task: _Task) -> dict[int, int]:
    """Write a label, mapped if a map is given; return its values and their counts."""
    if source.read is None and split_ending(source.path.name)[1] == ".png":
        image, array = None, read_array(source.path)[0]
        if len(array) != 1:
            raise ImageReadError(f"{len(array)} colour channels; a label is a grey PNG whose values are the classes")
        array = array[0]
    else:
        import SimpleITK as sitk

        image = source.read(source.path) if source.read else read_image(source.path)
        array = sitk.GetArrayFromImage(image)
    counts = whole_values(array)
    if task.label_map is None:
        if not _place(source, target, task.file_ending, task.link):
            write_label(_with_z(array), image, target)
        return counts
    array, counts = map_values(array, counts, task.label_map, str(source.path))
    write_label(_with_z(array), image, target)
    return counts


def _with_z(array: np.ndarray) -> np.ndarray:
    return array[None] if array.ndim == 2 else array


class Converter(ABC):
    """A public data set as downloaded: recognizes its layouts and lists its cases.

    A subclass sets the class attributes and implements :meth:`detect` and :meth:`cases`; nothing else is needed.
    """

    NAME: ClassVar[str]  # what the user types
    TITLE: ClassVar[str]
    LICENCE: ClassVar[str]
    SOURCE_URL: ClassVar[str]
    LAYOUTS: ClassVar[dict[str, str]]  # layout -> what the folder must look like
    EXPECTED: ClassVar[dict[str, dict[str, int]]]  # layout -> image folder -> cases of the whole release
    CHANNELS: ClassVar[dict[str, str]] = {"0": "MRI"}
    FILE_ENDING: ClassVar[str] = ".nii.gz"
    LABELS: ClassVar[dict[str, int]]
    PATIENT_PATTERN: ClassVar[str | None] = None
    PUBLISHED: ClassVar[str | None] = None  # file of published splits in dataset_conversion/published

    @abstractmethod
    def detect(self, source: Path) -> str | None:
        """Return the layout of ``source``, a key of :attr:`LAYOUTS`, or None."""

    @abstractmethod
    def cases(self, source: Path, layout: str) -> Iterator[Case]:
        """Yield the cases of the release; the images are read one by one when written.

        Cases of ``imagesUn`` are an optional pool, written when the user asks for it.
        """

    def channels(self, cases: list[Case]) -> dict[str, str]:
        """Return ``channel_names`` of dataset.json for the cases found."""
        return dict(self.CHANNELS)

    def provenance(self, layout: str) -> str | None:
        """Say what the release did to the scans that a user of the numbers must know, or None."""
        return None
