"""Files and tables of an evaluation."""

from __future__ import annotations

import csv
import io
import os

import pytest

from nnssl.errors import UserError
from nnssl.evaluation.evaluate import evaluate_folders
from nnssl.evaluation.report import as_csv, result_table, to_json, write_files


def test_csv_has_one_row_per_case_and_class_with_empty_cells_for_undefined(folders):
    result = evaluate_folders(*folders, labels={"one": 1, "never": 9}, num_processes=1)
    rows = list(csv.DictReader(io.StringIO(as_csv({"run": result}))))
    assert len(rows) == 8
    by_class = {(r["case"], r["class"]): r for r in rows}
    assert float(by_class["case_2", "one"]["hd95"]) == pytest.approx(1.0)
    assert by_class["case_2", "never"]["dice"] == ""
    assert by_class["case_2", "never"]["empty"] == "both_empty"


def test_table_shows_units_means_and_counts(folders):
    result = evaluate_folders(*folders, labels={"one": 1, "never": 9}, num_processes=1)
    lines = result_table(result).splitlines()
    assert "HD95 (mm)" in lines[1]
    assert "NSD (1 mm)" in lines[1]
    one, never = lines[2].split(), lines[3].split()
    assert one[:4] == ["one", "0.6875", "±", "0.1614"]
    assert never == ["never", "-", "-", "-", "-", "-", "0", "4", "0"]
    voxels = result_table(evaluate_folders(*folders, protocol="literature-ad", num_processes=1))
    assert "ASD (voxel)" in voxels
    assert "NSD" not in voxels.splitlines()[1]


def test_nan_never_reaches_json():
    with pytest.raises(ValueError, match="JSON"):
        to_json({"dice": float("nan")})


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    first, second = tmp_path / "a.json", tmp_path / "a.csv"
    first.write_text("old")
    calls = []

    def full_disk(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="No space left"):
        write_files({first: "new", second: "new"})
    assert first.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json"]
    monkeypatch.undo()
    write_files({first: "new", tmp_path / "deep" / "b.csv": "new"})
    assert first.read_text() == (tmp_path / "deep" / "b.csv").read_text() == "new"
