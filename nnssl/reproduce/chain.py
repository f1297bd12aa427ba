"""The chain of one table: subset, plan, and for each row and seed training, two predictions, two evaluations.

Every step is one of the commands, called as a user would. What is done is read from the disk, so that a stopped call
goes on with the same command line: a subset is done when it lies in nnUNet_raw, a plan when its record says so, a
training when its last checkpoint is there, a prediction when its folder has its final name, an evaluation when its
file is there. Locks keep calls apart that do the same at the same time. They and the records lie beside what is made,
in nnU-Net's folders, so that they hold for calls with different ``-o`` too.
"""

from __future__ import annotations

import gc
import json
import shlex
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

from nnssl.demo.steps import StepRunner
from nnssl.errors import UserError
from nnssl.evaluation.report import to_json, write_files
from nnssl.inference.models import FINAL_CHECKPOINT
from nnssl.layout import RawDataset, variable
from nnssl.reproduce.data import SubsetPlan, broken_masks, require_references
from nnssl.reproduce.locks import alone
from nnssl.reproduce.recipe import Recipe, without
from nnssl.reproduce.table import Table
from nnssl.trainers.runs import model_folder

#: Console script -> its module below nnssl.cli.
_MODULES = {
    "nnssl_make_subset": "make_subset",
    "nnssl_plan_and_preprocess": "plan_and_preprocess",
    "nnssl_train": "train",
    "nnssl_predict": "predict",
    "nnssl_evaluate": "evaluate",
}
#: Folder of locks and records, beside what they are about.
FOLDER = "nnssl_reproduce"
#: Steps of one seed of a row.
STEPS_OF_A_SEED = 5
#: The two ways to measure a model: predicted and measured as the paper does, and with nnU-Net's defaults in mm.
WAYS = ("paper", "mm")


@dataclass(frozen=True)
class Place:
    """Where the results of one seed lie.

    Args:
        folder: folder of the run.
        cases: "test" or "val".
    """

    folder: Path
    cases: str

    def masks(self, way: str) -> Path:
        return self.folder / f"{self.cases}_{way}"

    def scores(self, way: str) -> Path:
        return self.folder / f"{self.cases}_{way}.json"

    @property
    def record(self) -> Path:
        """The record of the training that masks and scores belong to."""
        return self.folder / "train.json"

    def belong_to(self, training: dict) -> None:
        """Remove masks and scores of another training: a model that is gone, or that another call has made anew."""
        if _read(self.record) != training:
            self._clear()
            write_files({self.record: to_json(training)})

    def _clear(self) -> None:
        """Remove masks and scores, whole and half, of all cases."""
        for cases in ("test", "val"):
            place = Place(self.folder, cases)
            for way in WAYS:
                place.scores(way).unlink(missing_ok=True)
                for masks in (place.masks(way), _part(place.masks(way))):
                    shutil.rmtree(masks, ignore_errors=True)


