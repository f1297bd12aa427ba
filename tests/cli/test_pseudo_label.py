"""nnssl_pseudo_label on the toy data set: masks of a trained model, their record, and rounds of training."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnssl_test_tools import nnunet_variables

from nnssl.cli import plan_and_preprocess, predict, pseudo_label, train
from nnssl.plans.manifest import load_manifest
from nnssl.trainers.supervised import SupervisedTrainer
from nnssl.training.signals import EXIT_STOPPED

TRAINER, UNSURE = "SupervisedTrainer", 3
SHORT = ["--epochs", "2", "--iterations_per_epoch", "2"]
MODEL = ["-d", "901", "-c", "2d", "-tr", TRAINER, "-p", "toy2d"]
HOW = ["-device", "cpu", "-npp", "0", "-nps", "0", "-np", "1", "-step_size", "1"]


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory) -> Path:
    """The toy data set with a model of two labeled cases. Not to be changed."""
    root = tmp_path_factory.mktemp("trained")
    for part in ("raw", "preprocessed"):
        shutil.copytree(toy.root / part, root / part)
    with nnunet_variables(root):
        assert train.main(["901", "2d", "-tr", TRAINER, "-p", "toy2d", "-device", "cpu", *SHORT]) == 0
    return root


@pytest.fixture
def root(trained, tmp_path):
    """A copy of it that a test may change, with nnU-Net's variables pointing to it."""
    shutil.copytree(trained, tmp_path / "copy")
    with nnunet_variables(tmp_path / "copy"):
        yield tmp_path / "copy"


def masks_of(root: Path) -> Path:
    return root / "raw" / "Dataset901_Toy" / "labelsPseudo"


def fold_of(root: Path, run: str = "") -> Path:
    return root / "results" / "Dataset901_Toy" / f"{TRAINER}__toy2d{run}__2d" / "fold_all"


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def record_of(root: Path) -> dict:
    return json.loads((masks_of(root) / "nnssl_pseudo.json").read_text())


def refused(capsys, argv: list[str], *words: str) -> None:
    capsys.readouterr()
    assert pseudo_label.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("nnssl_pseudo_label: error: "), error
    assert all(word in error for word in words), error


def test_masks_are_the_predictions_where_they_are_sure_and_training_takes_them(root, tmp_path, capsys):
    assert pseudo_label.main([*MODEL, *HOW, "--min_component", "0"]) == 0
    masks, record = masks_of(root), record_of(root)
    assert sorted(p.name for p in masks.iterdir()) == ["nnssl_pseudo.json", *(f"un{i}.nii.gz" for i in range(4))]
    images = masks.parent / "imagesUn"
    argv = ["-i", str(images), "-o", str(tmp_path / "out"), *MODEL, "-step_size", "1", "-device", "cpu"]
    assert predict.main([*argv, "-npp", "0", "-nps", "0"]) == 0
    unsure = 0
    for case, entry in record["cases"].items():
        mask, plain = read(masks / f"{case}.nii.gz"), read(tmp_path / "out" / f"{case}.nii.gz")
        assert np.array_equal(mask[mask != UNSURE], plain[mask != UNSURE])
        unsure += (mask == UNSURE).sum()
        assert entry["voxels"] == {str(v): int((mask == v).sum()) for v in np.unique(mask)}
        assert entry["weight"] == 1
        assert 0 < entry["confidence"] <= 1
        assert 0 <= entry["stability"] <= 1
        image = sitk.ReadImage(str(images / f"{case}_0000.nii.gz"))
        assert sitk.ReadImage(str(masks / f"{case}.nii.gz")).GetSpacing() == image.GetSpacing()
    assert 0 < unsure < sum(read(p).size for p in masks.glob("*.nii.gz"))
    assert all(0 < t <= 0.9 for t in record["origin"]["thresholds"].values())
    checkpoint = fold_of(root) / "checkpoint_final.pth"
    assert record["origin"]["checkpoints"] == {"fold_all": hashlib.sha256(checkpoint.read_bytes()).hexdigest()}
    labeled = load_manifest(root / "preprocessed" / "Dataset901_Toy")["labeled"]
    assert record["saw"] == {"trained": labeled, "watched": {}}
    assert not list(masks.parent.glob(".*"))

    assert plan_and_preprocess.main(["-d", "901", "-np", "1", "-c", "2d", "-overwrite_plans_name", "toy2d"]) == 0
    options = ["-device", "cpu", *SHORT, "--run", "noisy", "--set", "supervision=gt+pseudo"]
    assert train.main(["901", "2d", "-tr", TRAINER, "-p", "toy2d", *options]) == 0
    refused(capsys, [*MODEL, *HOW], "--overwrite")
    assert pseudo_label.main([*MODEL, *HOW, "--run", "noisy", "--overwrite", "--keep", "0.5", "--keep_all"]) == 0
    again = record_of(root)
    assert again["saw"]["trained"] == labeled  # handed on by the first model's masks, and seen itself
    stability = {case: entry["stability"] for case, entry in again["cases"].items()}
    assert len(stability) == 2
    assert all(UNSURE not in read(masks / f"{case}.nii.gz") for case in stability)
    (masks / "nnssl_pseudo.json").unlink()
    refused(capsys, [*MODEL, *HOW, "--overwrite"], "made by hand")


