"""What can't be predicted is named before a model is loaded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from skimage import io

from nnssl.errors import UserError
from nnssl.inference.inputs import list_inputs, prepare_output


def test_cases_come_with_their_channels_in_order(images: Path) -> None:
    shutil.copy(images / "case_1_0000.nii.gz", images / "case_1_0001.nii.gz")
    shutil.copy(images / "case_2_0000.nii.gz", images / "case_2_0001.nii.gz")
    (images / "notes.txt").write_text("not an image")
    found = list_inputs(images, ".nii.gz", 2)
    assert list(found) == ["case_1", "case_2"]
    assert [Path(f).name for f in found["case_2"]] == ["case_2_0000.nii.gz", "case_2_0001.nii.gz"]


def test_wrong_channels_are_named_case_by_case(images: Path) -> None:
    shutil.copy(images / "case_1_0000.nii.gz", images / "case_1_0001.nii.gz")
    with pytest.raises(UserError, match="channels") as refusal:
        list_inputs(images, ".nii.gz", 2)
    assert "case_2 (has 0000)" in refusal.value.got
    assert "case_1" not in refusal.value.got


def test_one_file_may_hold_all_channels(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (8, 9, 3)).astype(np.uint8)
    io.imsave(str(tmp_path / "photo_0000.png"), rgb, check_contrast=False)
    assert list(list_inputs(tmp_path, ".png", 3)) == ["photo"]
    with pytest.raises(UserError, match="channels of training"):
        list_inputs(tmp_path, ".png", 1)


def test_gap_in_the_channels_is_wrong_even_when_the_count_fits(images: Path) -> None:
    shutil.copy(images / "case_1_0000.nii.gz", images / "case_1_0002.nii.gz")
    shutil.copy(images / "case_2_0000.nii.gz", images / "case_2_0001.nii.gz")
    with pytest.raises(UserError, match="channels") as refusal:
        list_inputs(images, ".nii.gz", 2)
    assert refusal.value.got == "case_1 (has 0000, 0002)"


def test_folder_without_fitting_images_names_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty folder"):
        list_inputs(tmp_path, ".nii.gz", 1)
    (tmp_path / "brain.nrrd").write_text("x")
    with pytest.raises(UserError, match=r"brain\.nrrd") as refusal:
        list_inputs(tmp_path, ".nii.gz", 1)
    assert "CASE_0000.nii.gz" in refusal.value.allowed
    with pytest.raises(UserError, match="-i must name a folder"):
        list_inputs(tmp_path / "absent", ".nii.gz", 1)


def test_file_that_is_no_image_is_named(images: Path) -> None:
    (images / "case_2_0000.nii.gz").write_text("hello")
    with pytest.raises(UserError, match="readable") as refusal:
        list_inputs(images, ".nii.gz", 1)
    assert refusal.value.got.startswith("case_2 (")


def test_truncated_image_is_named(images: Path) -> None:
    """Its header is whole, and ITK would read the rest as whatever lies in memory."""
    whole = (images / "case_2_0000.nii.gz").read_bytes()
    (images / "case_2_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"case_2 \(truncated"):
        list_inputs(images, ".nii.gz", 1)


def test_image_with_nan_is_named(images: Path) -> None:
    """ITK would turn the NaN of a NIfTI file into zeros."""
    path = str(images / "case_1_0000.nii.gz")
    image = SimpleITK.ReadImage(path)
    image[3, 4, 1] = float("nan")
    SimpleITK.WriteImage(image, path)
    with pytest.raises(UserError, match=r"case_1 \(1 voxels are NaN"):
        list_inputs(images, ".nii.gz", 1)


def test_output_is_created_and_left_clean(tmp_path: Path, images: Path) -> None:
    prepare_output(tmp_path / "a" / "b", images)
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_output_must_not_be_the_input(images: Path) -> None:
    with pytest.raises(UserError, match="another folder"):
        prepare_output(images.parent / "images", images)


@pytest.mark.skipif(os.name == "nt", reason="POSIX paths")
def test_output_that_is_a_file_or_below_one_is_refused(tmp_path: Path, images: Path) -> None:
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="writable"):
            prepare_output(output, images)
