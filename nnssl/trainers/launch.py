"""From a command line's choices to a running trainer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException

from nnssl.errors import UserError, nearest
from nnssl.layout import find_dataset, variable
from nnssl.plans.manifest import plans_on_disk
from nnssl.trainers.registry import expose_to_nnunet, trainer_class
from nnssl.trainers.run_options import RunOptions
from nnssl.trainers.runs import plans_name_of_run
from nnssl.training.checkpoints import load_safely, require_space
from nnssl.training.signals import EXIT_STOPPED, STOP_SIGNALS


@dataclass(frozen=True)
class Job:
    """One training, as ``nnssl_train`` was asked for it. Plain values only: it travels to DDP children.

    Args:
        dataset: id or name.
        configuration: name of a configuration of the plan.
        fold: "all" or an index.
        trainer: registered name.
        plans: plans identifier.
        run: suffix that keeps this run apart, or None.
        settings: the method's settings as given by the user (names and values).
        options: seed and length as given by the user.
        device: cuda, mps or cpu.
        num_gpus: processes of one machine.
        continue_training, only_validation, validate_with_best, save_probabilities, disable_checkpointing: nnU-Net's.
        pretrained_weights: an nnU-Net checkpoint to start the network from.
    """

    dataset: str
    configuration: str
    fold: int | str = "all"
    trainer: str = "SupervisedTrainer"
    plans: str = "nnUNetPlans"
    run: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    num_gpus: int = 1
    continue_training: bool = False
    only_validation: bool = False
    validate_with_best: bool = False
    save_probabilities: bool = False
    disable_checkpointing: bool = False
    pretrained_weights: str | None = None


def best_device() -> str:
    """Return the best device there is: cuda, mps, cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def require_devices(device: str, num_gpus: int) -> None:
    """Refuse devices that this machine does not have."""
    if num_gpus > 1 and device != "cuda":
        raise UserError("-num_gpus needs CUDA devices", device, "cuda", "use -num_gpus 1")
    count = torch.cuda.device_count()
    if device == "cuda" and count < max(1, num_gpus):
        raise UserError("-device cuda needs the GPUs that -num_gpus asks for", f"{count} of {num_gpus} found")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("-device must exist on this machine", device, best_device())


def read_plans(job: Job) -> tuple[dict, dict]:
    """Return (plans with the run's settings, dataset.json) without touching the shared files.

    Raises:
        UserError: for an unknown data set, plan or configuration, or unknown settings.
    """
    folder = find_dataset(job.dataset, variable("nnUNet_preprocessed"))
    path = folder / f"{job.plans}.json"
    if not path.is_file():
        known = plans_on_disk(folder)
        raise UserError(
            "-p must name a plan of the data set", job.plans, nearest(job.plans, known), "run nnssl_plan_and_preprocess"
        )
    plans = json.loads(path.read_text(encoding="utf-8"))
    if job.configuration not in plans["configurations"]:
        allowed = nearest(job.configuration, plans["configurations"])
        raise UserError("the configuration must be in the plan", repr(job.configuration), allowed, f"see {path.name}")
    block = plans.setdefault("nnssl", {})
    cls = trainer_class(job.trainer)
    cls.settings_class.from_mapping(job.settings)  # unknown keys are named before anything is merged
    block[job.trainer] = {**block.get(job.trainer, {}), **job.settings}
    block["run"] = RunOptions(**{**block.get("run", {}), **job.options}).to_dict()
    plans["plans_name"] = plans_name_of_run(plans["plans_name"], job.run)
    return plans, json.loads((folder / "dataset.json").read_text(encoding="utf-8"))


def fold_folder(job: Job, plans: dict) -> Path:
    """Return the results folder of the fold."""
    name = f"{job.trainer}__{plans['plans_name']}__{job.configuration}"
    return variable("nnUNet_results") / plans["dataset_name"] / name / f"fold_{job.fold}"


def checkpoint_to_continue(folder: Path) -> Path | None:
    """Return the checkpoint --c continues from: final, else latest, else None."""
    for name in ("checkpoint_final.pth", "checkpoint_latest.pth"):
        if (folder / name).is_file():
            return folder / name
    return None


def take_from_checkpoint(job: Job, plans: dict, path: Path) -> None:
    """Put the checkpoint's settings and run options into ``plans``; what the user gives beside them must agree."""
    extra = load_safely(path).get("nnssl")
    if extra is None:
        raise UserError("--c must continue a checkpoint written by nnssl_train", str(path), None, "start a new --run")
    cls = trainer_class(job.trainer)
    given = cls.settings_class.from_mapping(job.settings).to_dict()
    for asked, stored, values, where in (
        (job.settings, extra["settings"], given, "--set"),
        (job.options, extra["run"], job.options, "run options"),
    ):
        wrong = [f"{k}={values[k]} (checkpoint: {stored.get(k)})" for k in asked if values[k] != stored.get(k)]
        if wrong:
            rule = f"--c takes its {where} from the checkpoint"
            raise UserError(rule, ", ".join(wrong), "the checkpoint's values", "leave them out, or start a new --run")
    known = {f for f in given if f in extra["settings"]}
    plans["nnssl"][job.trainer] = {k: extra["settings"][k] for k in known}
    plans["nnssl"]["run"] = dict(extra["run"])


