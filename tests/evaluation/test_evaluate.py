"""Folders in, result out: axes, means, empty masks, labels, regions, ignore label, processes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from nnssl.errors import UserError
from nnssl.evaluation.evaluate import evaluate_folders
from nnssl.evaluation.metrics import mm_metrics
from nnssl.evaluation.report import result_table
from nnssl.plans.parallel import default_processes

SHAPE = (6, 12, 16)


def labels_at(**boxes):
    """Return a label map; label=(start, stop) along x."""
    array = np.zeros(SHAPE, np.uint8)
    for name, (start, stop) in boxes.items():
        array[1:5, 2:10, start:stop] = int(name[1:])
    return array


def run(reference, prediction, **options):
    return evaluate_folders(reference, prediction, num_processes=1, **options)


def test_shift_in_x_is_measured_with_the_spacing_of_x(folders):
    result = run(*folders)
    for shift in range(1, 5):
        for name in ("1", "2"):
            values = result["cases"][f"case_{shift}"][name]
            assert values["hd95"] == pytest.approx(shift * 0.5)
            assert values["dice"] == pytest.approx((8 - shift) / 8)
    assert result["mean"]["1"]["hd95"] == pytest.approx(1.25)
    assert result["std"]["1"]["hd95"] == pytest.approx(np.std([0.5, 1, 1.5, 2], ddof=1))
    assert (result["unit"], result["protocol"], result["labels"]) == ("mm", "mm", {"1": 1, "2": 2})
    assert any("no dataset.json" in note for note in result["notes"])


def test_result_does_not_depend_on_processes(folders):
    assert run(*folders) == evaluate_folders(*folders, num_processes=2)


def test_an_error_in_a_worker_is_the_users_error(folders, write):
    write(folders[1] / "case_2.nii.gz", labels_at(v1=(2, 5)), spacing=(1, 1, 1))
    with pytest.raises(UserError, match="case_2: spacing"):
        evaluate_folders(*folders, num_processes=2)


def test_means_skip_what_is_excluded_and_count_it(tmp_path, write):
    ref, pred = tmp_path / "ref", tmp_path / "pred"
    write(ref / "a.nii.gz", labels_at(v1=(2, 6), v2=(8, 12)))
    write(pred / "a.nii.gz", labels_at(v1=(2, 6), v2=(9, 13)))
    write(ref / "b.nii.gz", labels_at(v1=(2, 6)))  # class 2 in neither
    write(pred / "b.nii.gz", labels_at(v1=(3, 7)))
    write(ref / "c.nii.gz", labels_at(v1=(2, 6)))  # class 2 in the prediction only
    write(pred / "c.nii.gz", labels_at(v1=(2, 6), v2=(8, 9)))
    result = run(ref, pred)
    diagonal = np.sqrt((6 * 3) ** 2 + (12 * 1) ** 2 + (16 * 0.5) ** 2)
    assert result["cases"]["b"]["2"] == dict.fromkeys(result["metrics"])
    assert result["cases"]["c"]["2"]["assd"] == pytest.approx(diagonal)
    assert result["empty"]["2"] == {"both_empty": 1, "one_empty": 1, "cases": {"b": "both_empty", "c": "one_empty"}}
    assert result["empty"]["1"] == {"both_empty": 0, "one_empty": 0, "cases": {}}
    assert result["count"]["2"]["dice"] == 2
    assert result["mean"]["1"]["dice"] == pytest.approx((1 + 0.75 + 1) / 3)
    assert result["mean"]["2"]["dice"] == pytest.approx((0.75 + 0) / 2)
    assert result["foreground_mean"]["dice"] == pytest.approx((2.75 / 3 + 0.375) / 2)  # of classes, as nnU-Net
    assert result["case_foreground"]["b"]["dice"] == pytest.approx(0.75)  # of the classes present
    assert result["foreground_mean_over_cases"]["dice"] == pytest.approx((0.875 + 0.75 + 0.5) / 3)
    json.dumps(result, allow_nan=False)


def test_a_class_absent_everywhere_has_no_mean(folders):
    result = run(*folders, labels={"background": 0, "one": 1, "never": 9})
    assert result["mean"]["never"]["dice"] is None
    assert result["empty"]["never"]["both_empty"] == 4
    assert result["foreground_mean"]["dice"] == result["mean"]["one"]["dice"]
    assert any("[2]" in note for note in result["notes"])


def test_regions_are_unions(folders):
    result = run(*folders, labels={"background": 0, "whole": [1, 2], "part": [2]})
    for case in ("case_1", "case_4"):
        shift = int(case[-1])
        reference = labels_at()
        reference[1:5, 2:6, 2:10] = reference[1:5, 7:11, 2:10] = 1
        expected = mm_metrics(np.roll(reference, shift, 2) > 0, reference > 0, (3.0, 1.0, 0.5))
        assert result["cases"][case]["whole"] == pytest.approx(expected)
    assert result["labels"] == {"whole": [1, 2], "part": 2}


def test_voxels_under_the_ignore_label_do_not_count(tmp_path, write):
    ref, pred = tmp_path / "ref", tmp_path / "pred"
    write(ref / "a.nii.gz", labels_at(v1=(2, 6), v2=(6, 16)))
    write(pred / "a.nii.gz", labels_at(v1=(2, 12)))  # wrong only where the reference says ignore
    labels = {"background": 0, "one": 1, "ignore": 2}
    values = run(ref, pred, labels=labels)["cases"]["a"]
    assert values == {"one": {"dice": 1, "jaccard": 1, "hd95": 0, "assd": 0, "nsd": 1}}
    assert run(ref, pred, labels={"one": 1})["cases"]["a"]["one"]["dice"] < 1


def test_labels_come_from_the_dataset_json_beside_the_predictions(folders):
    path = folders[1] / "dataset.json"
    path.write_text(json.dumps({"labels": {"background": 0, "left": 1, "right": 2}}))
    result = run(*folders)
    assert list(result["mean"]) == ["left", "right"]
    assert result["notes"] == []
    path.write_text(json.dumps({"labels": {"background": 0, "left": 1}}))
    with pytest.raises(UserError, match=r"dataset\.json; got \[2\]"):
        run(*folders)


def test_png_folders_are_measured_in_pixels(tmp_path, write):
    ref, pred = tmp_path / "ref", tmp_path / "pred"
    image = np.zeros((20, 30), np.uint8)
    image[4:12, 5:15] = 1
    write(ref / "a.png", image, spacing=(1, 1))
    write(pred / "a.png", np.roll(image, 3, 1), spacing=(1, 1))
    result = run(ref, pred)
    assert result["unit"] == "px"
    assert result["cases"]["a"]["1"]["hd95"] == pytest.approx(3)


def test_literature_protocol_measures_voxels(folders):
    result = run(*folders, protocol="literature-la")
    assert result["unit"] == "voxel"
    assert result["metrics"] == ["dice", "jaccard", "hd95", "asd"]
    assert result["cases"]["case_3"]["1"]["hd95"] == pytest.approx(3)  # voxels, not 1.5 mm
    assert any("perfect distance" in note for note in result["notes"])


@pytest.mark.parametrize(
    "options", [{"nsd_tolerance_mm": -1}, {"nsd_tolerance_mm": float("nan")}, {"num_processes": 0}, {"protocol": "cm"}]
)
def test_bad_options_are_refused(folders, options):
    with pytest.raises(UserError):
        evaluate_folders(*folders, **options)


def test_default_processes(monkeypatch):
    monkeypatch.setenv("nnUNet_def_n_proc", "3")
    assert default_processes() == 3
    monkeypatch.setenv("nnUNet_def_n_proc", "many")
    with pytest.raises(UserError, match="many"):
        default_processes()
    monkeypatch.delenv("nnUNet_def_n_proc")
    assert 1 <= default_processes() <= 8


def test_importing_loads_no_torch():
    modules = ["metrics", "protocols", "masks", "labels", "evaluate", "compare", "report"]
    code = f"import sys, nnssl.cli.evaluate; import {', '.join('nnssl.evaluation.' + m for m in modules)}; "
    code += "sys.exit([m for m in ('torch', 'nnunetv2', 'medpy') if m in sys.modules] or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_domains_have_means_of_their_own(folders):
    """Every aggregate of a domain equals that of a run over its cases alone."""
    domains = {"case_1": "A", "case_2": "B", "case_3": "B", "elsewhere": "C"}
    reference, prediction = folders
    result = evaluate_folders(reference, prediction, num_processes=1, domains=domains)
    assert {name: over["cases"] for name, over in result["domains"].items()} == {
        "A": ["case_1"],
        "B": ["case_2", "case_3"],
    }
    assert "1 cases have no domain, the first is case_4" in result["notes"]
    for case in ("case_1", "case_4"):
        (reference / f"{case}.nii.gz").unlink()
    alone = evaluate_folders(reference, prediction, num_processes=1)
    assert alone["domains"] == {}
    keys = ("mean", "std", "count", "foreground_mean", "foreground_mean_over_cases", "foreground_std_over_cases")
    assert {k: result["domains"]["B"][k] for k in (*keys, "empty")} == {k: alone[k] for k in (*keys, "empty")}
    assert result["mean"] != alone["mean"]


def test_domains_come_from_the_dataset_json_that_names_the_labels(folders):
    reference, prediction = folders
    block = {"labels": {"background": 0, "one": 1, "two": 2}, "nnssl": {"domains": {"case_2": "A"}}}
    (prediction / "dataset.json").write_text(json.dumps(block))
    assert list(evaluate_folders(reference, prediction, num_processes=1)["domains"]) == ["A"]
    assert evaluate_folders(reference, prediction, block["labels"], num_processes=1)["domains"] == {}


def test_what_was_done_to_the_scans_stands_in_every_result(folders):
    """A data set of label-cut crops says so beside each number, whoever evaluates it."""
    assert run(*folders)["provenance"] is None
    block = {"labels": {"background": 0, "1": 1, "2": 2}, "nnssl": {"provenance": "label-cut crop"}}
    (folders[1] / "dataset.json").write_text(json.dumps(block))
    for result in (run(*folders), run(*folders, labels={"1": 1, "2": 2}, provenance="label-cut crop")):
        assert result["provenance"] == "label-cut crop"
        assert "note: the scans: label-cut crop" in result_table(result)
