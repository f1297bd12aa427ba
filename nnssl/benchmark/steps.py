"""Cost of a training step: time ratio and FLOP ratio of methods to the supervised control, in one process."""

from __future__ import annotations

import argparse
import contextlib
import statistics
from typing import Any

from nnssl.benchmark.timing import interleaved, summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the step benchmark."""
    parser.add_argument("dataset", help="preprocessed data set, id or name")
    parser.add_argument("configuration", help="2d, 3d_fullres, ...")
    parser.add_argument("-p", default="nnUNetPlans", help="plans identifier")
    parser.add_argument("-tr", nargs="+", default=["DiffCLTrainer"], help="methods to compare with SupervisedTrainer")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the methods")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps of each side (default %(default)s)")
    parser.add_argument("-device", default="cpu")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time interleaved steps on one fixed batch and count the FLOPs of one step each."""
    from nnssl.cli.train import parse_settings
    from nnssl.training.allocator import kept_memory

    sides = {}
    for name in ["SupervisedTrainer", *args.tr]:
        settings = parse_settings(args.set) if name != "SupervisedTrainer" else {}
        sides[name] = PreparedStep(args.dataset, args.configuration, args.p, name, settings, args.device)
    with kept_memory() if args.device == "cpu" else contextlib.nullcontext():  # as nnssl_train does
        seconds = interleaved({name: side.step for name, side in sides.items()}, args.repeats, warmup=2)
    flops = {name: side.count_flops() for name, side in sides.items()}
    control = statistics.median(seconds["SupervisedTrainer"])
    rows = []
    for name in sides:
        # the ratio of neighbors in time is robust against a machine whose load changes
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["SupervisedTrainer"], strict=True))
        flop_ratio = flops[name] / flops["SupervisedTrainer"]
        rows.append(
            {
                "trainer": name,
                "seconds": summary(seconds[name]),
                "gflop": flops[name] / 1e9,
                "time_ratio": ratio,
                "time_ratio_of_medians": statistics.median(seconds[name]) / control,
                "flop_ratio": flop_ratio,
                "time_per_flop_ratio": ratio / flop_ratio,
            }
        )
    return {"dataset": args.dataset, "configuration": args.configuration, "repeats": args.repeats, "rows": rows}


class PreparedStep:
    """A trainer in the middle of its run with one batch in memory; nothing of it is kept."""

    def __init__(self, dataset: str, configuration: str, plans: str, trainer: str, settings: dict, device: str) -> None:
        from nnssl.benchmark.trainers import prepared_trainer
        from nnssl.trainers.launch import Job

        job = Job(dataset, configuration, trainer=trainer, plans=plans, settings=settings, device=device)
        self.trainer, self.folder = prepared_trainer(job)
        self.trainer.dataloader_train, self.trainer.dataloader_val = self.trainer.get_dataloaders()
        self.batch = next(self.trainer.dataloader_train)
        self.trainer.close_loaders()
        self.trainer.set_deep_supervision_enabled(self.trainer.enable_deep_supervision)
        self.trainer.network.train()
        self.trainer.global_step = self.trainer.run_options.total_steps // 2

    def step(self) -> None:
        """Run one training step on the batch."""
        self.trainer.train_step(self.batch)
        if self.trainer.device.type == "cuda":
            import torch

            torch.cuda.synchronize()

    def count_flops(self) -> int:
        """Return the floating point operations of one step (convolutions and matrix products, both directions)."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self.step()
        return counter.get_total_flops()
