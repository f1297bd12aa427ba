"""How a row is run: length by the budget, patch and strides by the spacing, one plan name a plan, words that parse."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest

from nnssl.errors import UserError
from nnssl.reproduce.recipe import Request, _transposed, make_recipe, plans_name
from nnssl.reproduce.table import find_table, papers, tables_of

RUNNABLE = [(t, r) for paper in papers() for t in tables_of(paper).values() for r in t.rows if r.trainer]


def recipe(name: str = "LA-4", method: str = "Diff-CL", paper: str = "diffcl", **request):
    table = find_table(paper, name)
    return make_recipe(table, table.row(method), Request(**request))


@pytest.mark.parametrize(
    ("budget", "iterations"), [(1.0, 11_400), (0.05, 570), (0.0005, 6), (1e-9, 1), (0.021, 240), (2.0, 22_800)]
)
def test_the_budget_scales_the_iterations(budget, iterations):
    found = recipe(budget=budget)
    assert abs(found.iterations - iterations) <= found.epochs / 2
    assert found.iterations == iterations or budget == 0.021  # 239.4 steps in 2 epochs of 120
    assert found.per_epoch <= 150


def test_without_another_spacing_patch_and_strides_are_the_papers():
    found = recipe()
    assert (found.patch, found.stride, found.spacing) == ((80, 112, 112), (4, 18, 18), (0.625, 0.625, 0.625))
    same = recipe(spacing=(0.625, 0.625, 0.625))
    assert (same.patch, same.stride, same.plans) == (found.patch, found.stride, found.plans)


def test_patch_and_strides_keep_their_extent_at_another_spacing():
    found = recipe(spacing=(1.25, 1.25, 1.25))
    assert found.patch == (48, 64, 64)  # 50, 70 and 70 mm are 40, 56 and 56 voxels; the next multiples of 16
    assert found.stride == (2, 9, 9)
    coarse = recipe(spacing=(5.0, 20.0, 20.0))
    assert coarse.patch == (16, 16, 16)
    assert coarse.stride == (1, 1, 1)
    anisotropic = recipe("BraTS-25", spacing=(3.0, 1.0, 1.0))
    assert (anisotropic.patch, anisotropic.stride) == ((32, 96, 96), (21, 64, 64))


def test_patch_and_strides_follow_the_axes_that_the_plan_transposes():
    """nnU-Net puts the axis of the largest spacing first."""
    coarse_x = recipe("BraTS-25", spacing=(1.0, 1.0, 3.0))
    assert (coarse_x.patch, coarse_x.stride) == ((32, 96, 96), (21, 64, 64))
    coarse_y = recipe(spacing=(0.625, 1.25, 0.625))  # (z, y, x) 80, 56 and 112 voxels; strides 4, 9 and 18
    assert (coarse_y.patch, coarse_y.stride) == ((64, 80, 112), (9, 4, 18))
    with pytest.raises(UserError, match=r"2D slices .*; got axis x; allowed axis z; do: mend --spacing"):
        recipe("ACDC-3", "DiffRect", "diffrect", spacing=(1.0, 1.0, 5.0))


def test_the_order_of_axes_is_nnunets():
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    for spacing in ((1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (1.0, 3.0, 2.0), (1.0, 1.0, 3.0), (1.0, 2.0, 2.0)):
        planner = SimpleNamespace(suppress_transpose=False, determine_fullres_target_spacing=lambda s=spacing: s)
        assert _transposed(spacing) == ExperimentPlanner.determine_transpose(planner)[0]


def test_a_table_without_a_grid_keeps_its_patch():
    found = recipe("ACDC-3", "DiffRect", "diffrect", spacing=(10.0, 2.0, 2.0))
    assert (found.patch, found.stride, found.spacing) == ((256, 256), None, (10.0, 2.0, 2.0))


def test_iteration_counts_among_the_settings_shrink_with_the_budget():
    assert not any("rect_start_iteration" in word for word in recipe("ACDC-3", "DiffRect", "diffrect").settings)
    assert "rect_start_iteration=50" in recipe("ACDC-3", "DiffRect", "diffrect", budget=0.05).settings
    proto = "prototype diffusion (Xi et al.)"
    assert "warmup=75" in recipe("MOSXAV-val", proto, "protodiff", budget=0.05).settings


def test_own_settings_come_last_and_name_another_run():
    plain, own = recipe(), recipe(settings=("eta=0.1",))
    assert own.settings[-1] == "eta=0.1"
    assert recipe(method="UA-MT", settings=("dropout=0.2",)).settings[-1] == "dropout=0.2"
    assert own.run != plain.run
    assert own.run == recipe(settings=("eta=0.1",)).run


def test_rows_with_one_plan_share_its_name_and_others_do_not():
    assert recipe(method="DTC").plans == recipe(method="MC-Net").plans == recipe().plans
    assert recipe(method="UA-MT").plans != recipe(method="DTC").plans  # the V-Net
    names = {recipe(spacing=s).plans for s in (None, (1.25, 1.25, 1.25), (1.25, 1.25, 1.0))}
    assert len(names) == 3
    section = {"batch_size": 2, "normalization": "NoNormalization"}
    assert plans_name(section, (8, 8), None) != plans_name({"batch_size": 2}, (8, 8), None)


@pytest.mark.parametrize("spacing", [None, (4.0, 2.0, 2.0)])
def test_rows_that_share_a_plan_share_its_record_and_others_do_not(spacing):
    presets: dict[str, set[str]] = {}
    records: dict[str, dict] = {}
    for paper in papers():
        for table in tables_of(paper).values():
            for row in (r for r in table.rows if r.trainer):
                processes = len(presets.get(row.preset, ())) + 1  # the machine's matter, as is the preset's name
                found = make_recipe(table, row, Request(spacing=spacing, processes=processes))
                assert found.plan_record("D") == records.setdefault(found.plans, found.plan_record("D"))
                presets.setdefault(found.plans, set()).add(str(row.preset))
    assert any(len(names) > 1 for names in presets.values()), "no two presets share a plan: nothing was tested"
    assert len({json.dumps(record) for record in records.values()}) == len(records)


def test_a_preset_that_plans_otherwise_has_another_record(tmp_path):
    table = find_table("diffcl", "LA-4")
    row, own = table.row("Diff-CL"), tmp_path / "own.json"
    before = recipe().plan_record("D")
    own.write_text(json.dumps({"extends": row.preset, "train": {"set": {"eta": 0.5}}}))
    assert make_recipe(table, replace(row, preset=str(own)), Request()).plan_record("D") == before
    own.write_text(json.dumps({"extends": row.preset, "plan": {"spacing": [1, 1, 1]}}))
    assert make_recipe(table, replace(row, preset=str(own)), Request()).plan_record("D") != before


def test_runs_of_one_table_never_meet():
    for paper in papers():
        for table in tables_of(paper).values():
            rows = [make_recipe(table, row, Request()) for row in table.rows if row.trainer]
            assert len({(r.plans, r.row.trainer, r.run) for r in rows}) == len(rows)
    every = [make_recipe(t, row, Request()) for t, row in RUNNABLE if row.share == "all"]  # tables share that data set
    runs: dict[tuple, list[str]] = {}
    for found in every:
        words = runs.setdefault((found.plans, found.row.trainer, found.run), found.train_words("D", 0))
        assert words == found.train_words("D", 0)
    assert len(runs) < len(every), "no two tables share a run: nothing was tested"
    assert recipe(budget=0.5).run != recipe(budget=0.25).run
    assert recipe().name(0) != recipe().name(1)


@pytest.mark.parametrize(("table", "row"), RUNNABLE, ids=lambda x: getattr(x, "slug", None) or x.name)
def test_words_are_understood_by_the_commands(table, row):
    from nnssl.trainers.runs import plans_name_of_run

    spacing = (4.0, 2.0, 2.0)
    found = make_recipe(table, row, Request(0.01, (0,), spacing, (), "cpu", 1, "bf16", 1))
    commands = {
        "plan_and_preprocess": found.plan_words("Dataset800_X"),
        "train": found.train_words("Dataset800_X", 0),
        "predict": found.predict_words("Dataset800_X", 0, "in", "out", True),
    }
    for module, words in commands.items():
        assert words[0] == f"nnssl_{module}"
        args = import_module(f"nnssl.cli.{module}").build_parser().parse_args(words[1:])
        if module == "plan_and_preprocess":
            from nnssl.cli.plan_and_preprocess import planning_options

            options, configurations = planning_options(args)
            assert configurations == [found.configuration]
            assert options.plans_name == found.plans
            assert options.spacing == spacing
    assert plans_name_of_run(found.plans, found.name(0))


def test_rows_without_a_trainer_are_refused():
    with pytest.raises(UserError, match=r"'vMFNet' is reported only; got no such trainer"):
        recipe("LA-8", "vMFNet", "generic_ssl")
    with pytest.raises(UserError, match="MnMs-A to MnMs-D"):
        recipe("MnMs-avg-2", "A&D", "generic_ssl")


@pytest.mark.parametrize(
    "bad",
    [{"budget": 0}, {"budget": float("nan")}, {"seeds": ()}, {"seeds": (-1,)}, {"spacing": (1.0, 0.0, 1.0)}],
)
def test_requests_out_of_range_are_refused(bad):
    with pytest.raises(UserError):
        Request(**bad)
    assert replace(Request(), budget=0.5).budget == 0.5
