"""The command ``nnssl_plan_and_preprocess``: what it prints and what it refuses."""

import pytest

from nnssl.cli.plan_and_preprocess import main


def test_it_says_where_things_lie_and_what_comes_next(toy, capsys):
    (toy.raw / "imagesUn" / "notes.txt").write_text("no image")
    assert main(["-d", "901", "-np", "1", "-c", "2d", "--batch_size", "3"]) == 0
    out, err = capsys.readouterr()
    assert "nnssl_train 901 2d -tr DiffCLTrainer -p nnUNetPlans_b3" in out
    assert str(toy.folder / "nnUNetPlans_b3.json") in out
    assert "set aside notes.txt" in err


def test_no_unlabeled_case_is_said(new_toy, capsys):
    new_toy("supervised", labeled=1, unlabeled=0, monitoring=0, test=0)
    assert main(["-d", "Dataset901_Toy", "-np", "1", "-c", "2d"]) == 0
    assert "training will be supervised" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["-d", "902"], "Dataset901_Toy"),
        (["-d", "901", "-c", "3d_fulres"], "nearest: 3d_fullres"),
        (["-d", "901", "-c", "3d_lowres"], "allowed 2d, 3d_fullres"),
        (["-d", "901", "-c", "3d_cascade_fullres"], "cascade is not supported"),
        (["-d", "901", "-pl", "nnUNetPlannerResEncX"], "nnUNetPlannerResEncXL"),
        (["-d", "901", "-tr", "DiffCL"], "DiffCLTrainer"),
    ],
)
def test_refusals_are_one_line_with_exit_code_2(toy, capsys, argv, says):
    before = sorted(str(p) for p in toy.folder.rglob("*"))
    assert main([*argv, "-np", "1"]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert line.startswith("nnssl_plan_and_preprocess: error: ")
    assert says in line
    assert sorted(str(p) for p in toy.folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_unset_variables_are_refused(toy, capsys, monkeypatch, name):
    monkeypatch.delenv(name)
    assert main(["-d", "901"]) == 2
    assert f"the environment variable {name} must name a folder" in capsys.readouterr().err
