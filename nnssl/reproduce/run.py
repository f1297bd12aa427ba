"""Run rows of a published table and put the results beside the reported numbers."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from nnssl.demo.steps import StepRunner
from nnssl.errors import UserError
from nnssl.evaluation.report import to_json, write_files
from nnssl.layout import VARIABLES, RawDataset, variable
from nnssl.reproduce.chain import STEPS_OF_A_SEED, Chain
from nnssl.reproduce.data import SubsetPlan, plan_subset, require_references, test_tag
from nnssl.reproduce.recipe import Recipe, Request, make_recipe
from nnssl.reproduce.results import as_data, as_text, row_result, tags
from nnssl.reproduce.table import Row, Table, papers, tables_of
from nnssl.training.signals import EXIT_STOPPED, leave_when_asked


@dataclass
class Work:
    """Rows of a table that are run on the same subset.

    Args:
        subset: the subset.
        recipes: how each row is run.
    """

    subset: SubsetPlan
    recipes: list[Recipe] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """One call of ``nnssl_reproduce``.

    Args:
        table: the table.
        rows: the rows to run; those without a trainer are reported only.
        request: budget, seeds and the like.
        source: id or name of the converted data set; None: it is looked for.
        test_ids: ids of a substitute test set; None: the published one.
        root: folder for predictions, scores, logs and tables.
    """

    table: Table
    rows: tuple[Row, ...]
    request: Request
    source: str | None
    test_ids: tuple[str, ...] | None
    root: Path


def default_root() -> Path:
    """Return the folder that holds everything but data sets and models; nnU-Net's variables must be set.

    Raises:
        UserError: if one of them is unset.
    """
    return [variable(name) for name in VARIABLES][-1] / "nnssl_reproduce"


def run_job(job: Job, stream: TextIO | None = None) -> None:
    """Run what is left of the job's rows; see :mod:`nnssl.reproduce.chain`.

    Raises:
        UserError: for data, splits or rows that are not there, and for a step that fails.
        SystemExit: when asked to stop, with exit code 75; a training saves its state first.
    """
    works = _works(job, [row for row in job.rows if row.trainer])
    seeds = len(job.request.seeds)
    plans = sum(len({r.plans for r in work.recipes}) for work in works)
    total = len(works) + plans + STEPS_OF_A_SEED * seeds * sum(len(work.recipes) for work in works)
    logs = job.root / "logs" / f"{job.table.paper}_{job.table.name}"
    runner = StepRunner(logs, total, stream, f"nnssl_reproduce {job.table.paper} {job.table.name}")
    chain = Chain(job.table, job.root, runner)
    with leave_when_asked(EXIT_STOPPED):  # the same call goes on
        for work in works:
            _run_work(chain, work, job.request)


def _run_work(chain: Chain, work: Work, request: Request) -> None:
    dataset = chain.subset(work.subset, request.processes)
    planned: set[str] = set()
    for recipe in work.recipes:
        if recipe.plans not in planned:
            chain.plan(recipe, dataset)
            planned.add(recipe.plans)
        for seed in request.seeds:
            chain.seed(recipe, dataset, seed)


def compare(job: Job) -> str:
    """Write and return the table: reported numbers of every row, ours as far as they are there."""
    data_sets: dict[str, RawDataset | None] = {}
    missing: dict[str, str] = {}
    for share in dict.fromkeys(row.share for row in job.table.rows if row.trainer):
        with contextlib.suppress(UserError):  # without its data nothing was run, and the reported numbers stand alone
            subset = plan_subset(job.table, share, job.source, job.test_ids)
            data_sets[share], missing[share] = subset.existing(), subset.missing()
    chain = Chain(job.table, job.root, StepRunner(job.root / "logs", 0))
    rows = []
    for row in job.table.rows:
        dataset = data_sets.get(row.share) if row.trainer else None
        recipe = make_recipe(job.table, row, job.request) if row.trainer else None
        seeds = job.request.seeds if recipe and dataset else ()
        places = [chain.place(recipe, dataset, seed) for seed in seeds] if recipe and dataset else []
        marks = tags(job.table, job.request, dataset, job.test_ids is not None, missing.get(row.share, ""))
        rows.append(row_result(job.table, row, recipe, places, marks))
    data = as_data(job.table, job.request, rows, _voxel(job.table, data_sets.get("few")))
    text = as_text(data)
    stem = job.root / "tables" / _table_name(job)
    write_files({stem.with_name(stem.name + ".json"): to_json(data), stem.with_name(stem.name + ".txt"): text + "\n"})
    return text


def commands(table: Table, rows: Sequence[Row], rest: Sequence[str]) -> list[str]:
    """Return one command a row, independent of the others; rows that can't be run stand as comments."""
    lines = []
    for row in rows:
        words = shlex.join(["nnssl_reproduce", table.paper, table.name, "--row", row.slug, *rest])
        lines.append(words if row.trainer else f"# reported only: {table.paper} {table.name}, {row.method}")
    return lines


def all_tables() -> list[str]:
    """Return one line a table: paper, name, data set, rows."""
    lines = []
    for paper in papers():
        for table in tables_of(paper).values():
            runnable = sum(row.trainer is not None for row in table.rows)
            lines.append(f"{paper} {table.name}: {table.dataset}, {runnable} of {len(table.rows)} rows can be run")
    return lines


def _works(job: Job, rows: Sequence[Row]) -> list[Work]:
    """Group rows by the subset they need."""
    works: dict[str, Work] = {}
    for row in rows:
        recipe = make_recipe(job.table, row, job.request)
        if row.share not in works:
            works[row.share] = Work(plan_subset(job.table, row.share, job.source, job.test_ids))
        works[row.share].recipes.append(recipe)
    return list(works.values())


def _voxel(table: Table, dataset: RawDataset | None) -> list[float] | None:
    """Return the voxel size in mm (z, y, x) of the first reference; None without one."""
    from nnssl.evaluation.masks import list_masks, read_mask

    if dataset is None:
        return None
    try:
        first = next(iter(list_masks(require_references(table, dataset)[1]).values()))
    except UserError:
        return None
    mask = read_mask(first)
    return [round(v, 4) for v in mask.spacing] if mask.has_spacing else None


def _table_name(job: Job) -> str:
    """Return a name that all that decides our numbers is in, so that no call's table replaces another's."""
    request = job.request
    # a job of one row, as --list prints them, writes the table of all: the rows are not in the name
    parts: list[Any] = [job.table.paper, job.table.name, f"b{request.budget:g}", _seeds(request.seeds)]
    if request.spacing:
        parts.append("s" + "x".join(f"{v:g}" for v in request.spacing))
    if job.test_ids:
        parts.append(test_tag(job.test_ids))
    return "_".join(map(str, parts)) + request.tag


def _seeds(seeds: Sequence[int]) -> str:
    """Return ``seeds3`` for seeds 0 to 2, ``seed5`` for the seed 5 alone."""
    if seeds == tuple(range(len(seeds))) and len(seeds) > 1:
        return f"seeds{len(seeds)}"
    return "seed" + "-".join(map(str, seeds))
