"""Laws that every trainer of the registry obeys, in 2D and in 3D."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from nnssl_test_tools import same, weights
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnssl.cli import predict, train
from nnssl.data.seeding import Stream, seed_everything
from nnssl.environment import mend_torchvision
from nnssl.errors import UserError
from nnssl.trainers.launch import Job, read_plans
from nnssl.trainers.recording import memory_note
from nnssl.trainers.registry import TRAINERS, shim_folder, trainer_class
from nnssl.training.signals import EXIT_STOPPED

ALL = sorted(TRAINERS)
SEMI = [name for name in ALL if trainer_class(name).uses_unlabeled]
BOTH = ("2d", "3d_fullres")
#: Settings under which a method's predicting network must follow the supervised control bit for bit.
OFF = {
    "ACISISTrainer": {"unsupervised_weight": 0},
    "ACMTTrainer": {"unsupervised_weight": 0},
    "AdshTrainer": {"unsupervised_weight": 0},
    "BCPTrainer": {"unsupervised_weight": 0},
    "CAMLTrainer": {"unsupervised_weight": 0},
    "MeanTeacherTrainer": {"unsupervised_weight": 0},
    "CPSTrainer": {"unsupervised_weight": 0},
    "DTCTrainer": {"unsupervised_weight": 0},
    "CLDTrainer": {"unsupervised_weight": 0},
    "CReSTTrainer": {"unsupervised_weight": 0},
    "DHCTrainer": {"unsupervised_weight": 0},
    "DePLTrainer": {"unsupervised_weight": 0},
    "DiffCLTrainer": {"mu_d": 0, "mu_c": 0, "hfm": False},
    "DiffRectTrainer": {"unsupervised_weight": 0, "rect_weight": 0},
    "FixMatchTrainer": {"unsupervised_weight": 0},
    "ICTTrainer": {"unsupervised_weight": 0},
    "INCLTrainer": {"unsupervised_weight": 0},
    "SASSNetTrainer": {"unsupervised_weight": 0},
    "SSNetTrainer": {"unsupervised_weight": 0},
    "SimiSTrainer": {"unsupervised_weight": 0},
    "UAMTTrainer": {"unsupervised_weight": 0, "dropout": 0},
    "URPCTrainer": {"unsupervised_weight": 0},
}


#: Settings for the batches of ``test_ignored_voxels_and_regions_train``, whose crops hold few voxels.
SMALL = {"DiffCLTrainer": {"q": 64, "k": 4, "p": 16, "eta": 1.0}, "FixMatchTrainer": {"threshold": 0.0}}


def run_steps(trainer, count: int) -> list[dict[str, float]]:
    return [trainer.train_step(next(trainer.dataloader_train)) for _ in range(count)]


@pytest.mark.parametrize("configuration", BOTH)
@pytest.mark.parametrize("name", ALL)
def test_terms_are_finite_and_the_unsupervised_ones_positive(build, name, configuration):
    scalars = run_steps(build(name, configuration), 3)[-1]
    assert all(np.isfinite(v) for v in scalars.values())
    unsupervised = {n: v for n, v in scalars.items() if n.startswith("loss_") and "supervised" not in n}
    assert bool(unsupervised) == (name != "SupervisedTrainer")
    assert all(v > 0 for v in unsupervised.values()), unsupervised


@pytest.mark.parametrize("name", ALL)
def test_loss_falls_on_a_fixed_batch(build, name):
    trainer = build(name, settings={"lr_schedule": "constant"}, options={"epochs": 10, "iterations_per_epoch": 4})
    batch = next(trainer.dataloader_train)
    supervised = [sum(v for n, v in trainer.train_step(batch).items() if "supervised" in n) for _ in range(20)]
    assert np.mean(supervised[-3:]) < np.mean(supervised[:3]) - 0.05


@pytest.mark.parametrize("name", SEMI)
def test_unlabeled_cases_reach_the_predicting_network(build, name):
    """With the unsupervised terms alone, the network moves; the labeled terms are cut off by a zeroed loss."""
    trainer = build(name)
    trainer.supervised_loss = lambda output, target: (output[0] if isinstance(output, list) else output).sum() * 0
    before = [p.detach().clone() for p in trainer.network.parameters()]
    trainer.settings.__dict__["weight_decay"] = 0.0
    for optimizer in trainer.stepper.optimizers.values():
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
    run_steps(trainer, 2)
    assert not same(before, [p.detach() for p in trainer.network.parameters()])


@pytest.mark.parametrize("configuration", BOTH)
@pytest.mark.parametrize("name", sorted(OFF))  # methods of another shape test a law of their own
def test_weight_zero_is_the_supervised_control_bit_for_bit(build, name, configuration):
    method, control = build(name, configuration, OFF[name]), build("SupervisedTrainer", configuration)
    run_steps(method, 3), run_steps(control, 3)
    assert same(weights(method.network), weights(control.network))


@pytest.mark.parametrize("name", ALL)
def test_save_load_and_the_next_step_are_identical(build, name, tmp_path):
    first = build(name)
    run_steps(first, 3)
    first.save_checkpoint(str(tmp_path / "state.pth"))
    second = build(name, start=False)
    second.load_checkpoint(str(tmp_path / "state.pth"))
    second.dataloader_train, second.dataloader_val = second.get_dataloaders()
    second.set_deep_supervision_enabled(second.enable_deep_supervision)
    second.network.train()
    assert run_steps(first, 2) == run_steps(second, 2)
    for network in ["network", *first.partners]:
        assert same(weights(first.trained_network(network)), weights(second.trained_network(network)))
    for teacher in first.teachers:
        assert same(weights(first.teachers[teacher][1].module), weights(second.teachers[teacher][1].module))


@pytest.mark.parametrize("name", ALL)
def test_checkpoint_has_nnunets_keys_and_loads_as_weights_only(build, name, tmp_path):
    trainer = build(name)
    run_steps(trainer, 1)
    trainer.save_checkpoint(str(tmp_path / "state.pth"))
    checkpoint = torch.load(tmp_path / "state.pth", weights_only=True)
    assert set(checkpoint) == {
        "network_weights",
        "optimizer_state",
        "grad_scaler_state",
        "logging",
        "_best_ema",
        "current_epoch",
        "init_args",
        "trainer_name",
        "inference_allowed_mirroring_axes",
        "nnssl",
    }
    assert set(checkpoint["nnssl"]["partners"]) == set(trainer.partners)


@pytest.mark.parametrize("name", SEMI)
def test_poisoned_masks_of_unlabeled_cases_change_nothing(build, name, toy):
    """With a nonzero mask, so that the files are opened; what is above zero in them must not matter."""

    def masked():
        trainer = build(name, start=False)
        trainer.initialize()
        trainer.configuration_manager.configuration["use_mask_for_norm"] = [True]
        trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
        trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
        assert trainer.dataloader_train.data_loader.unlabeled._data.use_mask
        return trainer

    folder = Path(toy.preprocessed) / "toy2d_2d_unlabeled"
    clean = masked()
    expected = run_steps(clean, 2)
    files = sorted(folder.glob("*_seg.b2nd"))
    backup = {f: f.read_bytes() for f in files}
    try:
        for file in files:
            array = blosc2.open(str(file))
            poison = np.random.default_rng(0).integers(0, 3, array.shape).astype(array.dtype)
            file.unlink()
            blosc2.asarray(poison, urlpath=str(file), mode="w")
        assert run_steps(masked(), 2) == expected
    finally:
        for file, content in backup.items():
            file.write_bytes(content)


def train_argv(toy, name, configuration="2d", *more):
    plans = toy.plans[configuration]
    base = ["901", configuration, "-tr", name, "-p", plans, "-device", "cpu", "--epochs", "2"]
    small = ["--set", "q=512", "k=8", "p=32"] if name == "DiffCLTrainer" else []
    return [*base, "--iterations_per_epoch", "3", *small, *more]


@pytest.mark.parametrize(
    ("name", "configuration"),
    [(n, "2d") for n in ALL]
    + [(n, "3d_fullres") for n in ("DiffCLTrainer", "CPSTrainer", "MCNetTrainer", "URPCTrainer")],
)
def test_trained_model_predicts_the_same_masks_in_stock_nnunet(
    toy, results, tmp_path, monkeypatch, name, configuration
):
    import SimpleITK as sitk

    assert train.main(train_argv(toy, name, configuration)) == 0
    model = results / toy.raw.name / f"{name}__{toy.plans[configuration]}__{configuration}"
    source = toy.raw / "imagesTs"
    common = ["-i", str(source), "-m", str(model), "-f", "all", "-device", "cpu", "-npp", "0", "-nps", "0"]
    assert predict.main([*common, "-o", str(tmp_path / "ours")]) == 0
    monkeypatch.setenv("nnUNet_extTrainer", str(shim_folder()))
    mend_torchvision()
    stock = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(model), ("all",), "checkpoint_final.pth")
    images = [[str(p)] for p in sorted(source.iterdir())]
    outputs = [str(tmp_path / "stock" / Path(p[0]).name[: -len("_0000.nii.gz")]) for p in images]
    (tmp_path / "stock").mkdir()
    stock.predict_from_files_sequential(images, outputs)
    masks = sorted((tmp_path / "stock").glob("*.nii.gz"))
    assert len(masks) == 2
    for mask in masks:
        ours, stock = (sitk.ReadImage(str(tmp_path / side / mask.name)) for side in ("ours", "stock"))
        image = sitk.ReadImage(str(source / mask.name.replace(".nii.gz", "_0000.nii.gz")))
        assert np.array_equal(sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(stock))
        for side in (ours, stock):
            assert side.GetSize() == image.GetSize()
            assert np.allclose(side.GetSpacing(), image.GetSpacing())


@pytest.mark.parametrize("name", ALL)
def test_resume_from_an_epochs_end_equals_the_unbroken_run(toy, results, name):
    folder = results / toy.raw.name
    assert train.main(train_argv(toy, name)) == 0
    whole = folder / f"{name}__toy2d__2d" / "fold_all"
    broken = folder / f"{name}__toy2d-broken__2d" / "fold_all"
    with pytest.raises(DiedError):
        stop_at(3, lambda: train.main(train_argv(toy, name, "2d", "--run", "broken")), at_epoch_end=True)
    assert train.main(["901", "2d", "-tr", name, "-p", "toy2d", "-device", "cpu", "--run", "broken", "--c"]) == 0
    assert_same_run(whole, broken)


@pytest.mark.parametrize("name", ALL)
def test_resume_from_sigterm_within_an_epoch_equals_the_unbroken_run(toy, results, name):
    folder = results / toy.raw.name
    assert train.main(train_argv(toy, name)) == 0
    whole = folder / f"{name}__toy2d__2d" / "fold_all"
    broken = folder / f"{name}__toy2d-broken__2d" / "fold_all"
    with pytest.raises(SystemExit) as stopped:
        stop_at(4, lambda: train.main(train_argv(toy, name, "2d", "--run", "broken")))
    assert stopped.value.code == EXIT_STOPPED
    assert train.main(["901", "2d", "-tr", name, "-p", "toy2d", "-device", "cpu", "--run", "broken", "--c"]) == 0
    assert_same_run(whole, broken)


class DiedError(Exception):
    """Stands for a process that died."""


def stop_at(step: int, run, at_epoch_end: bool = False) -> None:
    """Send this process SIGTERM after a step, or die before the step that follows an epoch's end."""
    import signal

    from nnssl.trainers.base import SemiSupervisedTrainer

    original = SemiSupervisedTrainer.train_step

    def stepping(self, batch):
        if at_epoch_end and self.global_step == step:
            raise DiedError
        scalars = original(self, batch)
        if not at_epoch_end and self.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return scalars

    SemiSupervisedTrainer.train_step = stepping
    try:
        run()
    finally:
        SemiSupervisedTrainer.train_step = original


