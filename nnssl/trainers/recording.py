"""What a run writes down about itself: one manifest at the start, one record an epoch."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nnssl import __version__
from nnssl.trainers.registry import TRAINERS
from nnssl.training.checkpoints import plain

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer

#: Scalars with this prefix are terms of the objective; the others are figures.
TERM = "loss_"


def write_run_manifest(trainer: SemiSupervisedTrainer) -> None:
    """Write ``nnssl_run.json``: versions, settings, seed, which cases were seen, what is monitored.

    ``labeled`` and ``watched`` hold the content hashes of the cases that trained the model and of those that choose
    ``checkpoint_best``; ``inherited`` those that masks of unknown quality bring along (None: unknown). They travel
    with the model, so that its masks can be kept away from held-out cases.
    """
    record = {
        "nnssl": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": str(trainer.device),
        "threads": torch.get_num_threads(),
        "trainer": type(trainer).__name__,
        "settings": trainer.settings.to_dict(),
        "run": trainer.run_options.to_dict(),
        "unlabeled_manifest": trainer.manifest_hash,
        "unlabeled_cases": len(trainer.unlabeled_ids),
        "monitoring": trainer.monitor_name,
        **trainer.saw,
    }
    if trainer.pseudo_ids:
        record["pseudo"] = {"cases": trainer.pseudo_ids, "digest": trainer.pseudo_hash}
    Path(trainer.output_folder, "nnssl_run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def memory_note(trainer: SemiSupervisedTrainer) -> str | None:
    """Return a line for the log if the trainer takes more memory than its plan was made for, else None."""
    name = type(trainer).__name__
    planned = trainer.plans_manager.plans["nnssl"].get("planning", {}).get("memory_factor") or 1.0
    needed = TRAINERS[name].memory_factor if name in TRAINERS else 1.0
    if needed <= planned:
        return None
    return (
        f"{name} takes about {needed / planned:.1f} times the memory this plan was made for; if it does not fit, plan "
        f"with nnssl_plan_and_preprocess -tr {name}"
    )


def objective(means: dict[str, float]) -> dict[str, float]:
    """Return the terms of the objective among an epoch's means."""
    return {name: value for name, value in means.items() if name.startswith(TERM)}


def epoch_record(
    trainer: SemiSupervisedTrainer, epoch: int, means: dict[str, float], branches: dict[str, float | None]
) -> dict[str, Any]:
    """Return the record of an epoch for ``progress.jsonl``; values that are not finite become None."""
    terms = objective(means)
    validation = trainer.logger.get_value("dice_per_class_or_region", step=-1)
    record = {
        "epoch": epoch,
        "step": trainer.global_step,
        "seconds": round(trainer.epoch_seconds, 2),
        "lr": trainer.learning_rate(),
        "losses": terms,
        "figures": {name: value for name, value in means.items() if name not in terms},
        "validation_dice": {str(i + 1): float(dice) for i, dice in enumerate(validation)},
        "branches": branches,
        "differences": differences(trainer.branch_differences, branches),
        "monitored_on": trainer.monitor_name,
        "foreground": trainer.watch.report(),
    }
    return plain(finite_only(record))


def differences(wanted: dict[str, tuple[str, str]], branches: dict[str, float | None]) -> dict[str, float | None]:
    """Return the wanted differences between branches; None where a branch is missing or has no Dice."""
    pairs = {name: (branches.get(a), branches.get(b)) for name, (a, b) in wanted.items()}
    return {name: None if a is None or b is None else a - b for name, (a, b) in pairs.items()}


def epoch_line(trainer: SemiSupervisedTrainer, record: dict[str, Any]) -> str:
    """Return the epoch in one line, with the time that is left."""
    eta = trainer.epoch_seconds * (trainer.num_epochs - record["epoch"] - 1)
    terms = ", ".join(f"{n[len(TERM) :]} {'-' if v is None else f'{v:.4f}'}" for n, v in record["losses"].items())
    dice = ", ".join(f"{n} {'-' if v is None else f'{v:.3f}'}" for n, v in record["branches"].items())
    gains = "".join(f", {n} {'-' if v is None else f'{v:+.3f}'}" for n, v in record["differences"].items())
    hours, seconds = divmod(round(eta), 3600)
    left = f"{hours}:{seconds // 60:02d}:{seconds % 60:02d}"
    return (
        f"epoch {record['epoch'] + 1}/{trainer.num_epochs}: {terms}; Dice on {record['monitored_on']}: {dice}{gains}; "
        f"{trainer.epoch_seconds:.1f} s, ETA {left} ({time.strftime('%H:%M', time.localtime(time.time() + eta))})"
    )


def finite_only(value: Any) -> Any:
    """Return nested records with values that are not finite replaced by None: JSON knows no NaN."""
    if isinstance(value, dict):
        return {k: finite_only(v) for k, v in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value
