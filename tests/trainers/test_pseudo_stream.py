"""Laws of masks of unknown quality in training, for every trainer."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nnssl_test_tools import nnunet_variables, on_two_processes, same, toy_case, weights, write_nifti

from nnssl.errors import UserError
from nnssl.plans.manifest import load_manifest, save_manifest
from nnssl.trainers import base
from nnssl.trainers.launch import Job, read_plans
from nnssl.trainers.recording import write_run_manifest
from nnssl.trainers.registry import TRAINERS, trainer_class

UNSURE, MASKED = 3, ("un0", "un1", "un2")
BOTH = {"supervision": "gt+pseudo"}


@pytest.fixture(scope="session")
def noisy_root(toy, tmp_path_factory) -> Path:
    """The toy data set with masks for three of its four unlabeled cases, preprocessed for 2d. Not to be changed."""
    from nnssl.cli import plan_and_preprocess

    root = tmp_path_factory.mktemp("noisy")
    for part in ("raw", "preprocessed"):
        shutil.copytree(toy.root / part, root / part)
    raw = root / "raw" / toy.raw.name
    for i, case in enumerate(MASKED):
        mask = toy_case(100 + i)[1]
        mask[:, :14] = UNSURE
        write_nifti(raw / "labelsPseudo" / f"{case}.nii.gz", mask)
    seen = load_manifest(toy.preprocessed)["labeled"]
    record = {"version": 1, "ignore": UNSURE, "saw": {"trained": seen}, "cases": {"un2": {"weight": 0}}}
    (raw / "labelsPseudo" / "nnssl_pseudo.json").write_text(json.dumps(record))
    with nnunet_variables(root):
        argv = ["-d", "901", "-np", "1", "-c", "2d", "-overwrite_plans_name", "toy2d"]
        assert plan_and_preprocess.main(argv) == 0
    return root


@pytest.fixture
def noisy(noisy_root, toy, results, monkeypatch) -> Path:
    """Point nnU-Net's variables at the data set with masks; return its preprocessed folder."""
    for name in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{name}", str(noisy_root / name))
    return noisy_root / "preprocessed" / toy.raw.name


@pytest.fixture
def own(noisy_root, toy, results, tmp_path, monkeypatch) -> Path:
    """As ``noisy``, but a copy that a test may change."""
    shutil.copytree(noisy_root / "preprocessed", tmp_path / "preprocessed")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    return tmp_path / "preprocessed" / toy.raw.name


def change_source(folder: Path, **content) -> None:
    manifest = load_manifest(folder)
    manifest["pseudo_source"].update(content)
    save_manifest(folder, manifest)


def run_steps(trainer, count: int) -> list[dict[str, float]]:
    return [trainer.train_step(next(trainer.dataloader_train)) for _ in range(count)]


@pytest.mark.parametrize("name", sorted(TRAINERS))
@pytest.mark.parametrize("supervision", ["gt+pseudo", "pseudo"])
def test_every_trainer_learns_from_masks(noisy, build, name, supervision):
    trainer = build(name, settings={"supervision": supervision, "pseudo_batch": 3})
    before = weights(trainer.network)
    batch = next(trainer.dataloader_train)
    scalars = trainer.train_step(batch)
    assert all(np.isfinite(v) for v in scalars.values()), scalars
    assert not same(before, weights(trainer.network))
    drawn = batch["pseudo"]["keys"] if supervision == "gt+pseudo" else batch["keys"]
    assert set(drawn) <= {"un0", "un1"}  # un2 has weight 0
    if supervision == "gt+pseudo":
        assert len(batch["pseudo"]["weight"]) == 3
        assert set(batch["keys"]) <= {"lab0", "lab1"}
        assert abs(scalars["loss_pseudo"]) > 0
    else:
        assert "pseudo" not in batch


