"""MM-WHS 2017 from a tiny copy of the challenge's folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl.cli import make_subset
from nnssl.imageio import read_array
from nnssl.layout import RawDataset

VALUES = (0, 205, 420, 500, 550, 600, 820, 850)
CASES = ("ct_train_1006", "ct_train_1003", "mr_train_1001", "mr_train_1012", "mr_train_1007")


@pytest.fixture
def mmwhs(download: Path, toy) -> Path:
    for i, name in enumerate([*CASES, "ct_test_2001"]):
        image = toy.scan(i)
        if name.startswith("mr"):  # the modalities come in orientations of their own
            image = sitk.DICOMOrient(image, "PIR")
        toy.write(image, download / name[:-5] / f"{name}_image.nii.gz")
        if "train" in name:
            label = sitk.DICOMOrient(toy.values(i, VALUES), "PIR" if name.startswith("mr") else "LPS")
            toy.write(label, download / name[:-5] / f"{name}_label.nii.gz")
    return download


def test_modalities_are_domains_of_one_orientation(convert_to, mmwhs: Path, toy):
    dataset, _, err = convert_to("MMWHS")
    assert dataset.nnssl["domains"]["mr_train_1001"] == "MR"
    assert dataset.nnssl["domains"]["ct_test_2001"] == "CT"
    assert dataset.nnssl["domain_modalities"] == {"CT": "CT", "MR": "MR"}
    assert dataset.channel_names == {"0": "zscore"}
    assert "every case is z-scored by itself" in err
    for i, name in enumerate(CASES):
        array, grid = read_array(dataset.cases("imagesTr")[name][0])
        np.testing.assert_array_equal(array[0], sitk.GetArrayFromImage(toy.scan(i)))
        assert grid.direction == (1, 0, 0, 0, 1, 0, 0, 0, 1)
        label = read_array(dataset.label_file("imagesTr", name))[0][0]
        values = sitk.GetArrayFromImage(toy.values(i, VALUES))
        np.testing.assert_array_equal(label == dataset.json["labels"]["left_ventricle"], values == 500)
        np.testing.assert_array_equal(label == dataset.json["labels"]["right_ventricle"], values == 600)


def test_ct_alone_keeps_its_normalization(convert_to, mmwhs: Path):
    for path in [*mmwhs.glob("mr_train/*")]:
        path.unlink()
    assert convert_to("MMWHS")[0].channel_names == {"0": "CT"}


def test_stray_value_of_the_release_is_background(convert_to, convert_fails, mmwhs: Path, toy):
    path = mmwhs / "ct_train/ct_train_1006_label.nii.gz"
    toy.write(toy.values(0, (*VALUES, 422)), path)
    assert "values 422; " in convert_fails("MMWHS")
    toy.write(toy.values(0, (*VALUES, 421)), path)
    label = read_array(convert_to("MMWHS")[0].label_file("imagesTr", "ct_train_1006"))[0][0]
    original = read_array(path)[0][0]
    assert (label[original == 421] == 0).all()


def test_domain_adaptation_as_published(convert_to, mmwhs: Path, raw: Path, run):
    convert_to("MMWHS")
    four = "1:1,2:2,3:3,4:4,5:0,6:0,7:0"
    command = ["-d", 60, "-o", 61, "-n", "UDA", "--published", "MMWHS-CT2MR", "--label_map", four]
    code, _, err = run(make_subset.main, *command)
    assert code == 0, err
    dataset = RawDataset.load(raw / "Dataset061_UDA")
    roles = {folder: list(dataset.cases(folder)) for folder in ("imagesTr", "imagesUn", "imagesVal", "imagesTs")}
    assert roles == {
        "imagesTr": ["ct_train_1006"],
        "imagesUn": ["mr_train_1001"],
        "imagesVal": ["mr_train_1012"],
        "imagesTs": ["mr_train_1007"],
    }
    assert list(dataset.json["labels"]) == [
        "background",
        "myocardium",
        "left_atrium",
        "left_ventricle",
        "ascending_aorta",
    ]


def test_literature_crop_leaves_out_what_has_no_label(convert_to, mmwhs: Path):
    dataset, _, err = convert_to("MMWHS", "--literature_crop")
    assert dataset.cases("imagesTs") == {}
    assert "set aside: ct_test_2001: no label to crop around" in err
    assert "ct_test_2001" not in dataset.nnssl["domains"]
