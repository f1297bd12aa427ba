"""Reading images: what is complete, what is refused, which grids are equal."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl.imageio import (
    TURNED,
    Geometry,
    ImageReadError,
    read_array,
    read_image,
    share_grid,
    split_ending,
    write_label,
)

GRID = Geometry((4, 5, 6), (1.0, 1.0, 2.0), (0.0, -3.0, 7.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    path = tmp_path / "scan.nii.gz"
    noise = np.random.default_rng(0).integers(0, 4000, (12, 40, 40)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(noise), str(path), True)
    return path


@pytest.mark.parametrize("kept", [3, 200, 0.3, 0.98])
def test_truncated_nifti_is_refused(scan: Path, kept: float):
    whole = scan.read_bytes()
    scan.write_bytes(whole[: int(kept if kept >= 1 else kept * len(whole))])
    with pytest.raises(ImageReadError):
        read_image(scan)


def test_whole_gzip_around_a_truncated_nifti_is_refused(scan: Path):
    expanded = gzip.decompress(scan.read_bytes())
    scan.write_bytes(gzip.compress(expanded[:-1]))
    with pytest.raises(ImageReadError, match="truncated"):
        read_image(scan)


def test_text_named_as_an_image_is_refused(tmp_path: Path):
    for name in ("a.nii.gz", "a.nii", "a.nrrd", "a.mha", "a.png"):
        (tmp_path / name).write_text("patient list")
        with pytest.raises(ImageReadError) as error:
            read_array(tmp_path / name)
        assert str(tmp_path) not in str(error.value)  # the caller names the file


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_of_a_nifti_file_is_found_although_itk_reads_zero(tmp_path: Path, value: float, dtype: type):
    array = np.ones((3, 4, 5), dtype)
    array[1, 2, 3] = value
    path = tmp_path / "a.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    with pytest.raises(ImageReadError, match="1 voxels are NaN"):
        read_image(path)


def test_scaled_integer_nifti_is_read(tmp_path: Path):
    path = tmp_path / "a.nii"
    sitk.WriteImage(sitk.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(3, 4, 5)), str(path))
    content = bytearray(path.read_bytes())
    content[112:116] = np.float32(0.5).tobytes()  # scl_slope
    path.write_bytes(content)
    assert read_array(path)[0].max() == pytest.approx(29.5)


def test_read_array_puts_channels_first(tmp_path: Path):
    path = tmp_path / "a.mha"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 4, 5), np.uint8)), str(path))
    array, grid = read_array(path)
    assert array.shape == (1, 3, 4, 5)
    assert grid.size == (5, 4, 3)
    from skimage import io

    io.imsave(tmp_path / "rgb.png", np.zeros((4, 5, 3), np.uint8), check_contrast=False)
    array, grid = read_array(tmp_path / "rgb.png")
    assert array.shape == (3, 1, 4, 5)
    assert grid.size == (5, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"size": (4, 5, 7)},
        {"spacing": (1.0, 1.0, 2.001)},
        {"origin": (0.0, -3.0, 7.1)},
        {"direction": (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0)},
    ],
)
def test_grids_that_differ_are_told_apart(change: dict):
    (name,) = change
    assert GRID.difference(replace(GRID, **change)).startswith(name)


def test_grids_equal_up_to_single_precision_are_one():
    rounded = replace(GRID, spacing=(1.0, 1.0, 2.000001), origin=(0.0, -3.00002, 7.0))
    assert GRID.difference(rounded) is None


def oblique(angle: float = 0.3) -> tuple[float, ...]:
    c, s = np.cos(angle), np.sin(angle)
    return (c, -s, 0, s, c, 0, 0, 0, 1)


def label_on(direction: tuple[float, ...], origin: tuple[float, ...] = (10.0, -20.0, 30.0)) -> sitk.Image:
    label = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint8))
    label.SetSpacing((1.0, 1.5, 2.0))
    label.SetOrigin(origin)
    label.SetDirection(direction)
    return label


@pytest.mark.parametrize("direction", [(1, 0, 0, 0, 1, 0, 0, 0, 1), oblique()])
@pytest.mark.parametrize("stored", ["RAI", "LPI", "RPS", "ASL", "PIR"])
def test_a_label_stored_with_other_axes_is_turned_onto_its_image(direction, stored: str):
    right = label_on(direction)
    other = sitk.DICOMOrient(right, stored)
    found, note = share_grid(other, Geometry.of(right))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(right))
    assert Geometry.of(right).difference(Geometry.of(found)) is None
    assert note.startswith(TURNED)


@pytest.mark.parametrize("origin", [(0, 0, 0), (10.0, -20.0, 30.0)])
@pytest.mark.parametrize("direction", [(-1, 0, 0, 0, -1, 0, 0, 0, 1), oblique(), (1, 0, 0, 0, -1, 0, 0, 0, -1)])
def test_a_label_whose_header_was_lost_shares_the_order_of_the_voxels(direction, origin):
    right, lost = label_on((1, 0, 0, 0, 1, 0, 0, 0, 1)), label_on(direction, origin)
    found, note = share_grid(lost, Geometry.of(right))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(right))
    assert Geometry.of(found) == Geometry.of(right)
    assert note.startswith("direction")


@pytest.mark.parametrize("direction", [(-1, 0, 0, 0, -1, 0, 0, 0, 1), oblique()])
def test_a_label_that_its_header_turns_to_another_place_is_refused(direction):
    grid = Geometry.of(label_on((1, 0, 0, 0, 1, 0, 0, 0, 1)))
    with pytest.raises(ImageReadError, match=r"direction .* lies beside the image"):
        share_grid(label_on(direction, (40.0, 0.0, 30.0)), grid)


def test_a_label_of_one_direction_takes_over_the_origin_and_one_of_another_size_stays():
    grid = Geometry.of(label_on((1, 0, 0, 0, 1, 0, 0, 0, 1)))
    found, note = share_grid(label_on(grid.direction, (40.0, 0.0, 30.0)), grid)
    assert (Geometry.of(found), note.split()[0]) == (grid, "origin")
    smaller = label_on(grid.direction)[:, :, 1:]
    before = Geometry.of(smaller)
    assert share_grid(smaller, grid) == (smaller, None)
    assert Geometry.of(smaller) == before
    same = label_on(grid.direction)
    assert share_grid(same, grid) == (same, None)


def test_split_ending():
    assert split_ending("a.b.nii.gz") == ("a.b", ".nii.gz")
    assert split_ending("A.NRRD") == ("A", ".NRRD")
    assert split_ending("notes.txt") == ("notes.txt", "")


@pytest.mark.parametrize(("top", "dtype"), [(3, np.uint8), (700, np.uint16)])
def test_write_label_keeps_values_and_grid(tmp_path: Path, scan: Path, top: int, dtype: type):
    like = read_image(scan)
    label = np.zeros((12, 40, 40), np.int64)
    label[0, 0, 0] = top
    write_label(label, like, tmp_path / "l.nii.gz")
    array, grid = read_array(tmp_path / "l.nii.gz")
    assert array.dtype == dtype
    np.testing.assert_array_equal(array[0], label)
    assert grid.difference(read_array(scan)[1]) is None
