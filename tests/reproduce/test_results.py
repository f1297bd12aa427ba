"""Means and spread over seeds, tags and text of a comparison; what the command prints without running anything."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnssl.cli.reproduce import build_parser, main
from nnssl.reproduce.chain import Place
from nnssl.reproduce.recipe import Request, make_recipe
from nnssl.reproduce.results import as_data, as_text, over_seeds, read_scores, row_result, tags
from nnssl.reproduce.run import commands
from nnssl.reproduce.table import find_table, papers, tables_of

LA = find_table("diffcl", "LA-4")


def write_scores(path: Path, dice: float, hd95: float | None) -> None:
    values = {"dice": dice, "jaccard": dice / 2, "hd95": hd95, "asd": 1.5, "assd": 1.25}
    path.write_text(json.dumps({"foreground_mean": values, "miou": {"mean": 0.75}}))


def test_mean_and_sample_deviation_over_seeds():
    scores = [{"dice": 80.0, "hd95": 4.0}, {"dice": 84.0, "hd95": None}, {"dice": 88.0, "hd95": None}]
    assert over_seeds(scores, "dice") == {"mean": 84.0, "sd": 4.0, "n": 3}
    assert over_seeds(scores, "hd95") == {"mean": 4.0, "sd": None, "n": 1}
    assert over_seeds([], "dice") == {"mean": None, "sd": None, "n": 0}


def test_shares_are_in_percent_and_distances_as_they_are(tmp_path):
    write_scores(tmp_path / "x.json", 0.5, 6.25)
    assert read_scores(tmp_path / "x.json", ("dice", "hd95", "miou")) == {"dice": 50.0, "hd95": 6.25, "miou": 75.0}
    assert read_scores(tmp_path / "absent.json", ("dice",)) is None


def test_our_numbers_stand_beside_the_reported_ones(tmp_path):
    row = LA.row("Diff-CL")
    places = [Place(tmp_path / str(seed), "test") for seed in range(3)]
    for seed, place in enumerate(places[:2]):
        place.folder.mkdir()
        write_scores(place.scores("paper"), 0.80 + 0.04 * seed, 7.0)
        write_scores(place.scores("mm"), 0.80 + 0.04 * seed, None)
    recipe = make_recipe(LA, row, Request())
    ours = row_result(LA, row, recipe, places, ["substitute test", "label-cut crop"])
    other = row_result(LA, LA.row("CAML"), recipe, [], [])
    unknown = row_result(LA, LA.row("DTC"), None, [], [])
    text = as_text(as_data(LA, Request(), [ours, other, unknown], (1.0, 1.0, 1.0)))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "Diff-CL 4/76 reported 89.03 80.35 6.36 2.18" in lines
    assert (
        "here, literature-la 82.00 ± 2.83 41.00 ± 1.41 7.00 ± 0.00 1.50 ± 0.00 2 substitute test, label-cut crop"
        in lines
    )
    assert "here, mm 82.00 ± 2.83 41.00 ± 1.41 - 1.25 ± 0.00 2 substitute test, label-cut crop" in lines
    assert "here, literature-la 0 not run yet" in lines
    assert "DTC 4/76 reported 82.75 71.55 13.77 3.91 reported only: no such trainer in nnssl" in lines
    assert any(
        "A voxel of these files is 1 x 1 x 1 mm, one of the paper's 0.625 x 0.625 x 0.625 mm" in x for x in lines
    )
    assert sum(line.startswith("- ") for line in lines) == len(LA.flaws) + len(LA.differs)


def test_misprints_are_named_beside_the_number():
    table = find_table("diffcl", "LA-8")
    rows = [row_result(table, table.row("SASSNet"), None, [], [])]
    assert "misprint: Jaccard can't be below 78.25" in as_text(as_data(table, Request(), rows, None))


@pytest.mark.parametrize(
    ("nnssl", "tag"),
    [
        ({}, "label-cut crop"),
        ({"source": "LA", "layout": "UA-MT", "provenance": "label-cut crop: each scan ..."}, "label-cut crop"),
        ({"source": "LA", "layout": "challenge"}, "whole scans, the paper's are cut around the label"),
    ],
)
def test_tags_say_what_differs_in_data_and_budget(nnssl, tag):
    dataset = SimpleNamespace(nnssl=nnssl)
    assert tags(LA, Request(), dataset, False) == [tag]
    small = Request(0.05, (0,), (1.25, 1.25, 1.25), ("eta=1",))
    expected = ["substitute test", tag, "budget 0.05", "trained at 1.25 x 1.25 x 1.25 mm", "eta=1"]
    assert tags(LA, small, dataset, True) == expected
    assert tags(find_table("diffrect", "ACDC-3"), Request(), dataset, False) == []


def test_list_prints_one_independent_command_a_row(capsys):
    call = ["diffcl", "LA-4", "--budget", "0.05", "--spacing", "1.25", "1.25", "1.25", "-device", "cpu"]
    assert main([*call, "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(LA.rows) == len(set(lines))
    for line, row in zip(lines, LA.rows, strict=True):
        name, *words = line.split()
        args = build_parser().parse_args(words)
        assert (name, args.paper, args.table) == ("nnssl_reproduce", "diffcl", "LA-4")
        assert LA.row(*args.row) == row
        assert (args.budget, args.spacing, args.device, args.seeds) == (0.05, [1.25] * 3, "cpu", 3)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--row", "Diff-CL", "DTC", "diff-cl"],
        ["--row", "CAML", "--set", "eta=0.1", "a=[1, 2]", "--set", "b=1e-7"],
        ["--budget", "0.123456789", "--seeds", "1", "--spacing", "1.2345678", "1", "1e-3", "-np", "1"],
        ["--seed", "0", "-num_gpus", "2", "-device", "cpu", "--precision", "fp32", "-d", "1"],
        ["-o", "out put", "--test_ids", "some where/ids.txt"],
    ],
)
def test_every_listed_command_repeats_the_call_for_one_of_its_rows(options, capsys):
    call = ["diffcl", "LA-4", *options]
    assert main([*call, "--list"]) == 0
    asked = vars(build_parser().parse_args(call))
    rows = list(dict.fromkeys(LA.row(name).slug for name in asked["row"] or [row.method for row in LA.rows]))
    lines = capsys.readouterr().out.splitlines()
    for line, row in zip(lines, rows, strict=True):
        told = vars(build_parser().parse_args(shlex.split(line)[1:]))
        paths = {key: value.resolve() for key, value in asked.items() if isinstance(value, Path)}
        assert told == asked | paths | {"row": [row]}


def test_rows_that_can_not_be_run_are_comments_in_the_list():
    table = find_table("generic_ssl", "LA-8")
    lines = commands(table, table.rows, ["--seed", "1"])
    only = [line for line in lines if line.startswith("#")]
    assert only == [f"# reported only: generic_ssl LA-8, {name}" for name in ("LMISA-3D", "vMFNet")]
    assert len(lines) == len(table.rows)


def test_list_without_a_table_shows_all(capsys):
    assert main(["--list"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) == sum(len(tables_of(paper)) for paper in papers())
    assert main(["diffrect", "--list"]) == 0
    assert "nnssl_reproduce diffrect Prostate-2-own1 --row ict\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ([], "PAPER and TABLE"),
        (["diffcl"], "no TABLE"),
        (["diffcl", "LA-5"], "LA-4"),
        (["diffcl", "LA-4", "--row", "CAMEL"], "nearest: CAML"),
        (["diffcl", "LA-4", "--seeds", "0"], "--seeds"),
        (["diffcl", "LA-4", "--set", "eta=1"], "--set belongs to one row"),
        (["diffcl", "LA-4", "--set", "eta=1", "--list"], "--set belongs to one row"),
        (["diffcl", "--row", "DTC", "--list"], "no TABLE"),
        (["diffcl", "LA-4", "--row", "diff-cl", "--set", "eta"], "KEY=VALUE"),
        (["diffcl", "LA-4", "--budget", "-1"], "--budget"),
        (["diffcl", "LA-4"], "nnssl_convert LA SRC -d ID"),
    ],
)
def test_refusals_are_one_line(call, words, tmp_path, monkeypatch, capsys):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path))
    assert main(call) == 2
    error = capsys.readouterr().err
    assert error.startswith("nnssl_reproduce: error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (["generic_ssl", "MnMs-avg-2"], "reported only: the mean of the tables MnMs-A to MnMs-D"),
        (["generic_ssl", "LA-8", "--row", "vMFNet"], "reported only: no such trainer in nnssl"),
        (["diffcl", "LA-4", "--report"], "89.03"),
    ],
)
def test_reported_numbers_are_printed_without_any_data(call, words, tmp_path, monkeypatch, capsys):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path))
    assert main(call) == 0
    text = capsys.readouterr().out
    assert words in text
    assert "±" not in text.split("Ours:")[0]


def test_no_call_replaces_the_table_of_a_call_with_another_request(tmp_path, monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path))
    ids = tmp_path / "ids.txt"
    ids.write_text("a\n")
    row = ["--row", "CAML"]
    calls = [
        [],
        ["--seeds", "1"],
        ["--seeds", "2"],
        ["--seed", "2"],
        ["--budget", "0.5"],
        ["--precision", "bf16"],
        [*row, "--set", "eta=1"],
        [*row, "--set", "eta=2"],
        ["--spacing", "1", "1", "1"],
        ["--test_ids", str(ids)],
    ]
    for number, options in enumerate(calls, start=1):
        assert main(["diffcl", "LA-4", *options, "--report", "-o", str(tmp_path / "o")]) == 0
        assert len(list((tmp_path / "o" / "tables").glob("*.json"))) == number
    for same in (row, ["-device", "cpu", "-np", "2"], ["--seeds", "3"]):
        assert main(["diffcl", "LA-4", *same, "--report", "-o", str(tmp_path / "o")]) == 0
        assert len(list((tmp_path / "o" / "tables").glob("*.json"))) == len(calls)


def test_listing_loads_no_torch():
    call = "from nnssl.cli.reproduce import main; main(['diffcl', 'LA-4', '--list'])"
    code = f"import sys; {call}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
