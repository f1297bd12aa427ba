"""Automated Cardiac Diagnosis Challenge: short-axis cine-MRI, two annotated frames a patient, three classes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from nnssl.dataset_conversion.base import Case, Converter, Source, below_test_folder
from nnssl.dataset_conversion.h5 import h5_sources
from nnssl.dataset_conversion.published import load_published
from nnssl.errors import UserError

_NOMINAL_SPACING = (1.5625, 1.5625, 10.0)  # mm; the h5 release has lost the real one
_SCAN = re.compile(r"(patient\d{3})_frame(\d{2})\.nii\.gz")
_VOLUME = re.compile(r"(patient\d{3})_frame(\d{2})\.h5")


class ACDC(Converter):
    """The challenge's own folders, or the h5 volumes that come with SSL4MIS."""

    NAME = "ACDC"
    TITLE = "Automated Cardiac Diagnosis Challenge: right ventricle, myocardium, left ventricle in cine-MRI"
    LICENCE = "CC BY-NC-SA 4.0"
    SOURCE_URL = "https://www.creatis.insa-lyon.fr/Challenge/acdc/"
    LAYOUTS = {
        "challenge": "training/patientNNN/patientNNN_frameFF.nii.gz with patientNNN_frameFF_gt.nii.gz [and testing/]",
        "SSL4MIS": "ACDC_training_volumes/patientNNN_frameFF.h5 with the keys image and label, axes z, y, x",
    }
    EXPECTED = {"challenge": {"imagesTr": 200, "imagesTs": 100}, "SSL4MIS": {"imagesTr": 200}}
    LABELS = {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
    PATIENT_PATTERN = r"(patient\d+)_"
    PUBLISHED = "acdc.json"
    PAGE = "acdc"

    def detect(self, source: Path) -> str | None:
        if _find(source, _SCAN, "patient*/"):
            return "challenge"
        return "SSL4MIS" if _find(source, _VOLUME, "") else None

    def cases(self, source: Path, layout: str) -> Iterator[Case]:
        return _volumes(source) if layout == "SSL4MIS" else _frames(source)

    def provenance(self, layout: str) -> str | None:
        if layout == "challenge":
            return None
        return "intensities min-max scaled per volume; spacing nominal (1.5625, 1.5625, 10) mm: the release has lost it"


def _frames(source: Path) -> Iterator[Case]:
    for path in _find(source, _SCAN, "patient*/"):
        name = path.name[: -len(".nii.gz")]
        label = path.with_name(f"{name}_gt.nii.gz")
        held_out = below_test_folder(source, path.parent)
        _compare_with_info(path.parent, name[-2:])
        if not label.is_file() and not held_out:
            raise UserError("every training frame has a label", f"no {label}", None, "download the release again")
        folder = "imagesTs" if held_out else "imagesTr"
        yield Case(name, (Source(path),), Source(label) if label.is_file() else None, folder)


def _volumes(source: Path) -> Iterator[Case]:
    """Give each volume the name of its original frame, so that lists fit both layouts.

    The release numbers the frames of a patient 01 and 02, in the order of their original numbers.
    """
    original = load_published("acdc.json")["frames"]
    paths = _find(source, _VOLUME, "")
    numbers: dict[str, set[str]] = {}
    matches = [(path, match) for path in paths if (match := _VOLUME.fullmatch(path.name))]
    for _, match in matches:
        numbers.setdefault(match[1], set()).add(match[2])
    for path, match in matches:
        patient, frame = match.groups()
        if numbers[patient] <= {"01", "02"} and patient in original:
            frame = original[patient][int(frame) - 1]
        image, label = h5_sources(path, "zyx", _NOMINAL_SPACING)
        yield Case(f"{patient}_frame{frame}", (image,), label)


def _compare_with_info(folder: Path, frame: str) -> None:
    info = folder / "Info.cfg"
    if info.is_file():
        named = {int(n) for n in re.findall(r"^E[DS]:\s*(\d+)", info.read_text(errors="replace"), re.MULTILINE)}
        if named and int(frame) not in named:
            warnings.warn(f"{folder.name}: frame {frame} is neither ED nor ES in Info.cfg", stacklevel=2)


def _find(source: Path, name: re.Pattern[str], parent: str) -> list[Path]:
    found = {p for depth in ("", "*/", "*/*/") for p in source.glob(depth + parent + "patient*") if p.is_file()}
    return sorted((p for p in found if name.fullmatch(p.name)), key=lambda p: (p.name, p))
