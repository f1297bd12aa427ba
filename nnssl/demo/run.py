"""The demonstration: invented scans through the whole chain, two trainers under one budget, a report."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import TextIO

from nnssl.demo.report import write_report
from nnssl.demo.steps import StepRunner, clock
from nnssl.demo.synthetic import CLASSES, SPACING, SPLITS, STYLES, write_dataset
from nnssl.errors import UserError
from nnssl.layout import VARIABLES

DATASET_ID = 900
DATASET_NAME = "Demo"
CONFIGURATION = "2d"
#: Both trainers get the same plan, seed, number of steps and labeled items a step.
TRAINERS = ("SupervisedTrainer", "DiffCLTrainer")
PATCH, BATCH, FEATURES = 64, 4, 8
#: Optimizer steps by default: both trainings together stay well below ten minutes on two cores.
ITERATIONS = 1200
#: Steps between two validation rounds.
EPOCH = 50
#: Test cases shown in the pictures: the first in name order, whatever their result.
PICTURES = 4
#: Marks a folder as the demo's own, so that --overwrite never deletes anything else.
MARKER = ".nnssl_demo"
OWN = ("data", "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "predictions", "evaluation", "overlays", "logs")


@dataclass(frozen=True)
class DemoSettings:
    """What a demo run is made of.

    Args:
        folder: where everything goes.
        seed: seed of the scans and of both trainings.
        iterations: optimizer steps of each training.
        overwrite: replace an earlier demo in the folder.
        splits: number of cases per split.
    """

    folder: Path
    seed: int = 0
    iterations: int = ITERATIONS
    overwrite: bool = False
    splits: dict[str, int] = field(default_factory=lambda: dict(SPLITS))

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise UserError("--iterations must be a count", self.iterations, "1 or more")
        if self.seed < 0:
            raise UserError("--seed must not be negative", self.seed, "0 or more")

    @property
    def epochs(self) -> tuple[int, int]:
        """Epochs and iterations per epoch whose product is at least ``iterations``, and exactly for multiples."""
        if self.iterations <= EPOCH:
            return 1, self.iterations
        return -(-self.iterations // EPOCH), EPOCH


def run_demo(settings: DemoSettings, stream: TextIO | None = None) -> dict:
    """Run the demonstration.

    Args:
        settings: see :class:`DemoSettings`.
        stream: where progress goes; default stderr.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        UserError: for a folder that holds anything but an earlier demo, and for a step that fails.
    """
    folder = settings.folder.resolve()
    prepare_folder(folder, settings.overwrite)
    start = time.monotonic()
    (folder / MARKER).write_text("made by nnssl_demo\n", encoding="utf-8")
    with _environment(folder):
        runner = StepRunner(folder / "logs", 4 + 3 * len(TRAINERS), stream)
        commands = _commands(folder, settings)
        runner.run("make scans", lambda: _make_scans(folder, settings))
        for title in ("import", "plan and preprocess"):
            _run_command(runner, title, commands[title])
        for trainer in TRAINERS:
            for verb in ("train", "predict", "evaluate"):
                _run_command(runner, f"{verb} {trainer}", commands[f"{verb} {trainer}"])
        summary = _summary(folder, settings, runner, commands)
        runner.run("write report", lambda: _report(folder, settings, summary, start))
    _write_json(folder / "summary.json", summary)
    return summary


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Make sure that ``folder`` exists and is empty; ``overwrite`` removes what an earlier demo left, and only that.

    Raises:
        UserError: if it holds anything else, or can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = sorted(p.name for p in folder.iterdir())
    except OSError as error:
        raise UserError("-o must be a writable folder", f"{folder}: {error}", None, "choose another") from error
    if not present:
        return
    if MARKER not in present:
        raise UserError("-o must be an empty folder", f"{folder} with {present[0]}", None, "choose another folder")
    if not overwrite:
        raise UserError(
            "-o must be an empty folder", f"an earlier demo in {folder}", None, "add --overwrite to replace it"
        )
    for name in OWN:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("summary.json", "report.html"):
        (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """Point nnU-Net's variables below ``folder`` and share the cores, for the time of the run.

    The networks are small: one core is left to the data worker, and more than four threads would only wait for each
    other. What the user has set holds.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(min(4, max(1, cores - 1)))
    shares = {"OMP_NUM_THREADS": threads, "nnUNet_n_proc_DA": threads, "nnUNet_def_n_proc": str(min(cores, 8))}
    values = {name: str(folder / name) for name in VARIABLES}
    values |= {name: value for name, value in shares.items() if name not in os.environ}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    for name in VARIABLES:
        (folder / name).mkdir(exist_ok=True)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _commands(folder: Path, settings: DemoSettings) -> dict[str, list[str]]:
    """Return every command of the run as a user would type it: {title: words}."""
    data, images = folder / "data", folder / "nnUNet_raw" / f"Dataset{DATASET_ID}_{DATASET_NAME}" / "imagesTs"
    epochs, steps = settings.epochs
    ident = ["-d", str(DATASET_ID)]
    folders = ["--labeled", data / "labeled", "--labels", data / "masks", "--unlabeled", data / "unlabeled"]
    labels = ["--label_names", *CLASSES.values()]
    plan = ["-c", CONFIGURATION, "--patch_size", PATCH, PATCH, "--batch_size", BATCH, "--base_features", FEATURES]
    budget = ["--epochs", epochs, "--iterations_per_epoch", steps, "--seed", settings.seed]
    commands: dict[str, list] = {
        "import": ["nnssl_import", *ident, "-n", DATASET_NAME, *folders, "--test", data / "test", *labels],
        "plan and preprocess": ["nnssl_plan_and_preprocess", *ident, *plan],
    }
    for trainer in TRAINERS:
        out, scores = folder / "predictions" / trainer, folder / "evaluation" / f"{trainer}.json"
        model = ["-c", CONFIGURATION, "-tr", trainer]
        commands[f"train {trainer}"] = ["nnssl_train", DATASET_ID, CONFIGURATION, "all", "-tr", trainer, *budget]
        commands[f"predict {trainer}"] = [
            "nnssl_predict",
            "-i",
            images,
            "-o",
            out,
            *ident,
            *model,
            "-npp",
            0,
            "-nps",
            0,
        ]
        commands[f"evaluate {trainer}"] = ["nnssl_evaluate", "-ref", data / "test_masks", "-pred", out, "-o", scores]
    return {title: [str(word) for word in words] for title, words in commands.items()}


