"""Dice of every branch of a trained model on the watched patches, under settings that only its branches read.

The first row has the checkpoint's own settings; each ``--also`` adds one with some of them changed, such as the steps
of a sampler. Weights and patches are the same in all rows.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the comparison."""
    parser.add_argument("checkpoint", type=Path, help="checkpoint of nnssl_train")
    parser.add_argument("dataset", help="preprocessed data set with monitoring cases, id or name; may be another one")
    parser.add_argument("-p", default="nnUNetPlans", help="plans identifier")
    parser.add_argument(
        "--also", nargs="+", action="append", default=[], metavar="KEY=VALUE", help="another row, with these settings"
    )
    parser.add_argument("-device", default="cpu")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return the Dice of each branch, and the seconds the round took, for every row."""
    from nnssl.cli.train import parse_settings
    from nnssl.training.checkpoints import load_safely

    checkpoint = load_safely(args.checkpoint)
    rows = []
    for changed in ([], *args.also):
        settings = parse_settings(changed)
        dice, seconds = branch_round(args, checkpoint, settings)
        rows.append({"settings": settings, "dice": dice, "seconds": seconds})
    return {"checkpoint": args.checkpoint.name, "dataset": args.dataset, "rows": rows}


def branch_round(
    args: argparse.Namespace, checkpoint: dict[str, Any], changed: dict[str, Any]
) -> tuple[dict[str, float | None], float]:
    """Return the Dice of each branch by name, and how long the round took, with some settings changed."""
    from nnssl.benchmark.trainers import prepared_trainer
    from nnssl.trainers.launch import Job
    from nnssl.trainers.state import restore_state

    init, extra = checkpoint["init_args"], checkpoint["nnssl"]
    job = Job(
        args.dataset,
        init["configuration"],
        trainer=checkpoint["trainer_name"],
        plans=args.p,
        settings={**extra["settings"], **changed},
        options=extra["run"],
        device=args.device,
    )
    trainer, _folder = prepared_trainer(job)
    restore_state(trainer, checkpoint, args.checkpoint)
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    try:
        trainer.set_deep_supervision_enabled(False)
        started = time.perf_counter()
        return trainer.watched_dice(), time.perf_counter() - started
    finally:
        trainer.close_loaders()
