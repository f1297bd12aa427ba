"""How one row is run under one budget: plan, length, settings, tiles, and the commands' words. Loads no torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nnssl.errors import UserError
from nnssl.plans.options import plan_section
from nnssl.plans.preset import load_preset
from nnssl.reproduce.table import Row, Table

#: Settings that count iterations: they shrink with the budget, as the schedules, which are fractions of the run, do.
ITERATION_SETTINGS = ("warmup", "rect_start_iteration")
#: Networks with four poolings need patches that this divides.
DIVISOR = 16
#: Iterations between two epochs' ends, where a run is long enough.
EPOCH = 100


@dataclass(frozen=True)
class Request:
    """What ``nnssl_reproduce`` was asked for, apart from the table.

    Args:
        budget: share of the published iterations, more than 0.
        seeds: seeds of the trainings.
        spacing: voxel size in mm (z, y, x) to plan with instead of the paper's.
        settings: ``KEY=VALUE`` on top of the row's settings.
        device: as for ``nnssl_train``; None: the best there is.
        num_gpus: GPUs of one training.
        precision: as for ``nnssl_train``; None: its default.
        processes: worker processes; None: the commands' defaults.
    """

    budget: float = 1.0
    seeds: tuple[int, ...] = (0, 1, 2)
    spacing: tuple[float, ...] | None = None
    settings: tuple[str, ...] = ()
    device: str | None = None
    num_gpus: int = 1
    precision: str | None = None
    processes: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.budget) and self.budget > 0):
            raise UserError("--budget must be a share of the iterations", self.budget, "more than 0; 1 is the paper's")
        if self.spacing is not None and not all(math.isfinite(v) and v > 0 for v in self.spacing):
            raise UserError("--spacing must be a voxel size in mm", list(self.spacing), "three positive numbers")
        if not self.seeds or min(self.seeds) < 0:
            raise UserError("seeds must be numbers from 0 on", list(self.seeds), "--seeds 1 or more")

    @property
    def tag(self) -> str:
        """What own settings and precision add to the names of runs and tables."""
        own = f"-x{digest(list(self.settings))}" if self.settings else ""
        return own + (f"-{self.precision}" if self.precision else "")


@dataclass(frozen=True)
class Recipe:
    """A row with everything decided but the data set and the seed.

    Args:
        row: the row.
        configuration: nnU-Net configuration.
        patch: voxels an axis in the plan's order; scaled so that it keeps its extent in mm at another spacing.
        stride: voxels between tiles at test time; scaled likewise; None: nnU-Net's.
        spacing: target spacing in mm (z, y, x); None: nnU-Net's.
        plans: plans name; the same for rows that share a plan.
        epochs, per_epoch: length of the training.
        run: name of the run, without the seed.
        settings: ``KEY=VALUE`` words on top of the preset.
        request: what was asked for.
    """

    row: Row
    configuration: str
    patch: tuple[int, ...]
    stride: tuple[int, ...] | None
    spacing: tuple[float, ...] | None
    plans: str
    epochs: int
    per_epoch: int
    run: str
    settings: tuple[str, ...]
    request: Request

    @property
    def iterations(self) -> int:
        """Training steps of the run."""
        return self.epochs * self.per_epoch

    def plan_words(self, dataset: str) -> list[str]:
        """Return the command that plans and preprocesses."""
        words = ["nnssl_plan_and_preprocess", "-d", dataset, "-c", self.configuration, "--preset", self._preset]
        words += ["--patch_size", *map(str, self.patch)]
        if self.spacing:
            words += ["--spacing", *(f"{v:g}" for v in self.spacing)]
        if self.request.processes:
            words += ["-np", str(self.request.processes)]
        return [*words, "-overwrite_plans_name", self.plans]

    def plan_record(self, dataset: str) -> dict[str, Any]:
        """Return what decides a plan, the same for rows that share it: presets of two names may plan alike."""
        section = plan_section(load_preset(self._preset))
        section["patch_size"] = list(self.patch)
        return {"words": without(self.plan_words(dataset), "-np", "--preset"), "section": section}

    def train_words(self, dataset: str, seed: int) -> list[str]:
        """Return the command that trains one seed from the start."""
        words = ["nnssl_train", dataset, self.configuration, "all", *self._model(seed), "--preset", self._preset]
        words += ["--epochs", str(self.epochs), "--iterations_per_epoch", str(self.per_epoch), "--seed", str(seed)]
        if self.request.precision:
            words += ["--precision", self.request.precision]
        if self.request.num_gpus > 1:
            words += ["-num_gpus", str(self.request.num_gpus)]
        words += ["--set", *self.settings] if self.settings else []
        return [*words, *self._device]

    def predict_words(self, dataset: str, seed: int, images: str, out: str, as_paper: bool) -> list[str]:
        """Return the command that predicts with the last checkpoint: as the paper does, or with nnU-Net's defaults."""
        words = ["nnssl_predict", "-i", images, "-o", out, "-d", dataset, "-c", self.configuration, *self._model(seed)]
        if as_paper:
            words += ["--preset", self._preset]
            words += ["--stride", *map(str, self.stride)] if self.stride else []
        return [*words, "--continue_prediction", "--disable_progress_bar", *self._device]

    def name(self, seed: int) -> str:
        """Return the name of one seed's run."""
        return f"{self.run}-s{seed}"

    @property
    def _preset(self) -> str:
        return str(self.row.preset)

    @property
    def _device(self) -> list[str]:
        return ["-device", self.request.device] if self.request.device else []

    def _model(self, seed: int) -> list[str]:
        return ["-tr", str(self.row.trainer), "-p", self.plans, "--run", self.name(seed)]


