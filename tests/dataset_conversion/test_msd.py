"""Tasks of the Medical Segmentation Decathlon from tiny copies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl.cli import make_subset
from nnssl.dataset_conversion.published import load_published
from nnssl.imageio import read_array

SPLIT = load_published("prostate.json")
TRAINING = [*SPLIT["protocols"]["Prostate-2-own1"]["labeled"], SPLIT["train1"][5], SPLIT["test1"][0]]


@pytest.fixture
def prostate(download: Path, toy) -> Path:
    root = download / "Task05_Prostate"
    for i, name in enumerate([*TRAINING, "prostate_03"]):
        image = sitk.JoinSeries([toy.scan(10 * i), toy.scan(10 * i + 1)])
        part = "Ts" if name == "prostate_03" else "Tr"
        toy.write(image, root / f"images{part}" / f"{name}.nii.gz")
        if part == "Tr":
            toy.write(toy.mask(i), root / "labelsTr" / f"{name}.nii.gz")
    content = {
        "name": "PROSTATE",
        "description": "Prostate transitional zone and peripheral zone segmentation",
        "licence": "CC-BY-SA 4.0",
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "background", "1": "PZ", "2": "TZ"},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in TRAINING],
        "test": ["./imagesTs/prostate_03.nii.gz", "./imagesTs/prostate_05.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def test_fourth_axis_becomes_channels(convert_to, prostate: Path, toy):
    dataset, _, err = convert_to("MSD")
    assert dataset.name == "Dataset060_PROSTATE"
    assert dataset.channel_names == {"0": "T2", "1": "ADC"}
    assert dataset.json["labels"] == {"background": 0, "PZ": 1, "TZ": 2}
    assert dataset.json["licence"] == "CC-BY-SA 4.0"
    for i, path in enumerate(dataset.cases("imagesTr")[TRAINING[1]]):
        array, grid = read_array(path)
        np.testing.assert_array_equal(array[0], sitk.GetArrayFromImage(toy.scan(10 + i)))
        assert grid.difference(read_array(prostate / f"labelsTr/{TRAINING[1]}.nii.gz")[1]) is None
    assert list(dataset.cases("imagesTs")) == ["prostate_03"]
    assert "test images of dataset.json that are not there: prostate_05.nii.gz" in err


def test_task_of_one_channel_is_copied(convert_to, prostate: Path, toy):
    content = json.loads((prostate / "dataset.json").read_text())
    content |= {"name": "Front & back", "modality": {"0": "MRI"}, "test": []}
    (prostate / "dataset.json").write_text(json.dumps(content))
    for i, name in enumerate(TRAINING):
        toy.write(toy.scan(i), prostate / "imagesTr" / f"{name}.nii.gz")
    dataset, _, _ = convert_to("MSD")
    assert dataset.name == "Dataset060_Front___back"
    copy = dataset.cases("imagesTr")[TRAINING[0]][0]
    assert copy.read_bytes() == (prostate / f"imagesTr/{TRAINING[0]}.nii.gz").read_bytes()


def test_prostate_of_the_literature_is_t2_alone(convert_to, prostate: Path, toy, raw: Path, run):
    dataset, _, _ = convert_to("Prostate")
    assert dataset.name == "Dataset060_Prostate"
    assert dataset.channel_names == {"0": "T2"}
    (path,) = dataset.cases("imagesTr")[TRAINING[0]]
    np.testing.assert_array_equal(read_array(path)[0][0], sitk.GetArrayFromImage(toy.scan(0)))
    code, _, err = run(make_subset.main, "-d", 60, "-o", 61, "-n", "Few", "--published", "Prostate-2-own1")
    assert code == 0
    assert "the lists of Prostate-2-own1 are nnssl's own" in err
    record = json.loads((raw / "Dataset061_Few/nnssl_subset.json").read_text())
    assert record["ours"] is True
    assert record["labeled"] == sorted(TRAINING[:2])
    assert record["test"] == [TRAINING[3]]


def test_other_task_is_not_the_prostate(convert_fails, prostate: Path):
    content = json.loads((prostate / "dataset.json").read_text()) | {"name": "Heart"}
    (prostate / "dataset.json").write_text(json.dumps(content))
    assert "a download of Prostate has a known layout" in convert_fails("Prostate")


def test_channel_that_is_missing_is_refused(convert_fails, prostate: Path, toy):
    toy.write(toy.scan(0), prostate / "imagesTr" / f"{TRAINING[0]}.nii.gz")
    assert "every labeled image has the channels" in convert_fails("MSD")


def test_label_header_that_drifts_is_mended(convert_to, prostate: Path, toy):
    label = toy.mask(0)
    label.SetOrigin((1, 2, 3))
    toy.write(label, prostate / "labelsTr" / f"{TRAINING[0]}.nii.gz")
    dataset, _, err = convert_to("MSD")
    assert f"1 labels took over the grid of their image, whose voxels they share: imagesTr/{TRAINING[0]} (origin" in err
    array, grid = read_array(dataset.label_file("imagesTr", TRAINING[0]))
    np.testing.assert_array_equal(array[0], sitk.GetArrayFromImage(label))
    assert grid.difference(read_array(dataset.cases("imagesTr")[TRAINING[0]][0])[1]) is None


def test_label_of_another_spacing_is_refused(convert_fails, prostate: Path, toy):
    label = toy.mask(0)
    label.SetSpacing((1.5, 1.5, 3))
    toy.write(label, prostate / "labelsTr" / f"{TRAINING[0]}.nii.gz")
    assert "image and label must share one grid" in convert_fails("MSD")
