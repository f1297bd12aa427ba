"""Branches under other sampling settings: same weights, same patches, other samples."""

from __future__ import annotations

import argparse

import pytest

from nnssl.benchmark import branches
from nnssl.errors import UserError
from nnssl.trainers.launch import Job, read_plans
from nnssl.trainers.registry import trainer_class


@pytest.fixture
def checkpoint(toy, results, tmp_path):
    """Return the path of an untrained model's checkpoint, and the Dice its own trainer finds."""
    import torch

    options = {"epochs": 1, "iterations_per_epoch": 2, "seed": 3}
    plans, dataset_json = read_plans(
        Job("901", "2d", trainer="GenericSSLTrainer", plans=toy.plans["2d"], options=options)
    )
    trainer = trainer_class("GenericSSLTrainer")(plans, "2d", "all", dataset_json, torch.device("cpu"))
    trainer.initialize()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    trainer.set_deep_supervision_enabled(False)
    path = tmp_path / "checkpoint_final.pth"
    trainer.save_checkpoint(str(path))
    dice = trainer.watched_dice()
    trainer.close_loaders()
    return path, dice


def compare(toy, path, *words):
    parser = argparse.ArgumentParser()
    branches.add_arguments(parser)
    return branches.run(parser.parse_args([str(path), "901", "-p", toy.plans["2d"], *words]))["rows"]


def test_only_what_is_sampled_changes_with_the_sampler(toy, checkpoint):
    path, dice = checkpoint
    own, again, other = compare(toy, path, "--also", "sampling_steps=2", "--also", "sampling_steps=9", "rs_tau=0.1")
    assert own["dice"] == again["dice"] == dice
    assert other["settings"] == {"sampling_steps": "9", "rs_tau": "0.1"}
    for name in ("network", "difficulty"):
        assert other["dice"][name] == own["dice"][name]
    assert other["dice"]["diffusion"] != own["dice"]["diffusion"]


def test_settings_that_the_method_lacks_are_refused(toy, checkpoint):
    with pytest.raises(UserError, match="steps_of_sampling"):
        compare(toy, checkpoint[0], "--also", "steps_of_sampling=3")