def test_a_model_that_saw_a_held_out_case_may_not_label(root, capsys, monkeypatch):
    monkeypatch.setattr("nnssl.inference.pseudo_label.predict_cases", None)  # refused before anything is predicted
    run = fold_of(root) / "nnssl_run.json"
    content = json.loads(run.read_text())
    held_out = load_manifest(root / "preprocessed" / "Dataset901_Toy")
    run.write_text(json.dumps({**content, "labeled": {"other": held_out["monitoring"]["val0"]}}))
    refused(capsys, [*MODEL, *HOW], "imagesVal/val0", "other")
    run.write_text(json.dumps({**content, "inherited": {"other": held_out["test"]["test1"]}}))
    refused(capsys, [*MODEL, *HOW], "imagesTs/test1", "other")
    assert not masks_of(root).exists()


def test_watched_cases_count_for_the_checkpoint_that_they_chose(root):
    from nnssl.inference.models import load_model
    from nnssl.inference.pseudo_label import seen_by

    fold = fold_of(root)
    run = json.loads((fold / "nnssl_run.json").read_text())
    (fold / "nnssl_run.json").write_text(json.dumps({**run, "watched": {"w": "hash"}, "inherited": {"i": "other"}}))
    shutil.copyfile(fold / "checkpoint_final.pth", fold / "checkpoint_best.pth")
    final, best = (seen_by(load_model(fold.parent, ["all"], f"checkpoint_{kind}.pth")) for kind in ("final", "best"))
    assert final == {"trained": {**run["labeled"], "i": "other"}, "watched": {}}
    assert best == {**final, "watched": {"w": "hash"}}
    (fold / "nnssl_run.json").write_text(json.dumps({**run, "inherited": None}))
    assert seen_by(load_model(fold.parent)) is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["-d", "901"], ("no -c -tr",)),
        ([*MODEL, "--threshold", "2"], ("--threshold", "0 to 1")),
        ([*MODEL, "--refiner", "nowhere:f"], ("--refiner", "nowhere")),
        ([*MODEL, "--train", "--epochs", "1"], ("--rounds",)),
        ([*MODEL, "--rounds", "0"], ("--rounds",)),
        ([*MODEL, "--rounds", "1", "--train", "--run", "x"], ("--run",)),
        ([*MODEL, "-f", "0", "1", "--rounds", "1"], ("one fold",)),
        ([*MODEL, "--disable_tta", "--boxes", "absent.json"], ("--boxes", "absent.json")),
    ],
)
def test_wrong_words_are_refused(root, capsys, argv, words):
    refused(capsys, argv + ([] if "--train" in argv else HOW), *words)
    assert not masks_of(root).exists()


def test_rounds_go_on_after_a_kill_and_repeat_nothing(root, monkeypatch):
    made, killed = [], []
    from nnssl.inference import pseudo_label as engine

    write = engine.make_masks
    monkeypatch.setattr(engine, "make_masks", lambda d, m, *rest: made.append(m.folder.name) or write(d, m, *rest))

    def kill(trainer) -> None:
        if "pseudo-r2" in str(trainer.output_folder) and trainer.global_step == 2 and not killed:
            killed.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SupervisedTrainer, "after_step", kill)
    command = [*MODEL, *HOW, "--min_component", "0", "--rounds", "2", "--train", *SHORT]
    with pytest.raises(SystemExit) as left:
        pseudo_label.main(command)
    assert left.value.code == EXIT_STOPPED
    first = fold_of(root, "-pseudo-r1") / "checkpoint_final.pth"
    before = first.stat().st_mtime_ns
    assert not (fold_of(root, "-pseudo-r2") / "checkpoint_final.pth").exists()

    assert pseudo_label.main(command) == 0
    assert made == [f"{TRAINER}__toy2d__2d", f"{TRAINER}__toy2d-pseudo-r1__2d"]
    assert first.stat().st_mtime_ns == before
    last = torch.load(fold_of(root, "-pseudo-r2") / "checkpoint_final.pth", weights_only=True)
    assert last["nnssl"]["global_step"] == 4
    assert last["nnssl"]["settings"]["supervision"] == "gt+pseudo"
    kept = [json.loads((fold_of(root, f"-pseudo-r{i}") / "nnssl_pseudo.json").read_text()) for i in (1, 2)]
    assert [r["origin"]["round"] for r in kept] == [1, 2]
    assert kept[1] == record_of(root)
    hashes = [r["origin"]["checkpoints"]["fold_all"] for r in kept]
    assert hashes[1] == hashlib.sha256(first.read_bytes()).hexdigest() != hashes[0]

    assert pseudo_label.main(command) == 0  # nothing is left to do
    assert len(made) == 2
