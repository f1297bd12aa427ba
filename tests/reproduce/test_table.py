"""The tables hold the papers' numbers, and only rows, presets, settings, splits and protocols that exist."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nnssl.errors import UserError
from nnssl.evaluation.protocols import PROTOCOLS
from nnssl.reproduce import table as module
from nnssl.reproduce.table import Row, Table, explain, find_table, misprint, papers, tables_of

TABLES = [table for paper in papers() for table in tables_of(paper).values()]
RUNNABLE = [(table, row) for table in TABLES for row in table.rows if row.trainer]
PUBLISHED = Path(module.__file__).parents[1] / "dataset_conversion" / "published"

#: (paper, table, row): numbers as the papers print them, typed from the papers and not taken from the files.
PRINTED = {
    ("diffcl", "LA-4", "Diff-CL"): (89.03, 80.35, 6.36, 2.18),
    ("diffcl", "LA-8", "Diff-CL"): (91.00, 83.54, 5.08, 1.68),
    ("diffcl", "LA-4", "V-Net (supervised)"): (52.55, 39.60, 47.05, 9.87),
    ("diffcl", "LA-8", "V-Net (supervised), all labels"): (91.62, 84.60, 5.40, 1.64),
    ("diffcl", "BraTS-25", "Diff-CL"): (84.63, 75.05, 12.08, 3.73),
    ("diffcl", "BraTS-50", "Diff-CL"): (85.45, 75.88, 9.05, 2.60),
    ("diffcl", "Pancreas-6", "Diff-CL"): (78.21, 64.80, 14.11, 3.26),
    ("diffcl", "Pancreas-12", "Diff-CL"): (81.27, 68.87, 9.32, 2.16),
    ("diffrect", "ACDC-1", "DiffRect"): (71.85, 61.53, 5.79, 2.12),
    ("diffrect", "ACDC-3", "DiffRect"): (82.46, 71.76, 7.18, 1.94),
    ("diffrect", "ACDC-7", "DiffRect"): (89.27, 81.13, 3.85, 1.00),
    ("diffrect", "ACDC-1-val", "DiffRect"): (82.40, 71.96, 10.04, 2.90),
    ("diffrect", "ACDC-3-val", "FixMatch"): (83.12, 73.59, 9.86, 2.61),
    ("diffrect", "MSCMR-7-own1", "DiffRect"): (86.78, 77.13, 6.39, 1.85),
    ("diffrect", "Prostate-2-own2", "DiffRect"): (62.23, 48.64, 10.36, 3.41),
    ("generic_ssl", "LA-4", "A&D"): (89.93, 81.82, 5.25, 1.86),
    ("generic_ssl", "LA-8", "A&D"): (90.31, 82.40, 5.55, 1.64),
    ("generic_ssl", "Synapse-4", "A&D"): (60.88, 2.52),
    ("generic_ssl", "MMWHS-MR2CT", "A&D"): (90.1, 1.7),
    ("generic_ssl", "MMWHS-CT2MR", "A&D"): (71.4, 7.9),
    ("generic_ssl", "MnMs-A-2", "A&D"): (79.62,),
    ("generic_ssl", "MnMs-D-5", "A&D"): (83.90,),
    ("generic_ssl", "MnMs-avg-2", "vMFNet"): (78.43,),
    ("protodiff", "Endoscapes-GT", "prototype diffusion (Xi et al.)"): (55.33,),
    ("protodiff", "Endoscapes-GT+Pseudo", "MedSegDiff"): (51.53,),
    ("protodiff", "MOSXAV-test", "prototype diffusion (Xi et al.)"): (43.04,),
}
#: Shape of the printed tables: paper -> table -> rows.
ROWS = {
    "diffcl": {"LA": 12, "BraTS": 12, "Pancreas": 12},
    "diffrect": {"ACDC": 8, "MSCMR": 8, "Prostate": 8},
    "generic_ssl": {"Synapse": 14, "MnMs": 8},
    "protodiff": {"Endoscapes": 8, "MOSXAV": 8},
}


@pytest.mark.parametrize(("where", "numbers"), PRINTED.items())
def test_reported_numbers_are_the_papers(where, numbers):
    paper, name, method = where
    table = find_table(paper, name)
    reported = dict(zip(table.metrics, table.row(method).reported, strict=True))
    assert tuple(v for v in reported.values() if v is not None) == numbers


@pytest.mark.parametrize("table", TABLES, ids=lambda t: f"{t.paper}-{t.name}")
def test_tables_are_whole(table: Table):
    assert {len(row.reported) for row in table.rows} == {len(table.metrics)}
    assert len({row.slug for row in table.rows}) == len(table.rows)
    assert table.protocol in PROTOCOLS
    assert table.cases in ("test", "val")
    assert table.flaws, "every published protocol has known flaws"
    assert len(explain("flaws", table.flaws) + explain("differs", table.differs)) == len(table.flaws + table.differs)
    assert ("label-cut crop" in table.flaws or "depth cut by label" in table.flaws) == (table.crop is not None)
    rows = ROWS[table.paper].get(table.name.split("-")[0])
    assert rows is None or len(table.rows) == rows
    assert table.why == "" or not any(row.trainer for row in table.rows)


def test_every_explanation_is_used():
    known = json.loads((module.FOLDER / "flaws.json").read_text(encoding="utf-8"))
    for kind, names in known.items():
        assert set(names) == {name for table in TABLES for name in getattr(table, kind)}


def test_a_flaw_of_one_direction_stands_under_that_direction():
    text = "CT to MR"
    for table in TABLES:
        directed = [line for line in explain("flaws", table.flaws) if text in line]
        assert bool(directed) == (table.name == "MMWHS-CT2MR")


def test_splits_that_ship_with_the_package_are_those_of_the_tables():
    shipped: dict[str, set[str]] = {}
    for path in PUBLISHED.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        shipped[content["dataset"]] = set(content["protocols"])
    for table in TABLES:
        if table.published and shipped.get(table.dataset):
            assert table.published in shipped[table.dataset]


@pytest.mark.parametrize(("table", "row"), RUNNABLE, ids=lambda x: x.slug if isinstance(x, Row) else x.name)
def test_rows_name_presets_and_settings_that_exist(table: Table, row: Row):
    from nnssl.plans.preset import load_preset
    from nnssl.trainers.presets import train_section
    from nnssl.trainers.registry import trainer_class

    settings, options = train_section(row.preset, row.trainer)
    trainer_class(row.trainer).settings_class.from_mapping({**settings, **row.set})
    assert row.iterations or options.keys() >= {"epochs", "iterations_per_epoch"}
    assert load_preset(row.preset)["plan"]["patch_size"]
    assert row.share in ("few", "all")


def test_no_method_that_exists_here_is_reported_only():
    from nnssl.trainers.registry import TRAINERS

    known = {name for info in TRAINERS.values() for name in info.method.split(", ")}
    left = {row.method for table in TABLES if not table.why for row in table.rows if row.trainer is None}
    assert not [method for method in left if method.split(" (")[0] in known]


def test_methods_that_change_the_network_run_on_the_planned_one():
    """Their own blocks go into the network that nnU-Net plans, which takes a preset without a network."""
    from nnssl.plans.preset import load_preset

    own = {"MCNet", "DTC", "SASSNet", "URPC", "CAML", "MLRPL", "SSNet", "INCL", "DST"}
    for _, row in RUNNABLE:
        if row.trainer.removesuffix("Trainer") in own:
            assert "network" not in load_preset(row.preset)["plan"], row.method


def test_misprints_are_found_and_nothing_else():
    found = {(t.name, r.method) for t in TABLES for r in t.rows if misprint(t, r)}
    assert found == {("LA-8", "SASSNet"), ("BraTS-50", "URPC"), ("Pancreas-6", "URPC"), ("Pancreas-12", "URPC")}


def test_a_dice_and_jaccard_of_one_mask_are_no_misprint():
    table = find_table("diffcl", "LA-4")
    row = Row("x", "", (80.0, 100 * 0.8 / 1.2, None, None))
    assert misprint(table, row) == ""
    assert "66.67" in misprint(table, replace(row, reported=(80.0, 66.5, None, None)))


def test_names_are_found_in_any_case_and_the_nearest_are_named():
    table = find_table("diffcl", "la-4")
    assert table.row("MC-NET+") == table.row("mc-net-plus") != table.row("MC-Net")
    with pytest.raises(UserError, match=r"--row must name a row of diffcl LA-4; got 'CAMEL'; allowed nearest: .*CAML"):
        table.row("CAMEL")
    with pytest.raises(UserError, match="LA-4"):
        find_table("diffcl", "LA-5")
    with pytest.raises(UserError, match="diffcl"):
        find_table("diffcll", "LA-4")
