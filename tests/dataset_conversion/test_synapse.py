"""Synapse (BTCV) from a tiny copy of RawData."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnssl.cli import make_subset
from nnssl.layout import RawDataset

TRAINING = ("0009", "0021", "0002", "0001", "0008")  # labeled, labeled, unlabeled, val, test in Synapse-4


@pytest.fixture
def synapse(download: Path, toy) -> Path:
    for i, number in enumerate(TRAINING):
        toy.write(toy.scan(i), download / f"RawData/Training/img/img{number}.nii.gz")
        toy.write(toy.mask(i, tuple(range(14))), download / f"RawData/Training/label/label{number}.nii.gz")
    toy.write(toy.scan(50), download / "RawData/Testing/img/img0061.nii.gz")
    return download / "RawData"


def test_raw_data_is_copied(convert_to, synapse: Path):
    dataset, out, _ = convert_to("Synapse")
    assert "5 labeled, 0 unlabeled, 0 val, 1 test" in out
    copy = dataset.cases("imagesTr")["img0009"][0]
    assert copy.read_bytes() == (synapse / "Training/img/img0009.nii.gz").read_bytes()
    assert list(dataset.json["labels"].values()) == list(range(14))
    assert dataset.json["labels"]["pancreas"] == 11
    assert dataset.channel_names == {"0": "CT"}


def test_published_roles(convert_to, synapse: Path, raw: Path, run):
    convert_to("Synapse")
    code, _, err = run(make_subset.main, "-d", 60, "-o", 61, "-n", "Few", "--published", "Synapse-4")
    assert code == 0, err
    dataset = RawDataset.load(raw / "Dataset061_Few")
    roles = {folder: list(dataset.cases(folder)) for folder in ("imagesTr", "imagesUn", "imagesVal", "imagesTs")}
    assert roles == {
        "imagesTr": ["img0009", "img0021"],
        "imagesUn": ["img0002"],
        "imagesVal": ["img0001"],
        "imagesTs": ["img0008"],
    }


def test_training_scan_without_label_is_refused(convert_fails, synapse: Path):
    (synapse / "Training/label/label0001.nii.gz").unlink()
    assert "every training image has a label" in convert_fails("Synapse")
