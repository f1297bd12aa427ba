"""NIH Pancreas-CT: portal-venous abdominal CT as DICOM series, with the pancreas in NIfTI files of their own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from nnssl.dataset_conversion.base import Case, Converter, Source, find_files, require_label
from nnssl.dataset_conversion.crop import LabelCrop
from nnssl.dataset_conversion.orientation import better_turned
from nnssl.dataset_conversion.published import load_published
from nnssl.dataset_conversion.volumes import read_again
from nnssl.errors import UserError
from nnssl.imageio import Geometry, ImageReadError, read_image, turned_onto
from nnssl.plans.verify import listed

_SOFT_TISSUE = (-150, 350)  # HU; the pancreas, its vessels and the fat between its lobes
_SHARE = 0.8  # of the label that must lie there: less means that image and label do not fit
# HU by which a mirrored label must stand out more. Enhanced pancreas lies about 200 HU above the fat around it; beside
# vessels and bowel a good part of that is left. Chosen for that, not measured on the collection.
_MARGIN = 30


class PancreasCT(Converter):
    """The collection of The Cancer Imaging Archive, without the withdrawn copies 0025 and 0070."""

    NAME = "Pancreas-CT"
    TITLE = "NIH Pancreas-CT: pancreas in contrast-enhanced abdominal CT"
    LICENCE = "CC BY 3.0"
    SOURCE_URL = "https://www.cancerimagingarchive.net/collection/pancreas-ct/"
    LAYOUTS = {"TCIA": "PANCREAS_NNNN/STUDY/SERIES/*.dcm with labelNNNN.nii.gz in a folder beside it"}
    EXPECTED = {"TCIA": {"imagesTr": 80}}
    CHANNELS = {"0": "CT"}
    LABELS = {"background": 0, "pancreas": 1}
    PUBLISHED = "pancreas.json"
    PAGE = "pancreas_ct"
    # The headers of the labels are not those of the DICOM series; the order of the voxels is.
    SHARED_VOXELS = True
    CROPS = {
        "TCIA": LabelCrop((25, 25, None), "mm", 96, "as MC-Net's preparation, without its resampling and window"),
    }

    def detect(self, source: Path) -> str | None:
        return "TCIA" if _patients(source) and find_files(source, _LABEL) else None

    def cases(self, source: Path, layout: str) -> Iterator[Case]:
        withdrawn = load_published(self.PUBLISHED)["withdrawn"]
        labels = {number: path for (number,), path in find_files(source, _LABEL).items()}
        patients = _patients(source)
        if lonely := sorted({f"PANCREAS_{number}" for number in labels} - patients.keys() - set(withdrawn)):
            warnings.warn(f"labels without a scan are left out: {listed(lonely)}", stacklevel=2)
        for name, folder in patients.items():
            if name in withdrawn:
                reason = "withdrawn by the archive: another cut of the scan of PANCREAS_0002"
                yield Case(name, (), left_out=reason)
                continue
            series = _series(folder)
            label = require_label(labels.get(name[-4:]), series).path
            yield Case(name, (Source(series, read_again),), Source(label, partial(read_label, series=series)))


_LABEL = r"label(\d{4})\.nii(?:\.gz)?"


def read_label(path: Path, series: Path) -> Any:
    """Read a label and make sure that it lies on soft tissue of its scan, and the right way round.

    Raises:
        ImageReadError: if the sizes differ, too little of the label has the grey levels of soft tissue, or it fits the
            scan better when it is mirrored.
    """
    import SimpleITK as sitk

    stored, image = read_image(path), read_again(series)
    label = turned_onto(stored, Geometry.of(image))  # how the writer will put it onto the image
    if label.GetSize() != image.GetSize():
        raise ImageReadError(f"size {image.GetSize()} and {label.GetSize()} (image, label)")
    values = sitk.GetArrayViewFromImage(image)[sitk.GetArrayViewFromImage(label) > 0]
    share = float(((values >= _SOFT_TISSUE[0]) & (values <= _SOFT_TISSUE[1])).mean()) if values.size else 0.0
    if share < _SHARE:
        low, high = _SOFT_TISSUE
        raise ImageReadError(f"{share:.0%} of it lies between {low} and {high} HU: it does not belong to {series}")
    arrays = sitk.GetArrayViewFromImage(image), sitk.GetArrayViewFromImage(label)
    if turned := better_turned(*arrays, *_SOFT_TISSUE, _MARGIN):  # the liver's side is soft tissue as well
        raise ImageReadError(f"{turned} (HU): it is stored in another order of the voxels than {series}")
    return stored


def _patients(source: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for level in range(4):
        for path in sorted(source.glob("*/" * level + "PANCREAS_*")):
            if path.is_dir() and re.fullmatch(r"PANCREAS_\d{4}", path.name):
                found.setdefault(path.name, path)
    return dict(sorted(found.items()))


def _series(folder: Path) -> Path:
    series = sorted({path.parent for path in folder.rglob("*.dcm") if not path.name.startswith(".")})
    if len(series) != 1:
        got = f"{len(series)} in {folder}"
        raise UserError("a patient's folder holds one DICOM series", got, 1, "download the collection again")
    return series[0]