def assert_same_run(whole: Path, broken: Path) -> None:
    a, b = (torch.load(f / "checkpoint_final.pth", weights_only=True) for f in (whole, broken))
    assert same(list(a["network_weights"].values()), list(b["network_weights"].values()))
    assert a["nnssl"]["partners"].keys() == b["nnssl"]["partners"].keys()
    for key, partner in a["nnssl"]["partners"].items():
        assert same(list(partner["weights"].values()), list(b["nnssl"]["partners"][key]["weights"].values()))
    for part in ("teachers", "modules"):
        assert same(_tensors(a["nnssl"][part]), _tensors(b["nnssl"][part])), part
    for key in ("train_losses", "mean_fg_dice", "val_losses"):
        assert a["logging"][key] == b["logging"][key]
    rows = [[(r["losses"], r["branches"], r["foreground"]) for r in _records(f)] for f in (whole, broken)]
    assert rows[0] == rows[1]


def _tensors(state) -> list[torch.Tensor]:
    return [t for v in state.values() for t in (_tensors(v) if isinstance(v, dict) else [v])]


def _records(folder: Path) -> list[dict]:
    import json

    return [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]


def test_teacher_follows_the_closed_form(build):
    trainer = build("MeanTeacherTrainer", settings={"ema_decay": 0.6})
    expected = [p.detach().clone() for p in trainer.network.parameters()]
    for step in range(4):
        run_steps(trainer, 1)
        alpha = min(1 - 1 / (step + 1), 0.6)
        expected = [
            alpha * e + (1 - alpha) * p.detach() for e, p in zip(expected, trainer.network.parameters(), strict=True)
        ]
    for e, t in zip(expected, trainer.teacher.parameters(), strict=True):
        assert torch.allclose(e, t, atol=1e-6)
    assert not any(p.requires_grad or p.grad is not None for p in trainer.teacher.parameters())


