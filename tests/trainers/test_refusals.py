"""nnssl_train refuses in one line with exit code 2, names what is allowed, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from nnssl.cli import train
from nnssl.errors import UserError
from nnssl.trainers.launch import require_devices
from nnssl.training.checkpoints import load_safely, save_atomically

SMALL = ["-device", "cpu", "--epochs", "1", "--iterations_per_epoch", "1"]


def refused(capsys, argv: list[str], *words: str) -> None:
    """Assert exit code 2, one line on stderr that starts with the command, and the given words in it."""
    capsys.readouterr()
    assert train.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("nnssl_train: error: "), error
    assert "\n" not in error
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["999", "2d", "-p", "toy2d"], ("'999'", "Dataset901_Toy")),
        (["901", "3d", "-p", "toy2d"], ("configuration", "2d")),
        (["901", "2d", "-p", "toy"], ("plan", "toy2d")),
        (["901", "2d", "7", "-p", "toy2d"], ("fold", "0, 1")),
        (["901", "2d", "first", "-p", "toy2d"], ("fold", "first")),
        (["901", "2d", "-p", "toy2d", "-tr", "DiffCL"], ("DiffCLTrainer",)),
        (["901", "2d", "-p", "toy2d", "--set", "etaa=1"], ("'etaa'", "eta")),
        (["901", "2d", "-p", "toy2d", "--set", "eta"], ("KEY=VALUE",)),
        (["901", "2d", "-p", "toy2d", "--set", "eta=-1"], ("eta", "0 to inf")),
        (["901", "2d", "-p", "toy2d", "--run", "a__b"], ("--run", "a__b")),
        (["901", "2d", "-p", "toy2d", "--preset", "diffcl_la5"], ("diffcl_la4",)),
        (["901", "2d", "-p", "toy2d", "--precision", "fp8"], ("bf16",)),
        (["901", "2d", "-p", "toy2d", "--c"], ("--c", "checkpoint")),
        (["901", "2d", "-p", "toy2d", "-num_gpus", "2"], ("-num_gpus",)),
    ],
)
def test_wrong_words_are_refused(toy, results, capsys, argv, words):
    refused(capsys, [*argv, *SMALL] if "--c" not in argv else [*argv, "-device", "cpu"], *words)
    assert not list(results.glob("**/*.pth"))


def test_unset_variables_are_refused(toy, results, capsys, monkeypatch):
    monkeypatch.delenv("nnUNet_preprocessed")
    refused(capsys, ["901", "2d", "-p", "toy2d", *SMALL], "nnUNet_preprocessed", "export")


@pytest.fixture
def finished(toy, results):
    """A finished run of one step."""
    assert train.main(["901", "2d", "-p", "toy2d", "-tr", "SupervisedTrainer", *SMALL]) == 0
    return results / toy.raw.name / "SupervisedTrainer__toy2d__2d" / "fold_all"


def test_a_finished_run_is_not_overwritten(finished, capsys):
    before = (finished / "checkpoint_final.pth").read_bytes()
    refused(capsys, ["901", "2d", "-p", "toy2d", "-tr", "SupervisedTrainer", *SMALL], "never overwritten", "--run")
    assert (finished / "checkpoint_final.pth").read_bytes() == before


def test_continuing_another_methods_checkpoint_is_refused(finished, results, toy, capsys):
    other = results / toy.raw.name / "MeanTeacherTrainer__toy2d__2d" / "fold_all"
    shutil.copytree(finished, other)
    refused(capsys, ["901", "2d", "-p", "toy2d", "-tr", "MeanTeacherTrainer", "--c", "-device", "cpu"], "trainer")


@pytest.mark.parametrize("what", ["features", "batch_size", "patch_size"])
def test_continuing_another_plans_checkpoint_is_refused(finished, toy, capsys, what):
    plan = toy.preprocessed / "toy2d.json"
    original = plan.read_text()
    changed = json.loads(original)
    planned = changed["configurations"]["2d"]
    if what == "features":
        planned["architecture"]["arch_kwargs"]["features_per_stage"][0] = 6
    else:
        planned[what] = {"batch_size": 3, "patch_size": [32, 64]}[what]
    try:
        plan.write_text(json.dumps(changed))
        argv = ["901", "2d", "-p", "toy2d", "-tr", "SupervisedTrainer", "--c", "-device", "cpu"]
        refused(capsys, argv, "configuration and network", "-p")
    finally:
        plan.write_text(original)


def test_continuing_on_other_unlabeled_cases_is_refused(toy, results, capsys):
    argv = ["901", "2d", "-p", "toy2d", "-tr", "MeanTeacherTrainer"]
    assert train.main([*argv, *SMALL]) == 0
    final = results / toy.raw.name / "MeanTeacherTrainer__toy2d__2d" / "fold_all" / "checkpoint_final.pth"
    content = load_safely(final)
    content["current_epoch"] = content["nnssl"]["global_step"] = 0
    content["nnssl"]["unlabeled_manifest"] = "0" * 64
    save_atomically(content, final.with_name("checkpoint_latest.pth"))
    final.unlink()
    refused(capsys, [*argv, "--c", "-device", "cpu"], "unlabeled cases", "--run")


def test_devices_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    require_devices("cuda", 1)
    require_devices("cpu", 1)
    for device, count in (("cuda", 2), ("cpu", 2)):
        with pytest.raises(UserError, match="-num_gpus"):
            require_devices(device, count)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="-device cuda"):
        require_devices("cuda", 1)


def test_a_contradicting_setting_beside_c_is_refused_and_an_agreeing_one_is_not(finished, capsys):
    argv = ["901", "2d", "-p", "toy2d", "-tr", "SupervisedTrainer", "--c", "-device", "cpu"]
    refused(capsys, [*argv, "--set", "momentum=0.5"], "momentum=0.5", "0.99")
    refused(capsys, [*argv, "--seed", "3"], "seed=3")
    assert train.main([*argv, "--set", "momentum=0.99", "--seed", "0"]) == 0


def test_a_checkpoint_older_than_a_setting_continues(finished):
    content = load_safely(finished / "checkpoint_final.pth")
    del content["nnssl"]["settings"]["lr_schedule"], content["nnssl"]["run"]["precision"]
    save_atomically(content, finished / "checkpoint_final.pth")
    assert train.main(["901", "2d", "-p", "toy2d", "-tr", "SupervisedTrainer", "--c", "-device", "cpu"]) == 0


def test_an_unsafe_checkpoint_is_refused(finished, capsys):
    content = load_safely(finished / "checkpoint_final.pth")
    content["logging"]["x"] = torch.nn.Linear(1, 1)
    torch.save(content, finished / "checkpoint_final.pth")
    argv = ["901", "2d", "-p", "toy2d", "-tr", "SupervisedTrainer", "--c", "-device", "cpu"]
    refused(capsys, argv, "weights only")


def test_a_fold_with_another_network_than_its_siblings_is_refused(toy, results, capsys):
    small = ["--set", "q=64", "k=4"]
    argv = ["901", "2d", "0", "-p", "toy2d", "-tr", "DiffCLTrainer", *SMALL]
    folder = results / toy.raw.name / "DiffCLTrainer__toy2d__2d"
    assert train.main(["901", "2d", "-p", "toy2d", "-tr", "DiffCLTrainer", *SMALL, *small]) == 0
    refused(capsys, [*argv, *small, "hfm=false"], "share their network", str(folder))


def test_a_results_folder_that_cannot_be_written_is_refused(toy, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "file" / "results"))
    refused(capsys, ["901", "2d", "-p", "toy2d", "-tr", "SupervisedTrainer", *SMALL], "results folder")


def test_a_disk_that_fills_up_while_training_ends_with_one_line(toy, results, capsys, monkeypatch):
    import errno

    def full(content, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    argv = ["901", "2d", "-p", "toy2d", "-tr", "SupervisedTrainer", *SMALL]
    capsys.readouterr()
    assert train.main(argv) == 2
    assert "No space left" in capsys.readouterr().err


def test_stale_preprocessed_data_are_refused(toy, results, capsys):
    manifest = toy.preprocessed / "nnssl_unlabeled.json"
    original = manifest.read_text()
    changed = json.loads(original)
    for entry in changed["configurations"].values():
        entry["preprocessing_hash"] = "0" * 64
    try:
        manifest.write_text(json.dumps(changed))
        refused(capsys, ["901", "2d", "-p", "toy2d", *SMALL], "nnssl_plan_and_preprocess")
    finally:
        manifest.write_text(original)


def test_pretrained_weights_start_the_network_and_must_fit(finished, toy, results, capsys, tmp_path):
    source = str(finished / "checkpoint_final.pth")
    argv = ["901", "2d", "-p", "toy2d", "-tr", "MeanTeacherTrainer", *SMALL]
    assert train.main([*argv, "--run", "warm", "-pretrained_weights", source]) == 0
    assert "pretrained weights:" in capsys.readouterr().out
    save_atomically({"network_weights": {"other": torch.zeros(1)}}, tmp_path / "other.pth")
    refused(capsys, [*argv, "--run", "wrong", "-pretrained_weights", str(tmp_path / "other.pth")], "must fit")


def test_dropout_reaches_the_planned_network_of_every_method(build):
    for name in ("SupervisedTrainer", "DiffCLTrainer"):
        trainer = build(name, settings={"dropout": 0.2}, start=False)
        kwargs = trainer.configuration_manager.configuration["architecture"]["arch_kwargs"]
        assert kwargs["dropout_op_kwargs"] == {"p": 0.2}
    plain = build("SupervisedTrainer", start=False).configuration_manager.configuration["architecture"]["arch_kwargs"]
    assert plain["dropout_op"] is None


def test_dropout_of_a_network_that_is_not_planned_is_refused(build):
    with pytest.raises(UserError, match="option of the planned network"):
        build("DiffCLTrainer", settings={"dropout": 0.2, "network": "vnet", "deep_supervision": False}, start=False)


def test_a_weight_that_switches_the_method_off_is_warned_of(build, capsys):
    for weight in (1, 0):
        trainer = build("MeanTeacherTrainer", settings={"unsupervised_weight": weight})
        trainer.on_train_start()
        assert ("switches the unsupervised terms" in capsys.readouterr().out) == (weight == 0)
