"""Find a trained model in the results folder, and name what exists when it is not there. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnssl.errors import UserError, nearest
from nnssl.layout import find_dataset, variable

#: Checkpoint that a finished training leaves.
FINAL_CHECKPOINT = "checkpoint_final.pth"


@dataclass(frozen=True)
class TrainedModel:
    """A folder ``TRAINER__PLANS[-RUN]__CONFIGURATION`` with the folds and the checkpoint to predict with.

    Args:
        folder: the model folder.
        folds: ``"all"`` or fold numbers; several are averaged.
        checkpoint: name of the checkpoint file in each fold folder.
        plans: the parsed ``plans.json``.
        dataset_json: the parsed ``dataset.json``.
        configuration: name of the configuration, from the folder's name.
    """

    folder: Path
    folds: tuple[int | str, ...]
    checkpoint: str
    plans: dict = field(repr=False)
    dataset_json: dict = field(repr=False)
    configuration: str

    @property
    def checkpoint_files(self) -> list[Path]:
        return [self.folder / f"fold_{f}" / self.checkpoint for f in self.folds]

    @property
    def file_ending(self) -> str:
        return self.dataset_json["file_ending"]

    @property
    def channels(self) -> int:
        return len(self.dataset_json.get("channel_names", self.dataset_json.get("modality", {})))


def find_model_folder(dataset: int | str, trainer: str, plans: str, configuration: str, run: str | None = None) -> Path:
    """Return the results folder of a trained model.

    Only nnUNet_results is looked at, so that a machine that predicts needs neither raw nor preprocessed data.

    Raises:
        UserError: when it does not exist, with the nearest names among the models that do.
    """
    from nnssl.trainers.runs import model_folder, plans_name_of_run

    results = find_dataset(dataset, variable("nnUNet_results"))
    folder = model_folder(results.name, trainer, plans, run, configuration)
    if folder.is_dir():
        return folder
    trained = [tuple(p.name.split("__")) for p in sorted(results.iterdir()) if p.is_dir() and p.name.count("__") == 2]
    if not trained:
        raise UserError(f"{results.name} needs a trained model", f"none in {results}", None, "run nnssl_train first")
    wanted = (trainer, plans_name_of_run(plans, run), configuration)
    rules = ("-tr must name a trained trainer", "-p and --run must name a trained plan", "-c must name a configuration")
    left = trained
    for place, (rule, name) in enumerate(zip(rules, wanted, strict=True)):
        known = sorted({t[place] for t in left})
        if name not in known:
            raise UserError(
                f"{rule} of {results.name}", repr(name), nearest(name, known), "train it or correct the name"
            )
        left = [t for t in left if t[place] == name]
    raise UserError("a trained model must exist", f"no {folder}", None, "check -tr, -p, --run and -c")


def load_model(folder: Path, folds: Sequence[int | str] = ("all",), checkpoint: str = FINAL_CHECKPOINT) -> TrainedModel:
    """Check a model folder and return what prediction needs to know of it.

    Raises:
        UserError: for a folder that is no model, a missing fold or checkpoint (naming those that exist), a cascade.
    """
    folder = Path(folder)
    if folder.name.count("__") != 2:
        allowed = "a folder TRAINER__PLANS__CONFIGURATION below nnUNet_results/DATASET"
        raise UserError("a model folder must be named by trainer, plans and configuration", folder, allowed)
    plans, dataset_json = (_read(folder / name) for name in ("plans.json", "dataset.json"))
    configuration = folder.name.split("__")[2]
    if configuration not in plans.get("configurations", {}):
        known = nearest(configuration, plans.get("configurations", {}))
        raise UserError("the model's plans.json must hold its configuration", repr(configuration), known, "repair it")
    if _previous_stage(plans, configuration):
        raise UserError("nnssl predicts no cascade", configuration, "2d, 3d_fullres, 3d_lowres", "use nnUNetv2_predict")
    folds = tuple(_fold(f) for f in folds)
    for fold in folds:
        _require_checkpoint(folder, fold, checkpoint)
    return TrainedModel(folder, folds, checkpoint, plans, dataset_json, configuration)


def _fold(text: int | str) -> int | str:
    if str(text) == "all":
        return "all"
    if not str(text).isdigit():
        raise UserError("-f must name folds", repr(text), "all, or numbers such as 0 1 2")
    return int(text)


def _read(path: Path) -> dict:
    if not path.is_file():
        remedy = "check -m, or train the model"
        raise UserError("a model folder must hold plans.json and dataset.json", f"no {path}", None, remedy)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError("a model's json files must be valid", f"{path}: {error}", None, "restore the file") from error


def _previous_stage(plans: dict, configuration: str) -> str | None:
    """Return the configuration whose predictions this one takes as input, following ``inherits_from``."""
    seen: set[str] = set()
    while configuration in plans["configurations"] and configuration not in seen:
        seen.add(configuration)
        entry = plans["configurations"][configuration]
        if entry.get("previous_stage"):
            return entry["previous_stage"]
        configuration = entry.get("inherits_from", "")
    return None


def _require_checkpoint(folder: Path, fold: int | str, checkpoint: str) -> None:
    trained = {p.name[5:]: p for p in folder.glob("fold_*") if p.is_dir()}
    if str(fold) not in trained:
        rule, remedy = f"-f must name a trained fold of {folder.name}", "train it or choose another fold"
        raise UserError(rule, fold, ", ".join(sorted(trained)) or "none exist", remedy)
    if (folder / f"fold_{fold}" / checkpoint).is_file():
        return
    known = sorted(p.name for p in trained[str(fold)].glob("*.pth"))
    remedy = "choose one with -chk"
    if checkpoint == FINAL_CHECKPOINT:
        remedy = "finish the training (nnssl_train ... --c) or choose one with -chk"
    raise UserError(f"-chk must name a checkpoint of fold {fold}", repr(checkpoint), nearest(checkpoint, known), remedy)
