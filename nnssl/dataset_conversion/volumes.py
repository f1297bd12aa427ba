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
    image = read_again(path)
    if image.GetDimension() != 4 or not 0 <= frame < image.GetSize()[3]:
        raise ImageReadError(f"size {image.GetSize()} has no frame {frame}; frames count from 0")
    return _volume(image, frame)


_LAST: list[tuple[tuple, Any]] = []


def read_again(path: Path) -> Any:
    """Read a file or DICOM series, or return it if it was the last one read: what belongs together comes together."""
    stat = path.stat() if path.is_file() else None
    key = (str(path), stat.st_mtime_ns if stat else 0, stat.st_size if stat else 0)
    if not _LAST or _LAST[0][0] != key:
        _LAST.clear()  # before the next one is read: one file in memory at a time
        _LAST.append((key, read_image(path)))
    return _LAST[0][1]


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
