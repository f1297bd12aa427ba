"""Iterated pseudo-label training: label, train on labels and masks, label with the new model, and so on.

Every step is one of the commands, called as a user would. What is done is read from the disk, so that a stopped run
goes on with the same command: a round is over when its model is, and its masks are those whose record names it.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from nnssl.errors import UserError


def run_rounds(args: argparse.Namespace) -> int:
    """Run the rounds that are left; return the first exit code that is not 0."""
    from nnssl.cli.pseudo_label import label_once, model_folder
    from nnssl.inference.models import FINAL_CHECKPOINT
    from nnssl.layout import PSEUDO_FOLDER, RawDataset, find_dataset
    from nnssl.plans.pseudo import RECORD_NAME, read_record
    from nnssl.trainers.runs import model_folder as folder_of_run

    _refuse(args)
    first = model_folder(args)
    dataset = RawDataset.load(find_dataset(args.d))
    masks, fold = dataset.folder / PSEUDO_FOLDER, f"fold_{args.f[0]}"
    models = [first]
    for number in range(1, args.rounds + 1):
        name = f"{args.run or 'pseudo'}-r{number}"
        model = folder_of_run(dataset.name, args.tr, args.p, name, args.c)
        models.append(model)
        if (model / fold / FINAL_CHECKPOINT).is_file():
            print(f"Round {number}: {name} is trained", flush=True)
            continue
        mark = {"round": number, "run": name}
        if not _made_for(read_record(masks), mark):
            print(f"Round {number}: masks by {models[-2].name}", flush=True)
            if label_once(args, models[-2], args.overwrite or _made_in_rounds(read_record(masks), args), mark) is None:
                print("Rounds go on with the same command once the refined masks are there")
                return 0
        _keep(masks / RECORD_NAME, model / fold / RECORD_NAME)
        code = _preprocess(args) or _train(args, name, model / fold)
        if code:
            return code
    print(f"{args.rounds} rounds are done; the last model is {models[-1]}")
    return 0


def _refuse(args: argparse.Namespace) -> None:
    if args.rounds < 1:
        raise UserError("--rounds must be at least 1", args.rounds)
    if args.m or len(args.f) != 1:
        got = "-m" if args.m else f"folds {' '.join(args.f)}"
        raise UserError("--rounds starts from one fold of a model named by -d, -c and -tr", got, None, "see --help")
    own = {"-tr", "-p", "--run", "--c", "--val", "--val_best", "--disable_checkpointing", "-h", "--help"}
    if given := sorted(own & set(args.train)):
        rule = "--train takes what the rounds do not set themselves"
        raise UserError(rule, " ".join(given), None, "leave it out; -tr and -p are those of the model")


def _made_for(record: dict[str, Any] | None, mark: dict[str, Any]) -> bool:
    return record is not None and all(record["origin"].get(key) == value for key, value in mark.items())


def _made_in_rounds(record: dict[str, Any] | None, args: argparse.Namespace) -> bool:
    """Whether the masks on disk are an earlier round's of this series, which the next round may replace."""
    number = record["origin"].get("round") if record is not None else None
    return number is not None and _made_for(record, {"run": f"{args.run or 'pseudo'}-r{number}"})


def _keep(record: Path, target: Path) -> None:
    """Leave a copy of the record with the round's model: the next round replaces the masks."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(record, target)


def _preprocess(args: argparse.Namespace) -> int:
    from nnssl.cli import plan_and_preprocess

    processes = ["-np", str(args.np)] if args.np else []
    return plan_and_preprocess.main(["-d", args.d, "-c", args.c, "-overwrite_plans_name", args.p, *processes])


def _train(args: argparse.Namespace, name: str, folder: Path) -> int:
    """Train the round's model, or go on with it."""
    from nnssl.cli import train

    given = list(args.train)
    goes_on = (folder / "checkpoint_latest.pth").is_file()
    if goes_on and "-pretrained_weights" in given:  # they were loaded when the round began
        at = given.index("-pretrained_weights")
        del given[at : at + 2]
    words = [args.d, args.c, args.f[0], *given, "-tr", args.tr, "-p", args.p, "--run", name]
    if args.device and "-device" not in given:
        words += ["-device", args.device]
    if not any(word.startswith("supervision=") for word in given):
        words += ["--set", "supervision=gt+pseudo"]
    return train.main([*words, "--c"] if goes_on else words)