class Chain:
    """Runs what is left of a table.

    Args:
        table: the table.
        root: folder for predictions, scores, logs and records.
        runner: announces and logs the steps.
    """

    def __init__(self, table: Table, root: Path, runner: StepRunner) -> None:
        self.table, self.root, self.runner = table, root, runner

    def subset(self, plan: SubsetPlan, processes: int | None) -> RawDataset:
        """Return the subset; make it first if it is not there."""
        title = "make subset " + (plan.name or plan.source.name)
        dataset = plan.existing()  # it gets its name when it is whole: to use it, no lock is needed
        if dataset is None:
            # one lock for all subsets, which draw their ids from one range
            with alone(variable("nnUNet_raw") / f".{FOLDER}.lock", "the subset", self._say):
                dataset = plan.existing()
                if dataset is None:
                    self._command(title, plan.words(self.root / "ids", processes))
                    dataset = plan.existing()
                else:
                    self.runner.skip(title)
        else:
            self.runner.skip(title)
        if dataset is None:
            raise UserError("nnssl_make_subset must leave its data set", f"no {plan.name} in nnUNet_raw")
        require_references(self.table, dataset)
        return dataset

    def plan(self, recipe: Recipe, dataset: RawDataset) -> None:
        """Plan and preprocess, unless the record says that just this was done."""
        words = recipe.plan_words(dataset.name)
        own = variable("nnUNet_preprocessed") / dataset.name
        record = own / FOLDER / f"{recipe.plans}.json"
        made = recipe.plan_record(dataset.name)
        with alone(own / FOLDER / "lock", "planning and preprocessing", self._say):
            if _read(record) == made and (own / f"{recipe.plans}.json").is_file():
                self.runner.skip(f"plan {recipe.plans}")
                return
            self._command(f"plan {recipe.plans}", words)
            write_files({record: to_json(made)})

    def seed(self, recipe: Recipe, dataset: RawDataset, seed: int) -> Place:
        """Train, predict and evaluate one seed of a row, as far as it is not done; return where the results lie."""
        name, place = recipe.name(seed), self.place(recipe, dataset, seed)
        model = self._model(recipe, dataset, seed)
        lock = model.parent / FOLDER / f"{model.name}.lock"
        # the second lock is for calls that share -o and not nnUNet_results
        with alone(lock, name, self._say), alone(place.folder / "lock", name, self._say):
            self._train(recipe, dataset, seed, place)
            for way in WAYS:
                self._predict(recipe, dataset, seed, place, way)
                self._evaluate(name, dataset, place, way)
        return place

    def place(self, recipe: Recipe, dataset: RawDataset, seed: int) -> Place:
        """Return where the results of a seed lie, whether or not they are there."""
        return Place(self.root / dataset.name / recipe.plans / recipe.name(seed), self.table.cases)

    def _model(self, recipe: Recipe, dataset: RawDataset, seed: int) -> Path:
        trainer, run = str(recipe.row.trainer), recipe.name(seed)
        return model_folder(dataset.name, trainer, recipe.plans, run, recipe.configuration)

    def _train(self, recipe: Recipe, dataset: RawDataset, seed: int, place: Place) -> None:
        title, words = f"train {recipe.name(seed)}", recipe.train_words(dataset.name, seed)
        model = self._model(recipe, dataset, seed)
        fold, record = model / "fold_all", model.parent / FOLDER / f"{model.name}.json"
        before = _read(record) or _read(place.record)  # where it lay before locks and records were the model's
        made, known = _run_of(words), before and before["words"]
        if (fold / FINAL_CHECKPOINT).is_file():
            if known != made:
                by = "words of which no record lies here" if known is None else shlex.join(known)
                got = f"{model.name} by {by}, now {shlex.join(made)}"
                remedy = "remove that folder to train anew"
                raise UserError("a finished run must have been trained as it would be now", got, None, remedy)
            self.runner.skip(title)
            place.belong_to(before or {})
            return
        started = (fold / "checkpoint_latest.pth").is_file()
        tag = before.get("tag") if started and before else uuid.uuid4().hex  # one model's, whoever asks for it
        training = {"words": made, "tag": tag}
        write_files({record: to_json(training)})
        place.belong_to(training)
        self._command(title, [*words, "--c"] if started else words)

    def _predict(self, recipe: Recipe, dataset: RawDataset, seed: int, place: Place, way: str) -> None:
        title, masks = f"predict {recipe.name(seed)}, {way}", place.masks(way)
        if masks.is_dir():
            self.runner.skip(title)
            return
        part = _part(masks)
        for path in broken_masks(part):
            path.unlink()
        images = str(require_references(self.table, dataset)[0])
        self._command(title, recipe.predict_words(dataset.name, seed, images, str(part), way == "paper"))
        part.rename(masks)

    def _evaluate(self, name: str, dataset: RawDataset, place: Place, way: str) -> None:
        title, scores = f"evaluate {name}, {way}", place.scores(way)
        if scores.is_file():
            self.runner.skip(title)
            return
        references = str(require_references(self.table, dataset)[1])
        protocol = self.table.protocol if way == "paper" else "mm"
        words = ["nnssl_evaluate", "-ref", references, "-pred", str(place.masks(way))]
        self._command(title, [*words, "--protocol", protocol, "-o", str(scores)])

    def _command(self, title: str, words: Sequence[str]) -> None:
        main: Callable[[Sequence[str]], int] = import_module(f"nnssl.cli.{_MODULES[words[0]]}").main
        self.runner.run(title, partial(main, list(words[1:])), shlex.join(words))
        gc.collect()  # trainers hold themselves in circles; the next step needs their memory

    def _say(self, line: str) -> None:
        print(line, file=self.runner.stream, flush=True)


def _part(masks: Path) -> Path:
    """Return where masks are written until all are there."""
    return masks.with_name(masks.name + ".part")


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def _run_of(words: Sequence[str]) -> list[str]:
    """Return the words that decide a run; the machine's do not."""
    return without(words, "-device", "-num_gpus")
