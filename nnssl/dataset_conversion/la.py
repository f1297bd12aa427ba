"""2018 Left Atrium Segmentation Challenge: LGE-MRI of the heart, one class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnssl.dataset_conversion.base import Case, Converter, Source, below_test_folder
from nnssl.dataset_conversion.crop import LabelCrop
from nnssl.dataset_conversion.h5 import h5_sources
from nnssl.dataset_conversion.volumes import as_classes
from nnssl.imageio import read_image

_SPACING = (0.625, 0.625, 0.625)  # mm, as the challenge states it
_FILES = {"challenge": "lgemri.nrrd", "UA-MT": "mri_norm2.h5"}


class LA(Converter):
    """The challenge's own folders, or the h5 crops that come with the code of UA-MT."""

    NAME = "LA"
    TITLE = "2018 Atrial Segmentation Challenge: left atrium in late gadolinium-enhanced MRI"
    LICENCE = "challenge data, for research; terms at the source"
    SOURCE_URL = "https://www.cardiacatlas.org/atriaseg2018-challenge/"
    LAYOUTS = {
        "challenge": "[Training Set/ | Testing Set/]ID/lgemri.nrrd with ID/laendo.nrrd",
        "UA-MT": "ID/mri_norm2.h5 with the keys image and label, axes x, y, z",
    }
    EXPECTED = {"challenge": {"imagesTr": 100, "imagesTs": 54}, "UA-MT": {"imagesTr": 100}}
    LABELS = {"background": 0, "left_atrium": 1}
    PUBLISHED = "la.json"
    PAGE = "la"
    CROPS = {
        "challenge": LabelCrop(
            (9.375, 9.375, None), "mm", 70, "UA-MT's has a random margin of 10 to 19 voxels a side, here it is 15"
        ),
    }

    def detect(self, source: Path) -> str | None:
        return next((layout for layout, name in _FILES.items() if _files(source, name)), None)

    def cases(self, source: Path, layout: str) -> Iterator[Case]:
        for path in _files(source, _FILES[layout]):
            name = path.parent.name
            if layout == "UA-MT":
                image, label = h5_sources(path, "xyz", _SPACING)
                yield Case(name, (image,), label)
                continue
            mask = path.with_name("laendo.nrrd")
            held_out = below_test_folder(source, path.parent)
            folder = "imagesTs" if held_out else "imagesTr"
            label_source = None if held_out and not mask.is_file() else Source(mask, read_mask)
            yield Case(name, (Source(path, read_scan),), label_source, folder)

    def provenance(self, layout: str) -> str | None:
        if layout == "challenge":
            return None
        return (
            "label-cut crop: each scan was z-scored as a whole, then cut in x and y around its label with random "
            "margins, test scans too; spacing nominal"
        )


def read_scan(path: Path) -> Any:
    """Read a scan; a header without spacing (1 mm) gets the challenge's 0.625 mm."""
    image = read_image(path)
    if image.GetSpacing() == (1.0, 1.0, 1.0):
        image.SetSpacing(_SPACING)
    return image


def read_mask(path: Path) -> Any:
    """Read a mask of 0 and 255 as 0 and 1, on the grid of :func:`read_scan`.

    Raises:
        ImageReadError: if a voxel has another value.
    """
    return as_classes(read_scan(path), {0: 0, 1: 1, 255: 1})


def _files(source: Path, name: str) -> list[Path]:
    return sorted({path for pattern in (f"*/{name}", f"*/*/{name}") for path in source.glob(pattern)})
