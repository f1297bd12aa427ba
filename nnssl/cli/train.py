"""``nnssl_train``: train a semi-supervised (or the control) trainer."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence

from nnssl.cli._common import run_command
from nnssl.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; flags are nnU-Net's where nnU-Net has them."""
    parser = argparse.ArgumentParser(description="Train on labeled and unlabeled cases of a preprocessed data set.")
    parser.add_argument("dataset", help="data set id or name")
    parser.add_argument("configuration", help="2d, 3d_fullres, 3d_lowres")
    parser.add_argument("fold", nargs="?", default="all", help="all (default: every label trains) or a fold number")
    parser.add_argument("-tr", default="DiffCLTrainer", help="trainer, see nnssl_info trainers (default %(default)s)")
    parser.add_argument("-p", default="nnUNetPlans", help="plans identifier (default %(default)s)")
    parser.add_argument("--run", help="name that keeps this run apart (seeds, ablations)")
    parser.add_argument("--preset", help="preset name or JSON file; its train section is applied below --set")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="method settings")
    parser.add_argument("--seed", type=int, help="seed of weights, batches and noise (default 0)")
    parser.add_argument("--epochs", type=int, help="number of epochs (default 120)")
    parser.add_argument("--iterations_per_epoch", type=int, help="iterations an epoch (default 250)")
    parser.add_argument("--precision", help="auto (default: nnU-Net's), fp32, bf16 (faster on recent CPUs)")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard event files")
    parser.add_argument("--c", action="store_true", help="continue from the latest checkpoint")
    parser.add_argument("--val", action="store_true", help="only run the final validation of a finished run")
    parser.add_argument("--val_best", action="store_true", help="with --val: validate checkpoint_best")
    parser.add_argument("--npz", action="store_true", help="save probabilities of the final validation")
    parser.add_argument("--disable_checkpointing", action="store_true", help="write no checkpoint")
    parser.add_argument("-pretrained_weights", help="nnU-Net or nnssl checkpoint to start from")
    parser.add_argument("-num_gpus", type=int, default=1, help="GPUs of this machine (default 1)")
    parser.add_argument("-device", choices=("cuda", "mps", "cpu"), help="default: the best there is")
    return parser


def parse_settings(pairs: Sequence[str]) -> dict[str, str]:
    """Return ``KEY=VALUE`` words as a dictionary."""
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError("--set takes KEY=VALUE", repr(pair), "for example eta=0.01")
        settings[key] = value
    return settings


def execute(args: argparse.Namespace) -> None:
    """Train as asked."""
    from nnssl.trainers.registry import trainer_info

    trainer_info(args.tr)
    if args.fold != "all" and not args.fold.isdigit():
        raise UserError("the fold must be all or a number", repr(args.fold), "all, 0, 1, ...")
    if args.c and (args.val or args.val_best or args.pretrained_weights):
        raise UserError("--c goes alone", "--val, --val_best or -pretrained_weights beside it", None, "choose one")
    names = ("seed", "epochs", "iterations_per_epoch", "precision")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.tensorboard:
        options["tensorboard"] = True
    settings = parse_settings(args.set)
    if args.preset:
        from nnssl.trainers.presets import train_section

        preset_settings, preset_options = train_section(args.preset, args.tr)
        settings, options = preset_settings | settings, preset_options | options
    from nnssl.trainers.launch import Job, best_device, run_job
    from nnssl.training.allocator import kept_memory

    device = args.device or best_device()
    with kept_memory() if device == "cpu" else contextlib.nullcontext():
        run_job(
            Job(
                dataset=args.dataset,
                configuration=args.configuration,
                fold="all" if args.fold == "all" else int(args.fold),
                trainer=args.tr,
                plans=args.p,
                run=args.run,
                settings=settings,
                options=options,
                device=device,
                num_gpus=args.num_gpus,
                continue_training=args.c,
                only_validation=args.val or args.val_best,
                validate_with_best=args.val_best,
                save_probabilities=args.npz,
                disable_checkpointing=args.disable_checkpointing,
                pretrained_weights=args.pretrained_weights,
            )
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``nnssl_train``."""
    return run_command("nnssl_train", build_parser, execute, argv)


if __name__ == "__main__":
    raise SystemExit(main())
