"""BraTS 2019: gliomas in four MRI sequences, on one grid of 1 mm, without the skull."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar

from nnssl.dataset_conversion.base import Case, Converter, Source, find_files, require_label
from nnssl.dataset_conversion.volumes import read_values

_FILE = r"(BraTS19_.+)_(t1|t1ce|t2|flair|seg)\.nii(?:\.gz)?"
_GRADES = ("HGG", "LGG")


class BraTS2019(Converter):
    """All four sequences; the overlapping regions that the challenge evaluates."""

    NAME = "BraTS2019"
    TITLE = "Brain Tumor Segmentation Challenge 2019: whole tumor, tumor core and enhancing tumor in four MRI sequences"
    LICENCE = "challenge data, for research after registration; terms at the source"
    SOURCE_URL = "https://www.med.upenn.edu/cbica/brats2019/data.html"
    LAYOUTS = {"challenge": "{HGG,LGG}/BraTS19_*/BraTS19_*_{t1,t1ce,t2,flair,seg}.nii.gz [and the validation release]"}
    EXPECTED = {"challenge": {"imagesTr": 335, "imagesUn": 125}}
    CHANNELS = {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}
    LABELS = {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing_tumor": [3]}
    PUBLISHED = "brats2019.json"
    PAGE = "brats2019"
    SHARED_VOXELS = True
    SEQUENCES: ClassVar[tuple[str, ...]] = ("t1", "t1ce", "t2", "flair")
    #: Value in the file (1 necrosis, 2 edema, 4 enhancing) -> class, in the order in which the regions nest.
    CLASSES = {0: 0, 2: 1, 1: 2, 4: 3}

    def detect(self, source: Path) -> str | None:
        return "challenge" if find_files(source, _FILE) else None

    def cases(self, source: Path, layout: str) -> Iterator[Case]:
        found: dict[str, dict[str, Path]] = {}
        for (name, kind), path in find_files(source, _FILE).items():
            found.setdefault(name, {})[kind] = path
        for name, files in found.items():
            paths = [files.get(kind, Path(name, f"{name}_{kind}.nii.gz")) for kind in self.SEQUENCES]
            label, folder = files.get("seg"), "imagesTr"
            if label is None and paths[0].parent.parent.name not in _GRADES:
                folder = "imagesUn"  # the validation release has no labels
            else:
                label = require_label(label, paths[0]).path
            read = partial(read_values, classes=self.CLASSES)
            yield Case(name, tuple(map(Source, paths)), Source(label, read) if label else None, folder)

    def details(self, source: Path, layout: str) -> dict[str, object]:
        return {"regions_class_order": [1, 2, 3]}


class BraTS2019Flair(BraTS2019):
    """What the semi-supervised literature uses: FLAIR alone, the whole tumor as one class."""

    NAME = "BraTS2019-FLAIR"
    TITLE = "Brain Tumor Segmentation Challenge 2019: whole tumor in FLAIR"
    CHANNELS = {"0": "FLAIR"}
    LABELS = {"background": 0, "whole_tumor": 1}
    SEQUENCES = ("flair",)
    CLASSES = {0: 0, 1: 1, 2: 1, 4: 1}

    def details(self, source: Path, layout: str) -> dict[str, object]:
        return {}
