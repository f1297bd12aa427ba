"""Read volumes from the h5 files in which several research groups pass scans on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.dataset_conversion.base import Source
from nnssl.dataset_conversion.labels import whole_values
from nnssl.imageio import ImageReadError


def h5_sources(path: Path, axes: str, spacing: tuple[float, float, float]) -> tuple[Source, Source]:
    """Return image and label of an h5 file with the keys ``image`` and ``label``.

    Args:
        path: the file.
        axes: order of the stored axes, ``"xyz"`` or ``"zyx"``.
        spacing: nominal spacing along x, y, z in mm; the files carry none.
    """
    read = partial(read_h5, axes=axes, spacing=spacing)
    return Source(path, partial(read, key="image")), Source(path, partial(read, key="label"))


def read_h5(path: Path, key: str, axes: str, spacing: tuple[float, float, float]) -> Any:
    """Read one volume of an h5 file as a SimpleITK image; labels become 8-bit integers.

    Raises:
        ImageReadError: if the file or key is missing, the volume is not 3D, or a label value is no class.
    """
    import h5py
    import SimpleITK as sitk

    try:
        with h5py.File(path, "r") as file:
            array = np.asarray(file[key])
    except (OSError, KeyError) as error:
        raise ImageReadError(f"no h5 file with the key {key!r} ({error})") from error
    if array.ndim != 3:
        raise ImageReadError(f"{key!r} has shape {array.shape}; three axes are expected")
    if axes == "xyz":
        array = array.transpose(2, 1, 0)
    if key == "label":
        whole_values(array)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array, np.uint8 if key == "label" else np.float32))
    image.SetSpacing(spacing)
    return image
