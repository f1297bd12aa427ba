"""A model is found by its names, and what is missing is named together with what exists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnssl.errors import UserError
from nnssl.inference.models import find_model_folder, load_model


def test_model_is_found_by_id_and_by_name(results: Path) -> None:
    assert find_model_folder(501, "SupervisedTrainer", "nnUNetPlans", "2d") == results
    assert find_model_folder("Dataset501_Toy", "SupervisedTrainer", "nnUNetPlans", "2d") == results


def test_run_is_a_suffix_of_the_plans_name(results: Path) -> None:
    run = results.with_name("SupervisedTrainer__nnUNetPlans-seed1__2d")
    run.mkdir()
    assert find_model_folder(501, "SupervisedTrainer", "nnUNetPlans", "2d", "seed1") == run


@pytest.mark.parametrize(
    ("names", "rule", "named"),
    [
        ((501, "SupervisdTrainer", "nnUNetPlans", "2d"), "-tr", "SupervisedTrainer"),
        ((501, "SupervisedTrainer", "nnUNetPlan", "2d"), "-p", "nnUNetPlans"),
        ((501, "SupervisedTrainer", "nnUNetPlans", "2D"), "-c", "2d"),
        ((502, "SupervisedTrainer", "nnUNetPlans", "2d"), "data set", "Dataset501_Toy"),
    ],
)
@pytest.mark.usefixtures("results")
def test_unknown_names_are_answered_with_what_was_trained(names: tuple, rule: str, named: str) -> None:
    with pytest.raises(UserError, match=rule) as refusal:
        find_model_folder(*names)
    assert named in str(refusal.value.allowed)


def test_names_are_those_trained_together(results: Path) -> None:
    """A configuration that only another trainer has is not offered."""
    results.with_name("CPSTrainer__nnUNetPlans__3d_fullres").mkdir()
    with pytest.raises(UserError, match="-c") as refusal:
        find_model_folder(501, "SupervisedTrainer", "nnUNetPlans", "3d_fullres")
    assert refusal.value.allowed == "2d"


def test_data_set_without_any_model(results: Path) -> None:
    (results.parents[1] / "Dataset502_Empty").mkdir()
    with pytest.raises(UserError, match="nnssl_train"):
        find_model_folder(502, "SupervisedTrainer", "nnUNetPlans", "2d")


def test_model_knows_its_checkpoints_channels_and_ending(results: Path) -> None:
    model = load_model(results)
    assert model.checkpoint_files == [results / "fold_all" / "checkpoint_final.pth"]
    assert (model.channels, model.file_ending, model.configuration) == (1, ".nii.gz", "2d")


@pytest.mark.parametrize("fold", [0, "7", "al", "-1"])
def test_missing_fold_names_the_trained_ones(results: Path, fold: str) -> None:
    with pytest.raises(UserError, match=r"-f must name") as refusal:
        load_model(results, [fold])
    assert "all" in str(refusal.value.allowed)


def test_unfinished_training_offers_its_checkpoints(results: Path) -> None:
    fold = results / "fold_all"
    (fold / "checkpoint_final.pth").rename(fold / "checkpoint_latest.pth")
    with pytest.raises(UserError, match="finish the training") as refusal:
        load_model(results)
    assert "checkpoint_latest.pth" in refusal.value.allowed
    assert load_model(results, checkpoint="checkpoint_latest.pth").checkpoint == "checkpoint_latest.pth"


def test_cascade_is_refused_even_when_inherited(results: Path) -> None:
    cascade = results.with_name("SupervisedTrainer__nnUNetPlans__3d_cascade_fullres")
    results.rename(cascade)
    plans = json.loads((cascade / "plans.json").read_text())
    with pytest.raises(UserError, match="cascade"):
        load_model(cascade)
    plans["configurations"]["3d_cascade_fullres_x"] = {"inherits_from": "3d_cascade_fullres"}
    (cascade / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(UserError, match="cascade"):
        load_model(cascade.rename(cascade.with_name("SupervisedTrainer__nnUNetPlans__3d_cascade_fullres_x")))


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_damaged_model_folder_is_refused(results: Path, name: str) -> None:
    (results / name).write_text("{")
    with pytest.raises(UserError, match="valid"):
        load_model(results)
    (results / name).unlink()
    with pytest.raises(UserError, match=r"plans\.json and dataset\.json"):
        load_model(results)


def test_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="TRAINER__PLANS__CONFIGURATION"):
        load_model(tmp_path)
