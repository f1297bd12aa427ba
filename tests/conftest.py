"""Toy data set, planned and preprocessed once a session through the real chain."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from nnssl_test_tools import nnunet_variables, toy_case, write_nifti

LABELED, UNLABELED, WATCHED = 2, 4, 1
DATASET = "Dataset901_Toy"


def write_toy_raw(root: Path, name: str = DATASET, unlabeled: int = UNLABELED) -> Path:
    """Write a raw data set of the nnssl layout."""
    folder = root / name
    for i in range(LABELED):
        image, label = toy_case(i)
        write_nifti(folder / "imagesTr" / f"lab{i}_0000.nii.gz", image)
        write_nifti(folder / "labelsTr" / f"lab{i}.nii.gz", label)
    for i in range(unlabeled):
        write_nifti(folder / "imagesUn" / f"un{i}_0000.nii.gz", toy_case(100 + i)[0])
    for i in range(WATCHED):
        image, label = toy_case(200 + i)
        write_nifti(folder / "imagesVal" / f"val{i}_0000.nii.gz", image)
        write_nifti(folder / "labelsVal" / f"val{i}.nii.gz", label)
    for i in range(2):
        write_nifti(folder / "imagesTs" / f"test{i}_0000.nii.gz", toy_case(300 + i)[0])
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "box": 1, "ball": 2},
        "numTraining": LABELED,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@dataclass(frozen=True)
class Toy:
    """Where the toy data set lies and how it was planned."""

    root: Path
    plans: dict[str, str]  # configuration -> plans identifier

    @property
    def raw(self) -> Path:
        return self.root / "raw" / DATASET

    @property
    def preprocessed(self) -> Path:
        return self.root / "preprocessed" / DATASET


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A planned and preprocessed toy data set; nnU-Net's variables point at it for the whole session."""
    import torch

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("toy")
    with nnunet_variables(root):
        from nnssl.cli import plan_and_preprocess

        write_toy_raw(root / "raw")
        common = ["-d", "901", "-np", "1", "--batch_size", "2", "--base_features", "4"]
        for configuration, patch in (("2d", ["32", "32"]), ("3d_fullres", ["8", "32", "32"])):
            name = f"toy{configuration[:2]}"
            argv = [*common, "-c", configuration, "--patch_size", *patch, "-overwrite_plans_name", name]
            assert plan_and_preprocess.main(argv) == 0
        yield Toy(root, {"2d": "toy2d", "3d_fullres": "toy3d"})


@pytest.fixture
def results(toy, tmp_path, monkeypatch):
    """A results folder of the test's own."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    return tmp_path / "results"