def make_recipe(table: Table, row: Row, request: Request) -> Recipe:
    """Decide how a row is run.

    Raises:
        UserError: if the row can't be run here.
    """
    if row.trainer is None or row.preset is None:
        rule = f"a row must belong to a trainer of nnssl; {row.method!r} is reported only"
        raise UserError(rule, table.why or "no such trainer", None, "choose another row, see --list")
    preset = load_preset(row.preset)
    section = plan_section(preset)
    spacing = request.spacing or table.spacing
    factors = _factors(table, request, len(section["patch_size"]))
    order = _order(table, request, len(section["patch_size"]))
    sizes = [
        size if factor == 1 else max(DIVISOR, DIVISOR * math.ceil(size * factor / DIVISOR - 1e-9))
        for size, factor in zip(section["patch_size"], factors, strict=True)
    ]
    patch = tuple(sizes[axis] for axis in order)
    given = preset.get("predict", {}).get("stride")
    steps = [max(1, round(s * f)) for s, f in zip(given, factors, strict=True)] if given else []
    stride = tuple(steps[axis] for axis in order) if steps else None
    train = preset["train"]
    published = row.iterations or train["epochs"] * train["iterations_per_epoch"]
    total = max(1, round(published * request.budget))
    epochs = max(1, round(total / EPOCH))
    settings = {**_shrunk(train.get("set", {}), request.budget), **row.set}
    words = tuple(f"{key}={_word(value)}" for key, value in settings.items())
    words += request.settings
    # tables share the data set with all labels; rows of one name share a run only if they are as long
    length = f"-i{published}" if row.share == "all" else ""
    return Recipe(
        row,
        section["configuration"],
        patch,
        stride,
        spacing,
        plans_name(section, patch, spacing),
        epochs,
        max(1, round(total / epochs)),
        f"{table.paper.replace('_', '-')}-{row.slug}{length}-b{request.budget:g}{request.tag}",
        words,
        request,
    )


def without(words: Sequence[str], *flags: str) -> list[str]:
    """Return a command's words without some flags and the word after each."""
    drop = {i + k for i, word in enumerate(words) if word in flags for k in (0, 1)}
    return [word for i, word in enumerate(words) if i not in drop]


def plans_name(section: dict[str, Any], patch: tuple[int, ...], spacing: tuple[float, ...] | None) -> str:
    """Return a plans name that says what a preset's plan section and the spacing make of the plan."""
    tokens = ["nnUNetPlans", "p" + "x".join(map(str, patch))]
    if spacing:
        tokens.append("s" + "x".join(f"{v:g}".replace(".", "-") for v in spacing))
    tokens.append(f"b{section['batch_size']}")
    rest = {key: section[key] for key in ("network", "normalization", "base_features") if key in section}
    return "_".join([*tokens, digest(rest)] if rest else tokens)


def _factors(table: Table, request: Request, axes: int) -> tuple[float, ...]:
    """Return voxels of our grid per voxel of the paper's, one number an axis of the patch, in the paper's order."""
    if request.spacing is None or table.spacing is None:
        return (1.0,) * axes
    factors = [theirs / ours for theirs, ours in zip(table.spacing, request.spacing, strict=True)]
    return tuple(factors[axis] for axis in _transposed(table.spacing)[-axes:])


def _order(table: Table, request: Request, axes: int) -> list[int]:
    """Return which of the patch's axes, in the paper's order, is each axis of the plan at our spacing.

    Raises:
        UserError: if 2D slices would be cut across another axis than the paper's.
    """
    if request.spacing is None or (table.spacing is None and axes == 3):  # unknown: the preset's order is kept
        return list(range(axes))
    theirs, ours = _transposed(table.spacing or (1.0, 1.0, 1.0)), _transposed(request.spacing)
    if axes == 3:
        return [theirs.index(axis) for axis in ours]
    if theirs[0] != ours[0]:
        rule = "2D slices are cut across the axis with the largest --spacing, which must be the paper's (of z, y, x)"
        raise UserError(rule, f"axis {'zyx'[ours[0]]}", f"axis {'zyx'[theirs[0]]}", "mend --spacing")
    return list(range(axes))


def _transposed(spacing: Sequence[float]) -> list[int]:
    """Return the order of nnU-Net's plan: the axis (0 for z) of the largest spacing first, the others as they are."""
    first = max(range(len(spacing)), key=spacing.__getitem__)
    return [first, *(axis for axis in range(len(spacing)) if axis != first)]


def _shrunk(settings: dict[str, Any], budget: float) -> dict[str, Any]:
    """Return the settings that count iterations, by the budget; nothing at the paper's own."""
    counted = {key: settings[key] for key in ITERATION_SETTINGS if settings.get(key)}
    return {key: max(1, round(value * budget)) for key, value in counted.items()} if budget != 1 else {}


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def digest(value: Any) -> str:
    """Return a short name of a JSON value."""
    return "h" + hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:6]
