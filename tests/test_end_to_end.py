"""The five commands a user types, from folders of scans to a table; and the canary in front of hidden labels."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from nnssl_test_tools import nnunet_variables, same, toy_case, write_nifti

from nnssl.cli import evaluate, import_data, make_subset, plan_and_preprocess, predict, train

PLAN = ["-c", "2d", "--patch_size", "32", "32", "--batch_size", "2", "--base_features", "4", "-np", "1"]
TRAIN = ["-device", "cpu", "--epochs", "1", "--iterations_per_epoch", "2", "--set", "q=64", "k=4"]


@pytest.fixture
def workspace(tmp_path):
    """nnU-Net's variables in a folder of the test's own."""
    with nnunet_variables(tmp_path):
        yield tmp_path


def test_the_five_commands_lead_from_folders_to_a_table(workspace, capsys):
    scans = workspace / "scans"
    for i in range(2):
        image, label = toy_case(i)
        write_nifti(scans / "labeled" / f"case{i}.nii.gz", image)
        write_nifti(scans / "masks" / f"case{i}.nii.gz", label)
        write_nifti(scans / "archive" / f"old{i}.nii.gz", toy_case(50 + i)[0])
    image, label = toy_case(99)
    write_nifti(scans / "new" / "today_0000.nii.gz", image)
    write_nifti(scans / "masks_new" / "today.nii.gz", label)
    (scans / "archive" / "broken.nii.gz").write_bytes(b"\x1f\x8b not a scan")

    folders = ["--labeled", str(scans / "labeled"), "--labels", str(scans / "masks")]
    archive = ["--unlabeled", str(scans / "archive"), "--channels", "MRI"]
    assert import_data.main(["-d", "501", "-n", "Heart", *folders, *archive]) == 0
    assert plan_and_preprocess.main(["-d", "501", "--verify_dataset_integrity", *PLAN]) == 0
    assert "broken" in capsys.readouterr().out + json.dumps(_manifest(workspace)["set_aside"])
    assert train.main(["501", "2d", "-tr", "DiffCLTrainer", *TRAIN]) == 0
    out = workspace / "out"
    where = ["-i", str(scans / "new"), "-o", str(out), "-d", "501", "-c", "2d", "-tr", "DiffCLTrainer"]
    assert predict.main([*where, "-device", "cpu", "-npp", "0", "-nps", "0"]) == 0
    assert evaluate.main(["-ref", str(scans / "masks_new"), "-pred", str(out), "-np", "1"]) == 0
    result = json.loads((out / "nnssl_evaluation.json").read_text())
    assert set(result["cases"]) == {"today"}
    assert all(0 <= row["dice"] <= 1 for row in result["cases"]["today"].values())


def _manifest(root: Path) -> dict:
    return json.loads((root / "preprocessed" / "Dataset501_Heart" / "nnssl_unlabeled.json").read_text())


def _write_source(root: Path, garbage: bool) -> None:
    """Write a fully labeled data set of four cases; garbage replaces the labels of the last two."""
    folder = root / "raw" / "Dataset700_Source"
    for i in range(4):
        image, label = toy_case(i)
        if garbage and i >= 2:
            label = np.random.default_rng(7).integers(0, 3, label.shape).astype(np.uint8)
        write_nifti(folder / "imagesTr" / f"case{i}_0000.nii.gz", image)
        write_nifti(folder / "labelsTr" / f"case{i}.nii.gz", label)
    content = {
        "channel_names": {"0": "CT"},  # CT normalization uses intensity statistics of the foreground
        "labels": {"background": 0, "box": 1, "ball": 2},
        "numTraining": 4,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))


def _run_subset(root: Path) -> tuple[dict[str, str], list[torch.Tensor]]:
    """Make the subset, plan, train a few steps; return hashes of every preprocessed file and the trained weights."""
    (root / "labeled.txt").write_text("case0\ncase1\n")
    assert make_subset.main(["-d", "700", "-o", "701", "-n", "Few", "--labeled_ids", str(root / "labeled.txt")]) == 0
    assert plan_and_preprocess.main(["-d", "701", *PLAN]) == 0
    assert train.main(["701", "2d", "-tr", "DiffCLTrainer", *TRAIN]) == 0
    data = root / "preprocessed" / "Dataset701_Few"
    hashes = {
        str(p.relative_to(data)): hashlib.sha256(_content(p)).hexdigest()
        for p in sorted(data.rglob("*"))
        if p.is_file() and p.name != "nnssl_verified.json"  # a cache keyed by the files' times
    }
    fold = root / "results" / "Dataset701_Few" / "DiffCLTrainer__nnUNetPlans__2d" / "fold_all"
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=True)
    return hashes, [*checkpoint["network_weights"].values(), *checkpoint["nnssl"]["partners"]["ds"]["weights"].values()]


def _content(path: Path) -> bytes:
    """Return a file's bytes; of compressed arrays the decoded ones (blosc2's threads order the chunks at will)."""
    return blosc2.open(str(path))[:].tobytes() if path.suffix == ".b2nd" else path.read_bytes()


def test_garbage_in_hidden_labels_changes_no_byte_and_no_weight(tmp_path):
    runs = []
    for garbage in (False, True):
        root = tmp_path / "same_path"
        with nnunet_variables(root):
            _write_source(root, garbage)
            runs.append(_run_subset(root))
            shutil.rmtree(root)
    (clean, weights), (poisoned, poisoned_weights) = runs
    assert len(clean) > 10
    assert {k for k in clean if clean[k] != poisoned.get(k)} == set()
    assert clean.keys() == poisoned.keys()
    assert same(weights, poisoned_weights)