def test_validation_and_monitoring_stay_with_real_labels(noisy, build):
    trainer = build("SupervisedTrainer", settings={"supervision": "pseudo"})
    assert set(next(trainer.dataloader_val)["keys"]) <= {"lab0", "lab1"}
    assert set(trainer.monitor.batch_at(0)["keys"]) == {"val0"}
    assert np.isfinite(trainer.validation_step(next(trainer.dataloader_val))["loss"])


@pytest.mark.parametrize("name", ["SupervisedTrainer", "MeanTeacherTrainer"])
def test_labels_alone_are_as_if_there_were_no_masks(toy, build, noisy_root, results, monkeypatch, name):
    plain = build(name)
    run_steps(plain, 3)
    for part in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{part}", str(noisy_root / part))
    warnings = []
    monkeypatch.setattr(base.SemiSupervisedTrainer, "warn", lambda trainer, text: warnings.append(text))
    beside, both = build(name), build(name, settings=BOTH)
    assert not warnings
    silent = build(name, settings={**BOTH, "pseudo_weight": 0})
    assert "pseudo_weight=0" in warnings[0]
    for trainer in (beside, silent, both):
        run_steps(trainer, 3)
    assert same(weights(plain.network), weights(beside.network))
    assert same(weights(plain.network), weights(silent.network))
    assert not same(weights(plain.network), weights(both.network))


def test_the_third_term_adds_to_the_step_with_its_weight(noisy, build):
    """One SGD step without momentum is linear in the gradients: control + w x (effect of the masks alone)."""
    plain = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "gradient_clip": 1e9}
    moves = {}
    for key, settings in {"gt": {}, "half": {**BOTH, "pseudo_weight": 0.5}, "whole": BOTH}.items():
        trainer = build("SupervisedTrainer", settings={**plain, **settings})
        before = weights(trainer.network)
        run_steps(trainer, 1)
        moves[key] = torch.cat(
            [(b - a).flatten().double() for a, b in zip(before, weights(trainer.network), strict=True)]
        )
    half, whole = moves["half"] - moves["gt"], moves["whole"] - moves["gt"]
    assert whole.norm() > 1e-3
    assert (whole - 2 * half).norm() < 1e-3 * whole.norm()


@pytest.mark.parametrize("supervision", ["gt+pseudo", "pseudo"])
def test_unsure_voxels_give_no_gradient_and_their_logits_no_loss(noisy, build, supervision):
    trainer = build("SupervisedTrainer", settings={"supervision": supervision})
    batch = next(trainer.dataloader_train)
    target = batch["pseudo"]["target"] if supervision == "gt+pseudo" else batch["target"]
    loss = trainer.pseudo_loss if supervision == "gt+pseudo" else trainer.supervised_loss
    output = [torch.randn(len(t), 3, *t.shape[2:], requires_grad=True) for t in target]
    value = loss(output, target)
    value.backward()
    unsure = [(t == UNSURE).expand_as(o) for t, o in zip(target, output, strict=True)]
    assert 0 < unsure[0].float().mean() < 1
    for logits, mask in zip(output[:-1], unsure[:-1], strict=True):  # nnU-Net's lowest resolution has weight 0
        assert (logits.grad[mask] == 0).all()
        assert (logits.grad[~mask] != 0).any()
    poisoned = [o.detach().where(~m, 50.0) for o, m in zip(output, unsure, strict=True)]
    assert torch.equal(loss(poisoned, target), value.detach())


def test_a_crop_without_a_sure_voxel_leaves_the_network_alone(noisy, build):
    trainer = build("SupervisedTrainer", settings=BOTH)
    output = [torch.randn(1, 3, 8, 8, requires_grad=True), torch.randn(1, 3, 4, 4, requires_grad=True)]
    value = trainer.pseudo_loss(output, [torch.full((1, 1, n, n), UNSURE) for n in (8, 4)])
    value.backward()
    assert torch.isfinite(value)
    assert (output[0].grad == 0).all()


