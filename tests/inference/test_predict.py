"""nnssl_predict writes what stock nnU-Net writes, on the image's own grid, and refuses in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch

from nnssl.cli.predict import main
from nnssl.errors import UserError
from nnssl.inference.models import load_model
from nnssl.inference.predict import PredictOptions, _Threads, best_device, predict_folder


@pytest.fixture
def model(results: Path) -> Path:
    """Return the model folder with random weights in two folds; the trainer is nnU-Net's own."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(json.loads((results / "plans.json").read_text()))
    for seed, fold in enumerate(("all", "0")):
        torch.manual_seed(seed)
        network = nnUNetTrainer.build_network_architecture(plans, plans.get_configuration("2d"), 1, 3, False)
        for parameter in network.parameters():
            if parameter.ndim > 1:  # large weights and no bias: every class wins somewhere
                torch.nn.init.normal_(parameter, std=0.5)
        checkpoint = {
            "network_weights": network.state_dict(),
            "trainer_name": "nnUNetTrainer",
            "init_args": {"configuration": "2d"},
            "inference_allowed_mirroring_axes": (0, 1),
        }
        (results / f"fold_{fold}").mkdir(exist_ok=True)
        torch.save(checkpoint, results / f"fold_{fold}" / "checkpoint_final.pth")
    return results


def stock_masks(model: Path, images: Path, out: Path, folds: tuple) -> dict[str, np.ndarray]:
    """Predict with nnU-Net's predictor as ``nnUNetv2_predict`` sets it up."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    out.mkdir()
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), folds)
    predictor.predict_from_files_sequential(str(images), str(out))
    return read_masks(out)


def read_masks(folder: Path) -> dict[str, np.ndarray]:
    return {p.name: SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(p))) for p in sorted(folder.glob("*.nii.gz"))}


@pytest.mark.parametrize("folds", [("all",), ("all", 0)])
def test_masks_equal_stock(model: Path, images: Path, tmp_path: Path, folds: tuple) -> None:
    expected = stock_masks(model, images, tmp_path / "stock", folds)
    options = ["-m", str(model), "-npp", "0", "-nps", "0", "-device", "cpu", "-f", *map(str, folds)]
    assert main(["-i", str(images), "-o", str(tmp_path / "ours"), *options]) == 0
    ours = read_masks(tmp_path / "ours")
    assert sorted(ours) == sorted(expected) == ["case_1.nii.gz", "case_2.nii.gz"]
    for name, mask in expected.items():
        assert len(np.unique(mask)) > 1, "a constant mask would prove nothing"
        np.testing.assert_array_equal(ours[name], mask)


def test_workers_change_nothing(model: Path, images: Path, tmp_path: Path) -> None:
    loaded, device = load_model(model), torch.device("cpu")
    alone = PredictOptions(preprocessing_processes=0, export_processes=0, progress=False)
    workers = PredictOptions(preprocessing_processes=1, export_processes=1, progress=False)
    predict_folder(loaded, images, tmp_path / "alone", alone, device)
    predict_folder(loaded, images, tmp_path / "workers", workers, device)
    a, b = read_masks(tmp_path / "alone"), read_masks(tmp_path / "workers")
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_mask_lies_on_the_grid_of_its_image(model: Path, images: Path, tmp_path: Path) -> None:
    options = PredictOptions(preprocessing_processes=0, export_processes=0)
    assert predict_folder(load_model(model), images, tmp_path / "out", options, torch.device("cpu")) == [
        "case_1",
        "case_2",
    ]
    image = SimpleITK.ReadImage(str(images / "case_1_0000.nii.gz"))
    mask = SimpleITK.ReadImage(str(tmp_path / "out" / "case_1.nii.gz"))
    assert mask.GetSize() == image.GetSize()
    for read in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(mask, read)(), getattr(image, read)(), atol=1e-5)


def test_continue_keeps_what_exists(model: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "case_1.nii.gz").write_bytes(b"kept")
    flags = ["-npp", "0", "-nps", "0", "-device", "cpu", "--continue_prediction"]
    assert main(["-i", str(images), "-o", str(out), "-m", str(model), *flags]) == 0
    assert (out / "case_1.nii.gz").read_bytes() == b"kept"
    assert (out / "case_2.nii.gz").is_file()


def test_threads_are_set_back(model: Path, images: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    predict_folder(
        load_model(model),
        images,
        tmp_path / "out",
        PredictOptions(preprocessing_processes=0, export_processes=0),
        torch.device("cpu"),
    )
    assert torch.get_num_threads() == before


class _Payload:
    """Unpickling this runs code: a checkpoint that holds it must not be loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.path,)


