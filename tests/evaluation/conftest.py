"""Toy masks and folders for the evaluation tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

#: x, y, z: three different steps, so that a swapped axis shows.
SPACING_XYZ = (0.5, 1.0, 3.0)


def make_blobs(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return two overlapping random blobs with holes, islands and voxels on the array's border."""
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.normal(size=(2, *shape)), (0, *[1.5] * len(shape)))
    shared = ndimage.gaussian_filter(rng.normal(size=shape), 2.0)
    first, second = (0.5 * field / field.std() + shared / shared.std() > 0.6 for field in fields)
    assert first.any()
    assert second.any()
    return first, second


def write_mask(path: Path, array: np.ndarray, spacing=SPACING_XYZ, origin=None, direction=None) -> Path:
    """Write labels (z, y, x) as a volume."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    image.SetSpacing(spacing)
    if origin is not None:
        image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(direction)
    sitk.WriteImage(image, str(path))
    return path


@pytest.fixture
def blobs():
    return make_blobs


@pytest.fixture
def write():
    return write_mask


@pytest.fixture
def folders(tmp_path):
    """Return references and predictions: four cases of two classes, shifted by one to four voxels in x."""
    reference = np.zeros((6, 12, 16), np.uint8)
    reference[1:5, 2:6, 2:10] = 1
    reference[1:5, 7:11, 2:10] = 2
    for shift in range(1, 5):
        write_mask(tmp_path / "ref" / f"case_{shift}.nii.gz", reference)
        write_mask(tmp_path / "pred" / f"case_{shift}.nii.gz", np.roll(reference, shift, axis=2))
    return tmp_path / "ref", tmp_path / "pred"
