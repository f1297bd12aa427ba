"""``nnssl_evaluate`` from the command line: files, tables, exit codes."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl.cli.evaluate import main


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    monkeypatch.setenv("nnUNet_def_n_proc", "1")


@pytest.fixture
def scans(tmp_path):
    """Return references and two predictions; class 2 is in no reference of case c0."""
    for case in range(3):
        labels = np.zeros((5, 10, 14), np.uint8)
        labels[1:4, 1:5, 2:8] = 1
        labels[1:4, 6:9, 2:8] = 2 if case else 0
        for folder, shift in (("ref", 0), ("good", 1), ("bad", 3)):
            (tmp_path / folder).mkdir(exist_ok=True)
            image = sitk.GetImageFromArray(np.roll(labels, shift, axis=2))
            image.SetSpacing((0.5, 1.0, 2.0))
            sitk.WriteImage(image, str(tmp_path / folder / f"c{case}.nii.gz"))
    return tmp_path


def strict_json(path):
    def refuse(token):
        raise AssertionError(f"{token} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_one_prediction_writes_beside_it(scans, capsys):
    assert main(["-ref", str(scans / "ref"), "-pred", str(scans / "good")]) == 0
    result = strict_json(scans / "good" / "nnssl_evaluation.json")
    assert result["cases"]["c1"]["2"]["hd95"] == pytest.approx(0.5)
    assert result["cases"]["c0"]["2"]["hd95"] is None
    rows = list(csv.DictReader((scans / "good" / "nnssl_evaluation.csv").open()))
    assert len(rows) == 6
    printed = capsys.readouterr().out
    assert "mean of classes" in printed
    assert "ASSD (mm)" in printed


def test_evaluating_again_does_not_trip_over_its_own_files(scans):
    arguments = ["-ref", str(scans / "ref"), "-pred", str(scans / "good")]
    assert main(arguments) == main(arguments) == 0


def test_several_predictions_are_compared(scans, capsys):
    out = scans / "new" / "result.json"
    folders = [str(scans / "good"), str(scans / "bad")]
    assert main(["-ref", str(scans / "ref"), "-pred", *folders, "-o", str(out)]) == 0
    data = strict_json(out)
    assert list(data["predictions"]) == ["good", "bad"]
    row = next(r for r in data["comparison"] if (r["metric"], r["label"]) == ("hd95", "1"))
    assert (row["first"], row["second"], row["n"]) == ("good", "bad", 3)
    assert row["mean_difference"] == pytest.approx(1.0)
    assert len(list(csv.DictReader(out.with_suffix(".csv").open()))) == 12
    assert not (scans / "good" / "nnssl_evaluation.json").exists()
    assert "too few" in capsys.readouterr().out
    assert main(["-ref", str(scans / "ref"), "-pred", *folders]) == 0
    assert strict_json(scans / "good" / "nnssl_comparison.json") == data["comparison"]


def test_djfile_names_the_classes(scans):
    dataset = scans / "dataset.json"
    dataset.write_text(json.dumps({"labels": {"background": 0, "all": [1, 2], "second": 2}}))
    out = scans / "o.json"
    arguments = ["-ref", str(scans / "ref"), "-pred", str(scans / "good"), "-djfile", str(dataset), "-o", str(out)]
    assert main(arguments) == 0
    assert list(strict_json(out)["mean"]) == ["all", "second"]


def test_djfile_brings_domains_into_table_csv_and_json(scans, capsys):
    dataset = scans / "dataset.json"
    block = {"domains": {"c0": "Siemens", "c1": "Philips", "c2": "Philips"}}
    dataset.write_text(json.dumps({"labels": {"background": 0, "one": 1, "two": 2}, "nnssl": block}))
    out, folders = scans / "o.json", [str(scans / "good"), str(scans / "bad")]
    arguments = ["-ref", str(scans / "ref"), "-pred", *folders, "-djfile", str(dataset), "-o", str(out)]
    assert main(arguments) == 0
    data = strict_json(out)
    for result in data["predictions"].values():
        assert list(result["domains"]) == ["Philips", "Siemens"]
        dice = [result["cases"][case]["one"]["dice"] for case in ("c1", "c2")]
        assert result["domains"]["Philips"]["mean"]["one"]["dice"] == pytest.approx(np.mean(dice))
    assert all(row["n"] + row["excluded"] == 3 for row in data["comparison"])  # pairs stay over all cases
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert {(row["case"], row["domain"]) for row in rows} == set(block["domains"].items())
    printed = capsys.readouterr().out
    assert printed.count("mean of classes, domain Philips") == 2
    assert main(["-ref", str(scans / "ref"), "-pred", str(scans / "good"), "-o", str(out)]) == 0
    assert "domain" not in out.with_suffix(".csv").read_text()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--protocol", "literature"], "--protocol"),
        (["-o", "result.txt"], "-o must name a .json"),
        (["-np", "0"], "-np"),
        (["--nsd_tolerance", "-1"], "--nsd_tolerance"),
        (["-djfile", "absent.json"], "-djfile"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(scans, capsys, extra, message):
    assert main(["-ref", str(scans / "ref"), "-pred", str(scans / "good"), *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nnssl_evaluate: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (scans / "good" / "nnssl_evaluation.json").exists()


def test_a_gap_in_any_folder_is_found_before_work_starts(scans, capsys):
    (scans / "bad" / "c1.nii.gz").unlink()
    assert main(["-ref", str(scans / "ref"), "-pred", str(scans / "good"), str(scans / "bad")]) == 2
    assert "for c1" in capsys.readouterr().err
    assert not (scans / "good" / "nnssl_evaluation.json").exists()


def test_compared_predictions_need_one_label_set(scans, capsys):
    (scans / "bad" / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "a": 1, "b": 2}}))
    assert main(["-ref", str(scans / "ref"), "-pred", str(scans / "good"), str(scans / "bad")]) == 2
    assert "same labels" in capsys.readouterr().err


def test_folders_of_one_name_are_told_apart_and_one_folder_twice_is_refused(scans, capsys):
    for run in ("run1", "run2"):
        shutil.copytree(scans / "good", scans / run / "out")
    out = scans / "o.json"
    folders = [str(scans / "run1" / "out"), str(scans / "run2" / "out")]
    assert main(["-ref", str(scans / "ref"), "-pred", *folders, "-o", str(out)]) == 0
    data = strict_json(out)
    assert list(data["predictions"]) == ["run1/out", "run2/out"]
    assert all(row["p"] == 1 for row in data["comparison"])
    assert main(["-ref", str(scans / "ref"), "-pred", folders[0], folders[0]]) == 2