def test_save_load_and_the_next_step_are_identical_and_other_masks_are_refused(own, build, tmp_path):
    first = build("MeanTeacherTrainer", settings=BOTH)
    run_steps(first, 3)
    first.save_checkpoint(str(tmp_path / "state.pth"))
    stored = torch.load(tmp_path / "state.pth", weights_only=True)["nnssl"]["pseudo_manifest"]
    assert stored == first.pseudo_hash is not None

    def load():
        trainer = build("MeanTeacherTrainer", settings=BOTH, start=False)
        trainer.load_checkpoint(str(tmp_path / "state.pth"))
        return trainer

    second = load()
    second.dataloader_train, second.dataloader_val = second.get_dataloaders()
    second.set_deep_supervision_enabled(second.enable_deep_supervision)
    second.network.train()
    assert run_steps(first, 2) == run_steps(second, 2)
    assert same(weights(first.network), weights(second.network))
    change_source(own, weights={"un0": 1.0, "un1": 0.5, "un2": 0})
    with pytest.raises(UserError, match="masks of labelsPseudo the run began with"):
        load().on_train_start()


def test_a_run_needs_masks_in_its_fold(toy, results, build, own, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(toy.root / "preprocessed"))
    with pytest.raises(UserError, match=r"supervision=gt\+pseudo needs .* nnssl_pseudo_label"):
        build("SupervisedTrainer", settings=BOTH)
    monkeypatch.setenv("nnUNet_preprocessed", str(own.parent))
    splits = json.loads((own / "splits_final.json").read_text())
    (own / "splits_final.json").write_text(json.dumps([{**split, "unlabeled": ["un3"]} for split in splits]))
    with pytest.raises(UserError, match="none for fold 0"):
        build("SupervisedTrainer", settings=BOTH, fold=0)


def test_masks_of_a_model_that_saw_a_held_out_case_are_refused(own, build):
    labeled = load_manifest(own)["labeled"]
    split = json.loads((own / "splits_final.json").read_text())[0]
    (val,), (train,) = split["val"], split["train"]
    with pytest.raises(UserError, match=f"val of fold 0/{val} .trained as {val}"):
        build("SupervisedTrainer", settings=BOTH, fold=0)
    change_source(own, saw={"trained": {train: labeled[train]}, "watched": {"anonymous": labeled[val]}})
    with pytest.raises(UserError, match="watched as anonymous"):
        build("SupervisedTrainer", settings=BOTH, fold=0)
    change_source(own, saw={"trained": {train: labeled[train]}})
    assert build("SupervisedTrainer", settings=BOTH, fold=0).pseudo_ids == list(MASKED)
    monitored = load_manifest(own)["monitoring"]["val0"]
    change_source(own, saw={"trained": {"x": monitored}})
    with pytest.raises(UserError, match="imagesVal/val0"):
        build("SupervisedTrainer", settings=BOTH)
    assert build("SupervisedTrainer").pseudo_ids == []  # labels alone do not touch the masks


@pytest.mark.parametrize("supervision", ["gt", "gt+pseudo", "pseudo"])
def test_a_run_records_what_it_saw(noisy, build, supervision):
    trainer = build("SupervisedTrainer", settings={"supervision": supervision}, fold="all")
    Path(trainer.output_folder).mkdir(parents=True, exist_ok=True)
    write_run_manifest(trainer)
    record = json.loads(Path(trainer.output_folder, "nnssl_run.json").read_text())
    labeled = load_manifest(noisy)["labeled"]
    assert record["labeled"] == ({} if supervision == "pseudo" else labeled)
    assert record["watched"] == labeled
    assert record["inherited"] == ({} if supervision == "gt" else labeled)
    assert ("pseudo" in record) == (supervision != "gt")


def test_what_an_unknown_model_saw_stays_unknown(own, build):
    change_source(own, saw=None)
    assert build("SupervisedTrainer", settings=BOTH).saw["inherited"] is None
    assert build("SupervisedTrainer").saw["inherited"] == {}


def with_regions(labels: dict) -> dict:
    return {"labels": labels, "regions_class_order": [1, 2]}


