"""The form of a converter: the cases of a public data set, where they lie, and what is known of the set.

A converter is one short file: a subclass of :class:`Converter` that recognizes a download and lists its cases.
"""

from __future__ import annotations

import filecmp
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nnssl.dataset_conversion.crop import LabelCrop
from nnssl.errors import UserError
from nnssl.imageio import Geometry, read_image, share_grid


@dataclass(frozen=True)
class Source:
    """One image or label as found.

    Args:
        path: file, or folder of one DICOM series.
        read: function of a module (or ``functools.partial`` of one) that turns ``path`` into a SimpleITK image, or
            into a list of them, one a channel, and raises ImageReadError if it cannot. None: the path is read, or
            copied, as it is.
    """

    path: Path
    read: Callable[[Path], Any] | None = None

    def load(self) -> Any:
        """Return the image, or the list of images."""
        return self.read(self.path) if self.read else read_image(self.path)


def load_shared(label: Source, image: Source) -> Any:
    """Return a label on the grid of its image: a cut moves origins, after which headers tell nothing of each other."""
    loaded = image.load()
    return share_grid(label.load(), Geometry.of(loaded[0] if isinstance(loaded, list) else loaded))[0]


@dataclass(frozen=True)
class Case:
    """A case to be written.

    Args:
        name: case id.
        images: one source a channel file, or one source whose ``read`` returns all channels.
        label: its label, or None.
        folder: image folder it goes to, a key of :data:`nnssl.layout.IMAGE_FOLDERS`.
        domain: scanner, site or modality it comes from, or None.
        left_out: why a converter does not write it; None: it is written.
    """

    name: str
    images: tuple[Source, ...]
    label: Source | None = None
    folder: str = "imagesTr"
    domain: str | None = None
    left_out: str | None = None

    def sources(self) -> list[Path]:
        """Return every file the case is made from."""
        return [source.path for source in (*self.images, *([self.label] if self.label else []))]


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
    LABELS: ClassVar[dict[str, Any]]  # value, or values of a region
    PATIENT_PATTERN: ClassVar[str | None] = None
    PUBLISHED: ClassVar[str | None] = None  # file of published splits in dataset_conversion/published
    PAGE: ClassVar[str]  # documentation/datasets/PAGE.md
    DOMAIN_MODALITIES: ClassVar[dict[str, str]] = {}  # domain -> modality
    CROPS: ClassVar[dict[str, LabelCrop]] = {}  # layout -> the literature's crop around the label
    # Image and label agree voxel by voxel, and headers that contradict it were lost; but not one that is whole and says
    # that the label was stored with other axes: see nnssl.imageio.share_grid.
    SHARED_VOXELS: ClassVar[bool] = False

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

    def details(self, source: Path, layout: str) -> dict[str, Any]:
        """Return entries of dataset.json that replace or extend the class's; ``name`` becomes the default of -n."""
        return {}

    def provenance(self, layout: str) -> str | None:
        """Say what the release did to the scans that a user of the numbers must know, or None."""
        return None


def find_files(source: Path, pattern: str, depth: int = 4) -> dict[tuple[str, ...], Path]:
    """Find files by name in a folder and its sub-folders; hidden ones, such as macOS's ``._NAME``, are skipped.

    Args:
        source: folder of the download.
        pattern: regular expression of the whole file name.
        depth: levels of sub-folders to look into.

    Returns:
        groups of the match -> file, in the order of the names; numbers in them count as numbers.

    Raises:
        UserError: if two files have the same groups and other bytes.
    """
    expression = re.compile(pattern)
    found: dict[tuple[str, ...], Path] = {}
    for level in range(depth + 1):
        for path in sorted(source.glob("*/" * level + "*")):
            match = expression.fullmatch(path.name)
            if match is None or path.name.startswith(".") or not path.is_file():
                continue
            if match.groups() in found:
                if filecmp.cmp(found[match.groups()], path, shallow=False):
                    continue
                got = f"{found[match.groups()]} and {path}"
                raise UserError("every file of a release is found once", got, None, "remove the second copy")
            found[match.groups()] = path
    return dict(sorted(found.items(), key=lambda item: natural_order(item[1].name)))


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts ``patient2`` before ``patient10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def require_label(label: Path | None, image: Path) -> Source:
    """Return the label of a training image.

    Raises:
        UserError: if there is none.
    """
    if label is None or not label.is_file():
        raise UserError("every training image has a label", f"none for {image}", None, "download the release again")
    return Source(label)


def below_test_folder(source: Path, folder: Path) -> bool:
    """Whether a case's folder lies in ``testing`` or the like; a download may have a name such as ``test_LA``."""
    name = folder.parent.name.lower()
    return name in ("test", "testing", "testing set") if folder.parent == source else name.startswith("test")
