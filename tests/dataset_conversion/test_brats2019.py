"""BraTS 2019 from a tiny copy of the challenge's folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nnssl.dataset_conversion.published import load_published
from nnssl.imageio import read_array

CASES = load_published("brats2019.json")["train"][:2] + load_published("brats2019.json")["test"][:1]


@pytest.fixture
def brats(download: Path, toy) -> Path:
    for i, name in enumerate([*CASES, "BraTS19_CBICA_VAL_1"]):
        grade = "HGG" if i < 2 else "LGG"
        folder = download / ("MICCAI_BraTS_2019_Data_Validation" if i == 3 else f"Training/{grade}") / name
        for k, kind in enumerate(("t1", "t1ce", "t2", "flair")):
            toy.write(toy.scan(10 * i + k), folder / f"{name}_{kind}.nii.gz")
        if i < 3:
            toy.write(toy.values(i, (0, 1, 2, 4)), folder / f"{name}_seg.nii.gz")
            toy.write(toy.scan(0), folder / f"._{name}_seg.nii.gz")
    return download / "Training" / "HGG" / CASES[0]


def test_values_become_nested_regions(convert_to, brats: Path):
    dataset, _, err = convert_to("BraTS2019")
    assert list(dataset.cases("imagesTr")) == sorted(CASES)
    assert "3 cases for imagesTr; the whole release has 335" in err
    original = read_array(brats / f"{CASES[0]}_seg.nii.gz")[0]
    label = read_array(dataset.label_file("imagesTr", CASES[0]))[0]
    for region, values in (("whole_tumor", (1, 2, 4)), ("tumor_core", (1, 4)), ("enhancing_tumor", (4,))):
        written = np.isin(label, dataset.json["labels"][region])
        np.testing.assert_array_equal(written, np.isin(original, values), err_msg=region)
    # nnU-Net paints the regions in this order, each over the one before
    assert dataset.json["regions_class_order"] == [1, 2, 3]
    assert dataset.channel_names == {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}
    for file, kind in zip(dataset.cases("imagesTr")[CASES[0]], ("t1", "t1ce", "t2", "flair"), strict=True):
        assert file.read_bytes() == (brats / f"{CASES[0]}_{kind}.nii.gz").read_bytes()


def test_literature_uses_flair_and_the_whole_tumor(convert_to, brats: Path):
    dataset, _, _ = convert_to("BraTS2019-FLAIR")
    (image,) = dataset.cases("imagesTr")[CASES[0]]
    assert image.read_bytes() == (brats / f"{CASES[0]}_flair.nii.gz").read_bytes()
    original = read_array(brats / f"{CASES[0]}_seg.nii.gz")[0]
    np.testing.assert_array_equal(read_array(dataset.label_file("imagesTr", CASES[0]))[0], original > 0)
    assert dataset.json["labels"] == {"background": 0, "whole_tumor": 1}
    assert "regions_class_order" not in dataset.json


def test_validation_release_is_the_optional_pool(convert_to, brats: Path):
    dataset, _, _ = convert_to("BraTS2019-FLAIR", "--with_unlabeled")
    assert list(dataset.cases("imagesUn")) == ["BraTS19_CBICA_VAL_1"]


@pytest.mark.parametrize(("kind", "text"), [("seg", "every training image has a label"), ("t2", "file not found")])
def test_missing_file_of_a_training_case(convert_fails, brats: Path, kind: str, text: str):
    (brats / f"{CASES[0]}_{kind}.nii.gz").unlink()
    assert text in convert_fails("BraTS2019")


def test_unknown_value_is_refused(convert_fails, brats: Path, toy):
    toy.write(toy.values(0, (0, 3)), brats / f"{CASES[0]}_seg.nii.gz")
    assert "values 3; 0, 1, 2, 4 are expected" in convert_fails("BraTS2019")