def make_on(build, change: dict):
    """Build a trainer whose dataset.json has other labels."""
    plans, dataset_json = read_plans(Job("901", "2d", "all", "SupervisedTrainer", "toy2d", settings=BOTH))
    dataset_json = {**copy.deepcopy(dataset_json), **change}
    return trainer_class("SupervisedTrainer")(plans, "2d", "all", dataset_json, torch.device("cpu"))


def test_regions_need_an_ignore_label(noisy, build):
    with pytest.raises(UserError, match="ignore label where a data set has regions"):
        make_on(build, with_regions({"background": 0, "whole": [1, 2], "ball": 2}))


def test_regions_ignore_unsure_voxels(noisy, build):
    trainer = make_on(build, with_regions({"background": 0, "whole": [1, 2], "ball": 2, "ignore": UNSURE}))
    trainer.initialize()
    trainer.oversample_foreground_percent = 1.0  # the toy data were preprocessed without an ignore label
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    pseudo = next(trainer.dataloader_train)["pseudo"]
    trainer.close_loaders()
    assert pseudo["target"][0].shape[1] == 3  # two regions and the mask of ignored voxels
    unsure = pseudo["target"][0][:, 2:].bool()
    assert 0 < unsure.float().mean() < 1
    output = [torch.randn(len(t), 2, *t.shape[2:], requires_grad=True) for t in pseudo["target"]]
    trainer.pseudo_loss(output, pseudo["target"]).backward()
    assert (output[0].grad[unsure.expand_as(output[0])] == 0).all()
    assert (output[0].grad[~unsure.expand_as(output[0])] != 0).any()


def test_ranks_share_the_items_of_the_third_stream(noisy, build, monkeypatch):
    trainer = build("SupervisedTrainer", settings={**BOTH, "pseudo_batch": 6})
    trainer.is_ddp = True
    monkeypatch.setattr(base.dist, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(base.dist, "get_rank", lambda rank=rank: rank)
        assert trainer.pseudo_batch_size() == 2
    monkeypatch.setattr(base.dist, "get_world_size", lambda: 4)
    with pytest.raises(UserError, match=r"as many items of the pseudo batch.*6 for 4 processes"):
        trainer.pseudo_batch_size()
    with pytest.raises(UserError, match="as many items of the labeled batch"):
        trainer._require_even("labeled", 2)
    trainer.configuration_manager.configuration["batch_dice"] = False
    monkeypatch.setattr(base.dist, "get_rank", lambda: 3)
    assert trainer.pseudo_batch_size() == 1
    monkeypatch.setattr(base.dist, "get_world_size", lambda: 7)
    with pytest.raises(UserError, match="pseudo batch must give every process an item"):
        trainer.pseudo_batch_size()
    trainer.is_ddp = False


def test_two_processes_learn_the_same_from_different_masks(noisy, tmp_path):
    names = {"SupervisedTrainer": {}, "MeanTeacherTrainer": {"unlabeled_batch": 2}, "ProtoDiffTrainer": {}}
    noisy_too = {name: {**settings, **BOTH, "pseudo_batch": 4} for name, settings in names.items()}
    (tmp_path / "plain").mkdir()
    on_two_processes("gloo_step.py", "toy2d", str(tmp_path), json.dumps(noisy_too))
    on_two_processes("gloo_step.py", "toy2d", str(tmp_path / "plain"), json.dumps(names))
    for name in names:
        a, b = (torch.load(tmp_path / f"{name}.rank{rank}.pt", weights_only=True) for rank in (0, 1))
        assert len(a["pseudo"]) == len(b["pseudo"]) == 2
        assert not torch.equal(a["pseudo"], b["pseudo"])
        plain = torch.load(tmp_path / "plain" / f"{name}.rank0.pt", weights_only=True)
        assert plain["pseudo"] is None
        moved = [*a["weights"]["network"].values()]
        assert same(moved, [*b["weights"]["network"].values()])
        assert not same(moved, [*plain["weights"]["network"].values()])
