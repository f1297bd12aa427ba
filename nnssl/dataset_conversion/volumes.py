"""Readers that converters of volumes share; all are functions of a path that cross to worker processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.dataset_conversion.labels import whole_values
from nnssl.imageio import ImageReadError, read_image
from nnssl.plans.verify import listed


def read_values(path: Path, classes: Mapping[int, int]) -> Any:
    """Read a label whose values are not 0, 1, 2, ...

    Args:
        path: the label.
        classes: value in the file -> class; background 0 included.

    Raises:
        ImageReadError: if a voxel has another value.
    """
    return as_classes(read_image(path), classes)


def as_classes(label: Any, classes: Mapping[int, int]) -> Any:
    """Return a label with its values replaced, as :func:`read_values` does."""
    import SimpleITK as sitk

    array = sitk.GetArrayViewFromImage(label)
    none = 255  # stands for no class
    table = np.full(max(*classes, np.iinfo(np.uint8).max) + 1, none, np.uint8)
    table[list(classes)] = list(classes.values())
    known = array.dtype == np.uint8  # a byte is never outside the table; other types are counted first
    found = np.take(table, array, mode="clip") if known else None
    if found is None or found.max(initial=0) == none:
        if unknown := sorted(whole_values(array).keys() - classes.keys()):
            raise ImageReadError(f"values {listed(unknown)}; {listed(sorted(classes))} are expected")
        found = np.take(table, array.astype(np.intp), mode="clip")
    mapped = sitk.GetImageFromArray(found)
    mapped.CopyInformation(label)
    return mapped


def read_channels(path: Path, keep: tuple[int, ...] | None = None) -> Any:
    """Read a file whose fourth axis holds the channels as a list of volumes; a 3D file as it is.

    Args:
        path: the file.
        keep: which channels, in order; None: all.

    Raises:
        ImageReadError: if a channel is missing.
    """
    image = read_image(path)
    if image.GetDimension() == 3:
        if keep not in (None, (0,)):
            raise ImageReadError(f"one channel; {listed(keep or ())} are expected")
        return image
    count = image.GetSize()[3]
    if missing := [i for i in keep or () if i >= count]:
        raise ImageReadError(f"{count} channels; number {listed(missing)} is missing")
    return [_volume(image, index) for index in (range(count) if keep is None else keep)]


def read_frame(path: Path, frame: int) -> Any:
    """Read one time point of a 4D file.

    Raises:
        ImageReadError: if the file has no such frame.
    """
    image = _FRAMES.read(path)  # frames of an image and of its label are read by turns
    if image.GetDimension() != 4 or not 0 <= frame < image.GetSize()[3]:
        raise ImageReadError(f"size {image.GetSize()} has no frame {frame}; frames count from 0")
    return _volume(image, frame)


class _Recent:
    """The files or DICOM series that were read last: what belongs together comes together.

    Args:
        most: files in memory at a time.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._held: dict[tuple, Any] = {}

    def read(self, path: Path) -> Any:
        """Read a file, or return it if it is one of the last and has not changed."""
        stat = path.stat() if path.is_file() else None
        key = (str(path), stat.st_mtime_ns if stat else 0, stat.st_size if stat else 0)
        image = self._held.pop(key, None)
        while len(self._held) >= self.most:  # before the next one is read
            del self._held[next(iter(self._held))]
        self._held[key] = read_image(path) if image is None else image
        return self._held[key]


_SCANS, _FRAMES = _Recent(1), _Recent(2)


def read_again(path: Path) -> Any:
    """Read a file or DICOM series, or return it if it was the last one read."""
    return _SCANS.read(path)


def _volume(image: Any, index: int) -> Any:
    """Return one volume of a 4D image, with the spatial part of its grid."""
    import SimpleITK as sitk

    size = [*image.GetSize()[:3], 0]
    volume = sitk.Extract(image, size, [0, 0, 0, index])
    direction = np.asarray(image.GetDirection()).reshape(4, 4)[:3, :3]
    volume.SetDirection(direction.ravel().tolist())
    volume.SetOrigin(image.GetOrigin()[:3])
    volume.SetSpacing(image.GetSpacing()[:3])
    return volume


def reoriented(image: Any) -> Any:
    """Return an image whose axes run to the patient's left, back and head (LPS), by swaps and flips alone."""
    import SimpleITK as sitk

    return sitk.DICOMOrient(image, "LPS")