def test_batches_of_the_control_and_of_a_method_are_equal(build):
    a, b = next(build("SupervisedTrainer").dataloader_train), next(build("CPSTrainer").dataloader_train)
    assert torch.equal(a["data"], b["data"])
    assert a["keys"] == b["keys"]
    assert "unlabeled" not in a
    assert not any("target" in key or "label" in key for key in b["unlabeled"])


def test_steps_do_not_depend_on_what_ran_before(build):
    first, second = build("DiffCLTrainer"), build("DiffCLTrainer")
    batch = next(first.dataloader_train)
    seed_everything(99, 0, Stream.SAMPLING, 5)
    torch.randn(100)
    assert first.train_step(batch) == second.train_step(next(second.dataloader_train))


def test_no_unlabeled_case_runs_as_supervised_and_says_so(build, toy, capsys):
    method = build("DiffCLTrainer", start=False)
    method.initialize()
    original = type(method).do_split

    def without_pool(self):
        result = original(self)
        self.unlabeled_ids = []
        return result

    method.do_split = without_pool.__get__(method)
    method.dataloader_train, method.dataloader_val = method.get_dataloaders()
    assert "no unlabeled case" in capsys.readouterr().out
    method.set_deep_supervision_enabled(True)
    assert all(np.isfinite(v) for v in run_steps(method, 1)[0].values())


