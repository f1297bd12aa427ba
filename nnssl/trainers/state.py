"""What a checkpoint holds, and what it must agree with to be continued."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl import __version__
from nnssl.errors import UserError
from nnssl.trainers.stepping import unwrap
from nnssl.training.checkpoints import plain

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


#: What a plan must not change between a run and its continuation.
PLANNED_ALIKE = ("architecture", "patch_size", "batch_size")


def collect_state(trainer: SemiSupervisedTrainer) -> dict[str, Any]:
    """Return nnU-Net's nine checkpoint keys and one of our own, ``nnssl``, as tensors and plain values.

    No state of a random generator is stored: every draw follows from (seed, rank, step).
    """
    scaler = trainer.grad_scaler
    return plain(
        {
            "network_weights": unwrap(trainer.network).state_dict(),
            "optimizer_state": trainer.optimizer.state_dict(),
            "grad_scaler_state": scaler.state_dict() if scaler is not None else None,
            "logging": trainer.logger.get_checkpoint(),
            "_best_ema": trainer._best_ema,
            "current_epoch": trainer.current_epoch,
            "init_args": {**trainer.my_init_kwargs, "device": str(trainer.device)},
            "trainer_name": type(trainer).__name__,
            "inference_allowed_mirroring_axes": trainer.inference_allowed_mirroring_axes,
            "nnssl": {
                "version": __version__,
                "settings": trainer.settings.to_dict(),
                "run": trainer.run_options.to_dict(),
                "seed": trainer.run_options.seed,
                "global_step": trainer.global_step,
                "epoch_sums": trainer.epoch_sums,
                "epoch_seconds": trainer.epoch_seconds,
                "foreground": trainer.watch.state_dict(),
                "partners": {
                    name: {"weights": unwrap(p.module).state_dict(), "optimizer": p.optimizer.state_dict()}
                    for name, p in trainer.partners.items()
                },
                "teachers": {name: teacher.state_dict() for name, (_, teacher) in trainer.teachers.items()},
                "modules": {name: module.state_dict() for name, module in trainer.modules.items()},
                "unlabeled_manifest": trainer.manifest_hash,
                "pseudo_manifest": trainer.pseudo_hash,
            },
        }
    )


def restore_state(trainer: SemiSupervisedTrainer, checkpoint: dict, path: Path) -> None:
    """Put the state of :func:`collect_state` back into an initialized trainer.

    Raises:
        UserError: if weights do not fit the networks.
    """
    extra = checkpoint["nnssl"]
    try:
        unwrap(trainer.network).load_state_dict(checkpoint["network_weights"])
        trainer.optimizer.load_state_dict(checkpoint["optimizer_state"])
        for name, state in extra["partners"].items():
            unwrap(trainer.partners[name].module).load_state_dict(state["weights"])
            trainer.partners[name].optimizer.load_state_dict(state["optimizer"])
        for name, state in extra["teachers"].items():
            trainer.teachers[name][1].load_state_dict(state)
        for name, state in extra["modules"].items():
            trainer.modules[name].load_state_dict(state)
    except (RuntimeError, KeyError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError("the checkpoint must fit the plan and the method", f"{path}: {first_line}") from error
    if trainer.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
        trainer.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
    trainer.logger.load_checkpoint(checkpoint["logging"])
    trainer._best_ema = checkpoint["_best_ema"]
    trainer.current_epoch = checkpoint["current_epoch"]
    trainer.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
    trainer.global_step = extra["global_step"]
    trainer.epoch_sums, trainer.epoch_seconds = extra["epoch_sums"], extra["epoch_seconds"]
    trainer.watch.load_state_dict(extra["foreground"])
    trainer.manifest_hash = extra["unlabeled_manifest"]
    trainer.pseudo_hash = extra.get("pseudo_manifest")


def require_own(trainer: SemiSupervisedTrainer, checkpoint: dict, path: Path) -> None:
    """Refuse to continue from another method's, plan's, or run's checkpoint.

    Raises:
        UserError: naming what differs.
    """
    here, there = type(trainer).__name__, checkpoint.get("trainer_name")
    if there != here or "nnssl" not in checkpoint:
        rule = "--c must continue a checkpoint of the same trainer"
        raise UserError(rule, f"{path} of {there}", here, "check -tr, or start a new --run")
    init, extra = checkpoint["init_args"], checkpoint["nnssl"]
    theirs = init["plans"]["configurations"][init["configuration"]]
    mine = trainer.plans_manager.plans["configurations"][trainer.configuration_name]
    same = all(plain(theirs.get(key)) == plain(mine.get(key)) for key in PLANNED_ALIKE)
    if init["configuration"] != trainer.configuration_name or not same:
        rule = "--c must continue a checkpoint of the same configuration and network"
        remedy = "check -p and the configuration, or start a new --run"
        raise UserError(rule, f"{path} of another plan", None, remedy)
    for what, old, new in (
        ("settings", extra["settings"], trainer.settings.to_dict()),
        ("run options", extra["run"], trainer.run_options.to_dict()),
    ):
        # a checkpoint older than a setting ran with what is now its default
        changed = [f"{k}={new[k]} (checkpoint: {old[k]})" for k in new if k in old and new[k] != old[k]]
        if changed:
            rule = f"--c takes its {what} from the checkpoint"
            raise UserError(rule, ", ".join(changed), None, "leave them out, or start a new --run")
