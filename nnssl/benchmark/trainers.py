"""Trainers for benchmarks: built as nnssl_train builds them, with their files in a folder that goes away."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer
    from nnssl.trainers.launch import Job


def prepared_trainer(job: Job) -> tuple[SemiSupervisedTrainer, tempfile.TemporaryDirectory]:
    """Return an initialized trainer and the folder it logs to, which must live as long."""
    import torch

    from nnssl.trainers.launch import read_plans
    from nnssl.trainers.registry import trainer_class

    folder = tempfile.TemporaryDirectory()
    before = os.environ.get("nnUNet_results")
    os.environ["nnUNet_results"] = folder.name
    try:
        contents, dataset_json = read_plans(job)
        trainer = trainer_class(job.trainer)(contents, job.configuration, "all", dataset_json, torch.device(job.device))
        trainer.initialize()
    finally:
        if before is None:
            del os.environ["nnUNet_results"]
        else:
            os.environ["nnUNet_results"] = before
    return trainer, folder
