"""M&Ms: short-axis cine-MRI of four vendors, end-diastole and end-systole of each subject, vendors as domains."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from nnssl.dataset_conversion.base import Case, Converter, Source, find_files
from nnssl.dataset_conversion.published import load_published
from nnssl.dataset_conversion.volumes import read_frame
from nnssl.plans.verify import listed

_IMAGE, _LABEL = (rf"([A-Z]\d[A-Z]\d[A-Z]\d)_sa{ending}\.nii\.gz" for ending in ("", "_gt"))
_VENDORS = ("A", "B", "C", "D")


class MnMs(Converter):
    """The two annotated frames of each subject's 4D file; subjects without labels are the pool."""

    NAME = "MnMs"
    TITLE = "Multi-Centre, Multi-Vendor & Multi-Disease Cardiac Image Segmentation Challenge (M&Ms), cine-MRI"
    LICENCE = "CC BY-NC-SA 4.0; terms at the source"
    SOURCE_URL = "https://www.ub.edu/mnms/"
    LAYOUTS = {
        "OpenDataset": "{Training/{Labeled,Unlabeled},Validation,Testing}/ID/ID_sa.nii.gz with ID_sa_gt.nii.gz, "
        "and *Dataset*nformation*.csv"
    }
    EXPECTED = {"OpenDataset": {"imagesTr": 640, "imagesUn": 50}}
    LABELS = {"background": 0, "LV": 1, "MYO": 2, "RV": 3}
    PATIENT_PATTERN = r"^([^_]+)_sa_"
    PUBLISHED = "mnms.json"
    PAGE = "mnms"
    DOMAIN_MODALITIES = dict.fromkeys(_VENDORS, "MR")
    SHARED_VOXELS = True

    def detect(self, source: Path) -> str | None:
        return "OpenDataset" if find_files(source, _IMAGE) else None

    def cases(self, source: Path, layout: str) -> Iterator[Case]:
        subjects = _subjects(source)
        labels = find_files(source, _LABEL)
        for key, image in find_files(source, _IMAGE).items():
            if (subject := subjects.get(key[0])) is None:
                yield Case(key[0], (), left_out="neither the table nor the published lists name its vendor and frames")
                continue
            folder = "imagesTr" if key in labels else "imagesUn"
            for frame in subject.frames:
                read = partial(read_frame, frame=frame)
                label = Source(labels[key], read) if key in labels else None
                yield Case(f"{key[0]}_sa_{frame}", (Source(image, read),), label, folder, subject.vendor)


class Subject(NamedTuple):
    """Vendor and annotated frames, which count from 0, of a subject."""

    vendor: str
    frames: tuple[int, ...]


def _subjects(source: Path) -> dict[str, Subject]:
    """Return what the table of the release says, and the published lists where it says nothing."""
    published = load_published("mnms.json")
    listed_ones = {
        subject: Subject(vendor, tuple(published["frames"][subject]))
        for vendor in _VENDORS
        for subject in published[vendor]
    }
    table = _table(source)
    if not table:
        warnings.warn("no table of the subjects (CSV) found: vendors and frames are the published ones", stacklevel=2)
    differing = [s for s in sorted(table.keys() & listed_ones.keys()) if table[s] != listed_ones[s]]
    if differing:
        text = f"vendor or frames of {len(differing)} subjects are not the published ones; the table counts"
        warnings.warn(f"{text}: {listed(differing, 3)}", stacklevel=2)
    return listed_ones | table


def _table(source: Path) -> dict[str, Subject]:
    """Read the release's CSV; rows without a vendor or a frame are left to the published lists."""
    found: dict[str, Subject] = {}
    for path in sorted([*source.glob("*.csv"), *source.glob("*/*.csv")]):
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            for row in csv.DictReader(file):
                entry: dict[str, Any] = {str(k).strip(): str(v).strip() for k, v in row.items()}
                frames = [entry.get(key, "") for key in ("ED", "ES")]
                if "External code" in entry and entry.get("Vendor") in _VENDORS and all(f.isdigit() for f in frames):
                    number = tuple(sorted({int(frame) for frame in frames}))
                    found[entry["External code"]] = Subject(entry["Vendor"], number)
    return found