def test_the_log_says_when_a_plan_was_made_for_less_memory(build):
    trainer = build("DiffCLTrainer", start=False)
    assert "-tr DiffCLTrainer" in memory_note(trainer)
    trainer.plans_manager.plans["nnssl"]["planning"]["memory_factor"] = TRAINERS["DiffCLTrainer"].memory_factor
    assert memory_note(trainer) is None
    assert memory_note(build("SupervisedTrainer", start=False)) is None


def relabeled(settings, name, labels, order=None):
    """Return an initialized 2D trainer of the toy data set with other labels."""
    settings = {**settings.get(name, {}), **SMALL.get(name, {})}
    plans, dataset_json = read_plans(Job("901", "2d", "all", name, "toy2d", settings=settings))
    dataset_json |= {"labels": labels} | ({"regions_class_order": order} if order else {})
    trainer = trainer_class(name)(plans, "2d", "all", dataset_json, torch.device("cpu"))
    trainer.initialize()
    trainer.set_deep_supervision_enabled(True)
    return trainer


@pytest.mark.parametrize("name", ALL)
def test_ignored_voxels_and_regions_train(toy, results, toy_settings, name):
    """Labels 0, 1 and 2 = ignored, or 2 inside 1 as regions: finite losses of the whole method, and fractions."""
    image = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(2, 1, 32, 32, dtype=torch.int16)
    label[:, :, :8], label[:, :, 8:16] = 1, 2
    unlabeled = {"weak": image[2:], "strong": image[2:], "valid": torch.ones(2, 1, 32, 32, dtype=torch.bool)}
    ignoring = {"background": 0, "box": 1, "ignore": 2}, None, label, 8 / 24
    nested = {"background": 0, "whole": [1, 2], "ball": 2}, [1, 2], torch.cat([label > 0, label == 2], 1), 16 / 32
    masks = torch.cat([label == 1, label > 2, label == 2], 1)  # nnU-Net puts the ignore mask last
    both = {"background": 0, "whole": [1, 2], "ball": 2, "ignore": 3}, [1, 2], masks, 8 / 24
    for labels, order, target, fraction in (ignoring, nested, both):
        if order and not trainer_class(name).supports_regions:
            with pytest.raises(UserError, match="exclusive classes"):
                relabeled(toy_settings, name, labels, order)
            continue
        trainer = relabeled(toy_settings, name, labels, order)
        scales = trainer._get_deep_supervision_scales()
        steps = [round(1 / scale[0]) for scale in scales or []]
        lower = [target[..., ::n, ::n] for n in steps]
        batch = {"data": image[:2], "target": lower or target, "keys": ["lab0", "lab1"]}
        if trainer.labeled_weak_view:
            batch["weak"] = image[:2]
        if trainer.uses_unlabeled:
            batch["unlabeled"] = {**unlabeled, "keys": ["un0", "un1"]}
        scalars = trainer.train_step(batch)
        assert all(np.isfinite(v) for v in scalars.values())
        unsupervised = [n for n in scalars if n.startswith("loss_") and "supervised" not in n]
        assert bool(unsupervised) == (name != "SupervisedTrainer")
        if name == "FixMatchTrainer":
            assert scalars["kept"] == 1
        assert trainer.watch.report()["labeled"] == pytest.approx(fraction)


def test_results_are_cleaned_of_scratch(toy, results):
    """A finished run leaves the final checkpoint and its records, nothing temporary."""
    assert train.main(train_argv(toy, "SupervisedTrainer")) == 0
    fold = results / toy.raw.name / "SupervisedTrainer__toy2d__2d" / "fold_all"
    names = {p.name for p in fold.iterdir()}
    assert {"checkpoint_final.pth", "progress.jsonl", "progress.csv", "progress.png", "losses.png"} <= names
    assert "checkpoint_latest.pth" not in names
    assert not [n for n in names if n.endswith(".tmp")]
    shutil.rmtree(fold)
