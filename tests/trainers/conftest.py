"""Trainers on the toy data set."""

from __future__ import annotations

import copy

import pytest
import torch

from nnssl.trainers.launch import Job, read_plans
from nnssl.trainers.registry import trainer_class

#: Small parts, so that a step takes milliseconds.
TOY_SETTINGS = {
    "ACISISTrainer": {"window": 2},
    "AdshTrainer": {"threshold": 0.4, "window": 2},
    "BCPTrainer": {"pretrain": 0.0},
    "CLDTrainer": {"bank_every": 2},
    "DSTTrainer": {"threshold": 0.4},
    "DePLTrainer": {"threshold": 0.4},
    "DiffCLTrainer": {"q": 512, "k": 8, "p": 32, "projection_dim": 8, "bank_capacity": 64, "trust": False},
    "DiffRectTrainer": {"pl_threshold": 0, "rect_start": 0, "rectifier_width": 4},
    "FixMatchTrainer": {"threshold": 0.4},
    "INCLTrainer": {"tokens": 64, "dim": 16},
    "SASSNetTrainer": {"adversary_width": 4},
}


@pytest.fixture
def toy_settings():
    """Return settings of small parts, by trainer."""
    return TOY_SETTINGS


@pytest.fixture
def build(toy, results):
    """Return a function that builds an initialized trainer with its loaders, at a given step."""
    made = []

    def make(name, configuration="2d", settings=None, options=None, start=True, fold="all"):
        settings = {**TOY_SETTINGS.get(name, {}), **(settings or {})}
        options = {"epochs": 2, "iterations_per_epoch": 4, **(options or {})}
        job = Job("901", configuration, fold, name, toy.plans[configuration], settings=settings, options=options)
        plans, dataset_json = read_plans(job)
        trainer = trainer_class(name)(plans, configuration, fold, copy.deepcopy(dataset_json), torch.device("cpu"))
        if start:
            trainer.initialize()
            trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
            trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
            trainer.network.train()
        made.append(trainer)
        return trainer

    yield make
    for trainer in made:
        trainer.close_loaders()
