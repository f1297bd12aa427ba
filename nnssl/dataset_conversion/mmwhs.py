"""MM-WHS 2017: the whole heart in CT and MR of different patients, seven structures, modalities as domains."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from nnssl.dataset_conversion.base import Case, Converter, Source, find_files, require_label
from nnssl.dataset_conversion.crop import LabelCrop
from nnssl.dataset_conversion.volumes import as_classes, reoriented
from nnssl.imageio import read_image

_IMAGE, _LABEL = (rf"((ct|mr)_(train|test)_\d{{4}})_{kind}\.nii(?:\.gz)?" for kind in ("image", "label"))
#: Value in the file -> class. 421 is a stray value of an MR label, which the literature takes for background.
_CLASSES = {0: 0, 205: 1, 420: 2, 500: 3, 820: 4, 550: 5, 600: 6, 850: 7, 421: 0}


class MMWHS(Converter):
    """Training and test scans of both modalities, all with axes to the left, back and head."""

    NAME = "MMWHS"
    TITLE = "Multi-Modality Whole Heart Segmentation 2017: seven structures in CT and MR"
    LICENCE = "challenge data, for research after registration; terms at the source"
    SOURCE_URL = "https://zmiclab.github.io/zxh/0/mmwhs/"
    LAYOUTS = {"challenge": "{ct,mr}_train/{ct,mr}_train_NNNN_{image,label}.nii.gz [and {ct,mr}_test/]"}
    EXPECTED = {"challenge": {"imagesTr": 40, "imagesTs": 80}}
    CHANNELS = {"0": "CT"}  # kept only where no MR is: see nnssl.plans.domains
    LABELS = {
        "background": 0,
        "myocardium": 1,
        "left_atrium": 2,
        "left_ventricle": 3,
        "ascending_aorta": 4,
        "right_atrium": 5,
        "right_ventricle": 6,
        "pulmonary_artery": 7,
    }
    PUBLISHED = "mmwhs.json"
    PAGE = "mmwhs"
    DOMAIN_MODALITIES = {"CT": "CT", "MR": "MR"}
    CROPS = {
        "challenge": LabelCrop((4, 4, 4), "voxels", 0, "as A&D's preparation, without its clipping and resizing"),
    }

    def detect(self, source: Path) -> str | None:
        return "challenge" if find_files(source, _IMAGE) else None

    def cases(self, source: Path, layout: str) -> Iterator[Case]:
        labels = find_files(source, _LABEL)
        for key, image in find_files(source, _IMAGE).items():
            name, modality, part = key
            label = labels.get(key)
            if part == "train":
                label = require_label(label, image).path
            label_source = Source(label, partial(read_oriented, classes=_CLASSES)) if label else None
            folder = "imagesTr" if part == "train" else "imagesTs"
            yield Case(name, (Source(image, read_oriented),), label_source, folder, modality.upper())


def read_oriented(path: Path, classes: dict[int, int] | None = None) -> Any:
    """Read a scan, or a label with its classes, in one orientation for all: nnU-Net looks at no direction."""
    image = reoriented(read_image(path))
    return image if classes is None else as_classes(image, classes)