def test_checkpoint_that_could_run_code_is_refused_before_it_does(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, trace = model / "fold_all" / "checkpoint_final.pth", tmp_path / "executed"
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "extra": _Payload(trace)}, path)
    assert main(["-i", str(images), "-o", str(tmp_path / "out"), "-m", str(model), "-device", "cpu"]) == 2
    assert "weights only" in capsys.readouterr().err
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the payload works, so its absence above was a refusal"


def test_unknown_trainer_in_the_checkpoint_is_refused(model: Path, images: Path, tmp_path: Path) -> None:
    path = model / "fold_all" / "checkpoint_final.pth"
    torch.save({**torch.load(path, weights_only=True), "trainer_name": "NobodysTrainer"}, path)
    with pytest.raises(UserError, match="nnUNet_extTrainer"):
        predict_folder(load_model(model), images, tmp_path / "out", device=torch.device("cpu"))


def test_number_of_threads_is_the_users_when_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with _Threads(torch.device("cpu")):
        assert torch.get_num_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    with _Threads(torch.device("cpu")):
        assert torch.get_num_threads() == (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        )


REFUSALS = {
    "trainer": (["-d", "501", "-c", "2d", "-tr", "DiffCLTrainr"], "SupervisedTrainer"),
    "configuration": (["-d", "501", "-c", "2dd", "-tr", "SupervisedTrainer"], "2d"),
    "data set": (["-d", "9", "-c", "2d", "-tr", "SupervisedTrainer"], "Dataset501_Toy"),
    "run": (["-d", "501", "-c", "2d", "-tr", "SupervisedTrainer", "--run", "x"], "nnUNetPlans"),
    "fold": (["-d", "501", "-c", "2d", "-tr", "SupervisedTrainer", "-f", "3"], "all"),
    "checkpoint": (
        ["-d", "501", "-c", "2d", "-tr", "SupervisedTrainer", "-chk", "checkpoint_best.pth"],
        "checkpoint_final.pth",
    ),
    "no model": (["-d", "501", "-tr", "SupervisedTrainer"], "-c"),
    "two models": (["-d", "501", "-m", "x"], "one of the two"),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.usefixtures("results")
def test_refusal_is_one_line_with_exit_code_2(
    case: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags, named = REFUSALS[case]
    assert main(["-i", str(images), "-o", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("nnssl_predict: error: ")
    assert named in error
    assert not (tmp_path / "out").exists()


def test_preset_applies_its_predict_section_below_the_flags(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple] = []
    monkeypatch.setattr("nnssl.inference.predict.predict_cases", lambda m, c, o, options, d: used.append((m, options)))
    (model / "fold_all" / "checkpoint_final.pth").rename(model / "fold_all" / "checkpoint_best.pth")
    preset = tmp_path / "mine.json"
    preset.write_text(json.dumps({"predict": {"step_size": 0.25, "disable_tta": True, "chk": "checkpoint_best.pth"}}))
    command = [
        "-i",
        str(images),
        "-o",
        str(tmp_path / "out"),
        "-m",
        str(model),
        "-device",
        "cpu",
        "--preset",
        str(preset),
    ]
    assert main(command) == 0
    assert main([*command, "-step_size", "0.75"]) == 0
    assert [options.step_size for _, options in used] == [0.25, 0.75]
    assert not used[0][1].mirroring
    assert used[0][0].checkpoint == "checkpoint_best.pth"


@pytest.mark.parametrize("section", [{"stepsize": 0.5}, {"step_size": "0.5"}])
@pytest.mark.usefixtures("results")
def test_preset_with_an_unknown_key_or_a_wrong_type_is_refused(
    section: dict, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "mine.json").write_text(json.dumps({"predict": section}))
    flags = ["-d", "501", "-c", "2d", "-tr", "SupervisedTrainer", "--preset", str(tmp_path / "mine.json")]
    assert main(["-i", str(images), "-o", str(tmp_path / "out"), *flags]) == 2
    assert next(iter(section)) in capsys.readouterr().err


def test_unset_results_variable_is_refused(images: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.delenv("nnUNet_results", raising=False)
    assert main(["-i", str(images), "-o", "out", "-d", "501", "-c", "2d", "-tr", "SupervisedTrainer"]) == 2
    assert "nnUNet_results" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad",
    [{"step_size": 0.0}, {"step_size": 1.5}, {"preprocessing_processes": 0}, {"export_processes": -1}],
)
def test_options_out_of_range_are_refused(bad: dict) -> None:
    with pytest.raises(UserError):
        PredictOptions(**bad)


def test_device_must_be_known_and_there() -> None:
    assert best_device("cpu").type == "cpu"
    assert best_device().type in ("cuda", "mps", "cpu")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        best_device("cuda:1")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="exist on this machine"):
            best_device("cuda")