#: Console script -> its module.
_MODULES = {
    "nnssl_import": "import_data",
    "nnssl_plan_and_preprocess": "plan_and_preprocess",
    "nnssl_train": "train",
    "nnssl_predict": "predict",
    "nnssl_evaluate": "evaluate",
}


def _run_command(runner: StepRunner, title: str, words: Sequence[str]) -> None:
    main: Callable[[Sequence[str]], int] = import_module(f"nnssl.cli.{_MODULES[words[0]]}").main
    runner.run(title, lambda: main(list(words[1:])), _shown(words))


def _shown(words: Sequence[str]) -> str:
    """Return a command line with paths below the present folder made relative."""
    here = Path.cwd()
    short = [str(Path(w).relative_to(here)) if w.startswith(str(here) + os.sep) else w for w in words]
    return shlex.join(short)


def _make_scans(folder: Path, settings: DemoSettings) -> None:
    styles = write_dataset(folder / "data", settings.seed, settings.splits)
    _write_json(folder / "data" / "styles.json", styles)
    print({split: len(cases) for split, cases in styles.items()})


def _summary(folder: Path, settings: DemoSettings, runner: StepRunner, commands: dict[str, list[str]]) -> dict:
    epochs, steps = settings.epochs
    trainers = {}
    for trainer in TRAINERS:
        scores = read_scores(folder / "evaluation" / f"{trainer}.json")
        trainers[trainer] = {**scores, "seconds": round(runner.seconds[f"train {trainer}"], 1)}
    return {
        "seed": settings.seed,
        "iterations": epochs * steps,
        "configuration": {
            "name": CONFIGURATION,
            "patch_size": [PATCH, PATCH],
            "batch_size": BATCH,
            "base_features": FEATURES,
        },
        "data": {**settings.splits, "spacing_mm": list(SPACING), "styles": [style.name for style in STYLES]},
        "versions": versions(),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
        "commands": [_shown(words) for words in commands.values()],
        "trainers": trainers,
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape the result."""
    named = {name: metadata.version(name) for name in ("nnunetv2", "torch", "numpy")}
    return {"python": platform.python_version(), "nnssl": import_module("nnssl").__version__, **named}


def read_scores(path: Path) -> dict:
    """Return ``dice_mean``, ``dice`` and ``hd95_mm`` (means over classes and test cases) and the Dice of each case.

    Args:
        path: what ``nnssl_evaluate -o`` wrote.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    return {
        "dice_mean": result["foreground_mean"]["dice"],
        "dice": {name: scores["dice"] for name, scores in result["mean"].items()},
        "hd95_mm": result["foreground_mean"]["hd95"],
        "cases": {case: scores["dice"] for case, scores in result["case_foreground"].items()},
    }


def _report(folder: Path, settings: DemoSettings, summary: dict, start: float) -> None:
    pictures = _draw(folder)
    summary["seconds_total"] = round(time.monotonic() - start, 1)
    styles = json.loads((folder / "data" / "styles.json").read_text(encoding="utf-8"))
    write_report(folder / "report.html", summary, pictures, styles.get("test", {}))
    print(f"report written after {clock(summary['seconds_total'])}")


def _draw(folder: Path) -> list[Path]:
    """Write the overlay pictures of the first test cases and return their files."""
    import SimpleITK

    from nnssl.evaluation.overlays import largest_slice, save_overlay

    def read(path: Path):
        return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))

    pictures = []
    for image in sorted((folder / "data" / "test").glob("*.nii.gz"))[:PICTURES]:
        reference = read(folder / "data" / "test_masks" / image.name)
        z = largest_slice(reference)
        masks = {"reference": reference[z]}
        masks |= {trainer: read(folder / "predictions" / trainer / image.name)[z] for trainer in TRAINERS}
        case = image.name.removesuffix(".nii.gz")
        pictures.append(folder / "overlays" / f"{case}.png")
        save_overlay(read(image)[z], masks, pictures[-1], SPACING[1:], CLASSES, f"{case}, slice {z + 1}")
    return pictures


def _write_json(path: Path, content: object) -> None:
    """Write JSON in one piece: a kill leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
