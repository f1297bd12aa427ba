"""The whole chain on toy scans: to the table, on after a kill, and nothing twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from nnssl_test_tools import same

from nnssl.cli.reproduce import main
from nnssl.training.signals import EXIT_STOPPED

CALL = ["toy", "Toy-1", "-device", "cpu", "-np", "1", "--seeds", "1"]


def table_of(root: Path, name: str = "toy_Toy-1_b1_seed0") -> dict:
    return json.loads((root / "results" / "nnssl_reproduce" / "tables" / f"{name}.json").read_text())


def run_of(root: Path, row: str, seed: int = 0) -> Path:
    (found,) = (root / "results" / "nnssl_reproduce").glob(f"Dataset*/*/toy-{row}-b1-s{seed}")
    return found


def model_of(root: Path, row: str, seed: int = 0) -> Path:
    (found,) = (root / "results").glob(f"Dataset8*/*-toy-{row}-b1-s{seed}__2d/fold_all")
    return found


def steps(text: str, verb: str) -> tuple[int, int]:
    """Return how many steps of a kind were run, and how many were found done."""
    lines = [line for line in text.splitlines() if line.startswith("[") and f"  {verb} " in line]
    done = sum(line.endswith("done before") for line in lines)
    return len(lines) - done, done


def test_from_a_converted_data_set_to_the_table(finished):
    root, text = finished
    control, teacher, unknown = table_of(root)["rows"]
    for row in (control, teacher):
        assert row["iterations"] == 4
        for way, distance in (("paper", "asd"), ("mm", "assd")):
            assert list(row[way]) == ["dice", "jaccard", "hd95", distance]
            assert all(value["n"] == 1 and value["sd"] is None for value in row[way].values())
            assert 0 <= row[way]["jaccard"]["mean"] <= row[way]["dice"]["mean"] <= 100
    assert control["reported"] == {"dice": 50.0, "jaccard": 40.0, "hd95": 9.5, "asd": 3.25}
    assert teacher["notes"] == ["a note"]
    assert "reported_only" in unknown
    assert "paper" not in unknown
    for words in (
        "50.00",
        "here, literature-la",
        "here, mm",
        "reported only: no such trainer",
        "one seed and no spread",
    ):
        assert words in text


def test_the_split_is_the_published_one_and_the_model_is_the_rows(finished):
    root, _ = finished
    subset = next((root / "raw").glob("Dataset8*_Repro_Toy_1"))
    assert sorted(p.name for p in (subset / "labelsTr").iterdir()) == ["case0.nii.gz"]
    assert len(list((subset / "imagesUn").iterdir())) == 3
    assert [p.name for p in (subset / "labelsTs").iterdir()] == ["case5.nii.gz"]
    stored = torch.load(model_of(root, "teacher-plus") / "checkpoint_final.pth", weights_only=True)["nnssl"]
    assert stored["settings"]["unsupervised_weight"] == 0.5
    assert not stored["settings"]["deep_supervision"]


def test_each_way_predicts_and_measures_as_it_says(finished):
    root, _ = finished
    folder = run_of(root, "control")
    for way, unit, metric in (("paper", "voxel", "asd"), ("mm", "mm", "assd")):
        result = json.loads((folder / f"test_{way}.json").read_text())
        assert (result["unit"], metric in result["metrics"]) == (unit, True)
        assert list(result["cases"]) == ["case5"]
        assert (folder / f"test_{way}" / "case5.nii.gz").is_file()
    assert not list(folder.glob("*.part"))


def test_the_same_call_again_runs_nothing(finished, capsys):
    root, text = finished
    assert main(CALL) == 0
    again = capsys.readouterr()
    assert again.out == text
    assert [steps(again.err, verb) for verb in ("make", "plan", "train", "predict", "evaluate")] == [
        (0, 1),
        (0, 1),
        (0, 2),
        (0, 4),
        (0, 4),
    ]
    assert main([*CALL, "--report"]) == 0
    reported = capsys.readouterr()
    assert (reported.out, reported.err) == (text, "")
    assert root.is_dir()


def test_half_a_prediction_is_completed_and_a_torn_mask_written_again(finished, capsys):
    root, _ = finished
    folder = run_of(root, "control")
    whole = (folder / "test_mm" / "case5.nii.gz").read_bytes()
    scores = (folder / "test_mm.json").read_text()
    (folder / "test_mm").rename(folder / "test_mm.part")
    (folder / "test_mm.json").unlink()
    (folder / "test_mm.part" / "case5.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert main([*CALL, "--row", "control"]) == 0
    text = capsys.readouterr().err
    assert steps(text, "train") == (0, 1)
    assert steps(text, "predict") == steps(text, "evaluate") == (1, 1)
    assert (folder / "test_mm.json").read_text() == scores
    assert not (folder / "test_mm.part").exists()
    command = next(line for line in text.splitlines() if "nnssl_predict" in line)
    assert "--preset" not in command, "our way is nnU-Net's"
    assert "--stride" not in command


def test_a_stopped_training_goes_on_with_the_same_command(finished, capsys):
    root, _ = finished
    run, model = run_of(root, "teacher-plus"), model_of(root, "teacher-plus")
    whole = torch.load(model / "checkpoint_final.pth", weights_only=True)
    scores = json.loads((run / "test_paper.json").read_text())["cases"]
    shutil.rmtree(model.parent)  # the run's own masks and scores stay: they must not count as the new model's
    with stopped_after(3), pytest.raises(SystemExit) as left:
        main([*CALL, "--row", "teacher+"])
    assert left.value.code == EXIT_STOPPED
    assert "stopped on request; the same command goes on" in capsys.readouterr().err
    assert not (run / "test_paper").exists()
    assert main([*CALL, "--row", "teacher+"]) == 0
    text = capsys.readouterr().err
    assert steps(text, "make") == steps(text, "plan") == (0, 1)
    assert " --c\n" in text
    paper = next(line for line in text.splitlines() if "nnssl_predict" in line)
    assert "--stride 16 16" in paper
    assert "--preset" in paper
    resumed = torch.load(model / "checkpoint_final.pth", weights_only=True)
    assert same(list(whole["network_weights"].values()), list(resumed["network_weights"].values()))
    assert json.loads((run / "test_paper.json").read_text())["cases"] == scores


def test_a_run_with_other_settings_is_never_taken_for_this_one(finished, capsys):
    from nnssl.reproduce import table

    path = table.FOLDER / "tables" / "toy.json"
    before = path.read_text()
    path.write_text(before.replace('"unsupervised_weight": 0.5', '"unsupervised_weight": 0.25'))
    table.tables_of.cache_clear()
    try:
        assert main([*CALL, "--row", "teacher+"]) == 2
    finally:
        path.write_text(before)
        table.tables_of.cache_clear()
    error = capsys.readouterr().err.splitlines()[-1]
    assert "must have been trained as it would be now" in error
    assert "unsupervised_weight=0.25" in error


def test_another_seed_gives_a_spread_and_own_settings_another_run(finished):
    root, _ = finished
    assert main([*CALL[:-1], "2", "--row", "Control", "--set", "momentum=0.5"]) == 0
    (name,) = (root / "results" / "nnssl_reproduce" / "tables").glob("toy_Toy-1_b1_seeds2-x*.json")
    control, teacher, _ = table_of(root, name.stem)["rows"]
    assert (control["mm"]["dice"]["n"], control["mm"]["dice"]["sd"] is None) == (2, False)
    assert "momentum=0.5" in control["notes"]
    assert teacher["mm"] is None, "no row of the table was run with this setting but one"
    assert len(list((root / "results" / "nnssl_reproduce").glob("Dataset*/*/toy-control-b1*-s0"))) == 2


class stopped_after:  # noqa: N801
    """Context in which this process gets SIGTERM after a training step."""

    def __init__(self, step: int) -> None:
        from nnssl.trainers.base import SemiSupervisedTrainer

        self.base, self.step, self.original = SemiSupervisedTrainer, step, SemiSupervisedTrainer.train_step

    def __enter__(self) -> None:
        original, step = self.original, self.step

        def stepping(trainer, batch):
            scalars = original(trainer, batch)
            if trainer.global_step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return scalars

        self.base.train_step = stepping

    def __exit__(self, *exception: object) -> None:
        self.base.train_step = self.original