def require_fresh(folder: Path) -> None:
    """Refuse to train over a run that exists."""
    found = checkpoint_to_continue(folder)
    if found is not None:
        state = "a finished run" if found.name == "checkpoint_final.pth" else "an unfinished run"
        remedy = "use --c to continue, --run NAME for another run, or delete the folder"
        raise UserError("a run is never overwritten", f"{state} in {folder}", None, remedy)


def require_same_network(folder: Path, plans: dict, configuration: str) -> None:
    """Refuse a fold whose network differs from that of the sibling folds: they share one plans.json."""
    path = folder.parent / "plans.json"
    siblings = [p for p in folder.parent.glob("fold_*/checkpoint_*.pth") if p.parent != folder]
    if not path.is_file() or not siblings:
        return
    theirs = json.loads(path.read_text(encoding="utf-8"))["configurations"].get(configuration, {}).get("architecture")
    ours = plans["configurations"][configuration].get("architecture")
    if json.dumps(theirs, sort_keys=True) != json.dumps(json.loads(json.dumps(ours)), sort_keys=True):
        remedy = "use the same settings for every fold, or a new --run"
        raise UserError("folds of one run must share their network", f"another network in {path}", None, remedy)


def run_job(job: Job) -> None:
    """Train (or validate) as asked, on one process or on several of this machine."""
    expose_to_nnunet()
    require_devices(job.device, job.num_gpus)
    plans, dataset_json = read_plans(job)
    folder = fold_folder(job, plans)
    require_space(variable("nnUNet_results"), 0)  # before the trainer writes its log there
    if job.continue_training:
        path = checkpoint_to_continue(folder)
        if path is None:
            raise UserError("--c needs a checkpoint to continue from", f"none in {folder}", None, "leave --c out")
        take_from_checkpoint(job, plans, path)
    elif job.only_validation:
        path = folder / ("checkpoint_best.pth" if job.validate_with_best else "checkpoint_final.pth")
        take_from_checkpoint(job, plans, path)
    else:
        require_fresh(folder)
        path = None
    adapted = json.loads(json.dumps(plans))
    cls = trainer_class(job.trainer)
    cls.network_plans(
        adapted, job.configuration, cls.settings_class.from_mapping(adapted["nnssl"].get(job.trainer, {}))
    )
    require_same_network(folder, adapted, job.configuration)
    checkpoint = str(path) if path else None
    if job.num_gpus > 1:
        _spawn(job, plans, dataset_json, checkpoint)
    else:
        train_one(job, plans, dataset_json, checkpoint)


def train_one(job: Job, plans: dict, dataset_json: dict, checkpoint: str | None) -> None:
    """Build the trainer and run it in this process."""
    plans["continue_training"] = job.continue_training
    trainer = trainer_class(job.trainer)(plans, job.configuration, job.fold, dataset_json, torch.device(job.device))
    trainer.disable_checkpointing = job.disable_checkpointing
    if checkpoint is not None:
        trainer.load_checkpoint(checkpoint)
    elif job.pretrained_weights is not None:
        from nnssl.trainers.pretrained import load_pretrained

        trainer.initialize()
        load_pretrained(trainer, Path(job.pretrained_weights))
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True
    if not job.only_validation:
        trainer.run_training()
    if job.only_validation or job.fold != "all":
        trainer.perform_actual_validation(job.save_probabilities)
    else:
        text = "fold all has no held-out case, so no final validation is run (--val runs it on the training cases)"
        trainer.print_to_log_file(text)


def _spawn(job: Job, plans: dict, dataset_json: dict, checkpoint: str | None) -> None:
    os.environ.setdefault("MASTER_ADDR", "localhost")
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    args = (job, plans, dataset_json, checkpoint)
    supervise(torch.multiprocessing.spawn(_child, args, nprocs=job.num_gpus, join=False))


def supervise(context: Any) -> None:
    """Wait for a run's processes, pass stop signals on to them, and leave with their exit code where it is ours.

    Args:
        context: what ``torch.multiprocessing.spawn(..., join=False)`` returned.
    """

    def pass_on(number: int, frame: object) -> None:
        for pid in context.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    previous = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        while not context.join():
            pass
    except ProcessExitedException as error:
        if error.exit_code in (2, EXIT_STOPPED):  # the process has said why
            raise SystemExit(error.exit_code) from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _child(rank: int, job: Job, plans: dict, dataset_json: dict, checkpoint: str | None) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=job.num_gpus)
    try:
        train_one(job, plans, dataset_json, checkpoint)
    except UserError as error:
        print(f"nnssl_train: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    finally:
        dist.destroy_process_group()
