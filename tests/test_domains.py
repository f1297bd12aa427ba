"""Unsupervised domain adaptation through the ordinary commands: the labels of the target decide nothing."""

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

SOURCE, TARGET = ("s0", "s1", "s2", "s3"), ("t0", "t1", "t2", "t3")
PLAN = ["-c", "2d", "--patch_size", "32", "32", "--batch_size", "2", "--base_features", "4", "-np", "1"]
TRAIN = ["-device", "cpu", "--epochs", "3", "--iterations_per_epoch", "2"]
METHOD = "MeanTeacherTrainer"


def write_scans(scans: Path, poison: bool) -> None:
    """Write four scans of the source and four of the target, whose contrast is inverted; all have masks.

    Poison replaces every mask of the target but that of the test case.
    """
    rows = ["case,domain,modality"]
    for i, name in enumerate([*SOURCE, *TARGET]):
        image, label = toy_case(i)
        if name in TARGET:
            image = image.max() - image
            if poison and name != "t3":
                label = np.random.default_rng(i).integers(0, 3, label.shape).astype(np.uint8)
        write_nifti(scans / "images" / f"{name}.nii.gz", image)
        write_nifti(scans / "masks" / f"{name}.nii.gz", label)
        rows.append(f"{name},{'source' if name in SOURCE else 'target'},{'CT' if name in SOURCE else 'MR'}")
    (scans / "domains.csv").write_text("\n".join(rows))
    (scans / "val.txt").write_text("t2\n")
    (scans / "test.txt").write_text("s3\nt3\n")


def prepare_and_train(root: Path, poison: bool) -> None:
    """Import everything, hide the labels of the target, plan, train fold 0 for three epochs."""
    scans = root / "scans"
    write_scans(scans, poison)
    folders = ["--labeled", str(scans / "images"), "--labels", str(scans / "masks"), "--channels", "CT"]
    assert import_data.main(["-d", "600", "-n", "Both", *folders, "--domains", str(scans / "domains.csv")]) == 0
    ids = ["--val_ids", str(scans / "val.txt"), "--test_ids", str(scans / "test.txt")]
    roles = ["--labeled", "all", "--labeled_domains", "source", *ids]
    assert make_subset.main(["-d", "600", "-o", "601", "-n", "Adapt", *roles]) == 0
    assert plan_and_preprocess.main(["-d", "601", *PLAN]) == 0
    assert train.main(["601", "2d", "0", "-tr", METHOD, *TRAIN]) == 0


def seen_by_training(root: Path) -> dict[str, str]:
    """Return hashes of everything preprocessed but what is only watched, and the caches and records of it."""
    data = root / "preprocessed" / "Dataset601_Adapt"
    hashes = {}
    for path in sorted(p for p in data.rglob("*") if p.is_file()):
        if path.name in ("nnssl_verified.json", "nnssl_unlabeled.json") or path.parent.name.endswith("_monitoring"):
            continue
        content = blosc2.open(str(path))[:].tobytes() if path.suffix == ".b2nd" else path.read_bytes()
        hashes[str(path.relative_to(data))] = hashlib.sha256(content).hexdigest()
    return hashes


def checkpoint(root: Path, name: str) -> dict:
    folder = root / "results" / "Dataset601_Adapt" / f"{METHOD}__nnUNetPlans__2d" / "fold_0"
    return torch.load(folder / f"checkpoint_{name}.pth", weights_only=True)


def watched(root: Path) -> list[dict]:
    folder = root / "results" / "Dataset601_Adapt" / f"{METHOD}__nnUNetPlans__2d" / "fold_0"
    return [json.loads(line)["branches"] for line in (folder / "progress.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _no_final_validation(monkeypatch):
    """Spare nnU-Net's prediction of the validation cases, which starts processes."""
    monkeypatch.setattr("nnssl.trainers.base.SemiSupervisedTrainer.perform_actual_validation", lambda *_, **__: None)


def test_labels_of_the_target_reach_neither_weights_nor_the_choice_of_a_checkpoint(tmp_path, capsys):
    runs = []
    root = tmp_path / "same_path"
    for poison in (False, True):
        with nnunet_variables(root):
            prepare_and_train(root, poison)
            runs.append((seen_by_training(root), checkpoint(root, "best"), checkpoint(root, "final"), watched(root)))
            if not poison:
                check_roles(root, capsys.readouterr().out)
                check_results_per_domain(root)
        shutil.rmtree(root)
    (clean, best, final, dice), (poisoned, poisoned_best, poisoned_final, poisoned_dice) = runs
    assert len(clean) > 20
    assert clean == poisoned
    for one, other in ((best, poisoned_best), (final, poisoned_final)):
        assert same(list(one["network_weights"].values()), list(other["network_weights"].values()))
        assert (one["_best_ema"], one["current_epoch"]) == (other["_best_ema"], other["current_epoch"])
    assert dice != poisoned_dice  # the poison did reach the record that is only watched


def check_roles(root: Path, printed: str) -> None:
    data = root / "raw" / "Dataset601_Adapt"
    files = {folder.name: sorted(p.name[:2] for p in folder.iterdir()) for folder in data.iterdir() if folder.is_dir()}
    assert files == {
        "imagesTr": ["s0", "s1", "s2"],
        "labelsTr": ["s0", "s1", "s2"],
        "imagesUn": ["t0", "t1"],
        "imagesVal": ["t2"],
        "labelsVal": ["t2"],
        "imagesTs": ["s3", "t3"],
        "labelsTs": ["s3", "t3"],
    }
    assert "domains: source: 3 labeled, 1 test; target: 2 unlabeled, 1 val, 1 test" in printed
    assert "Note: modalities meet: source (CT), target (MR); every case is normalized by itself" in printed
    preprocessed = root / "preprocessed" / "Dataset601_Adapt"
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    assert plans["configurations"]["2d"]["normalization_schemes"] == ["ZScoreNormalization"]
    for split in json.loads((preprocessed / "splits_final.json").read_text()):
        assert {*split["train"], *split["val"]} == {"s0", "s1", "s2"}  # checkpoint_best is chosen on split["val"]


def check_results_per_domain(root: Path) -> None:
    raw, out = root / "raw" / "Dataset601_Adapt", root / "out"
    where = ["-i", str(raw / "imagesTs"), "-o", str(out), "-d", "601", "-c", "2d", "-tr", METHOD, "-f", "0"]
    assert predict.main([*where, "-device", "cpu", "-npp", "0", "-nps", "0"]) == 0
    djfile = ["-djfile", str(raw / "dataset.json")]
    assert evaluate.main(["-ref", str(raw / "labelsTs"), "-pred", str(out), *djfile, "-np", "1"]) == 0
    domains = json.loads((out / "nnssl_evaluation.json").read_text())["domains"]
    assert {name: over["cases"] for name, over in domains.items()} == {"source": ["s3"], "target": ["t3"]}
