"""The demo's plan: the user's own commands, one budget for both trainers, a folder that is never taken from others."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnssl.cli.demo import main, table
from nnssl.demo import run as demo
from nnssl.demo.run import DemoSettings, prepare_folder, run_demo
from nnssl.errors import UserError

SPLITS = {"labeled": 1, "unlabeled": 1, "test": 2}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace the commands by ones that write what the demo reads: the reference as prediction, made-up scores."""
    calls: list[list[str]] = []

    def command(name: str):
        def run(argv: list[str]) -> int:
            calls.append([name, *argv])
            values = dict(itertools.pairwise(argv))
            if name == "predict":
                shutil.copytree(Path(os.environ["nnUNet_raw"]).parent / "data" / "test_masks", values["-o"])
            if name == "evaluate":
                scores = {"dice": 0.5, "hd95": None}
                result = {
                    "foreground_mean": scores,
                    "mean": {"cavity": scores, "muscle": scores, "crescent": scores},
                    "case_foreground": {"scan_003": scores, "scan_004": scores},
                }
                Path(values["-o"]).parent.mkdir(exist_ok=True)
                Path(values["-o"]).write_text(json.dumps(result))
            return 0

        return SimpleNamespace(main=run)

    real = demo.import_module
    monkeypatch.setattr(
        demo, "import_module", lambda n: command(n.rpartition(".")[2]) if n.startswith("nnssl.cli.") else real(n)
    )
    return calls


def test_summary_report_and_pictures(tmp_path: Path, fakes: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_raw", "/before")
    monkeypatch.delenv("nnUNet_results", raising=False)
    out = tmp_path / "out"
    returned = run_demo(DemoSettings(out, seed=3, iterations=2, splits=SPLITS), io.StringIO())
    summary = json.loads((out / "summary.json").read_text())
    assert summary == returned
    assert list(summary["trainers"]) == ["SupervisedTrainer", "DiffCLTrainer"]
    for scores in summary["trainers"].values():
        assert {"dice_mean", "dice", "hd95_mm", "seconds"} <= scores.keys()
        assert list(scores["dice"]) == ["cavity", "muscle", "crescent"]
        assert scores["hd95_mm"] is None
    assert (summary["seed"], summary["iterations"]) == (3, 2)
    assert {"python", "torch", "nnunetv2", "nnssl"} <= summary["versions"].keys()
    assert len(list((out / "overlays").glob("*.png"))) == 2
    assert "0.500" in (out / "report.html").read_text()
    assert os.environ["nnUNet_raw"] == "/before"
    assert "nnUNet_results" not in os.environ
    assert "DiffCLTrainer" in table(summary)


def test_both_trainers_get_the_same_budget_plan_and_seed(tmp_path: Path, fakes: list) -> None:
    run_demo(DemoSettings(tmp_path / "out", seed=3, iterations=100, splits=SPLITS), io.StringIO())
    trained = [call for call in fakes if call[0] == "train"]
    assert len(trained) == 2
    first, second = ([w for w in call if not w.endswith("Trainer")] for call in trained)
    assert first == second
    assert "--set" not in first
    assert [first[first.index(k) + 1] for k in ("--epochs", "--iterations_per_epoch", "--seed")] == ["2", "50", "3"]
    assert sum(call[0] == "plan_and_preprocess" for call in fakes) == 1


@pytest.mark.parametrize("name", ["import_data", "plan_and_preprocess", "train", "predict", "evaluate"])
def test_commands_are_understood_by_the_real_parsers(tmp_path: Path, name: str) -> None:
    from importlib import import_module

    parser = import_module(f"nnssl.cli.{name}").build_parser()
    commands = demo._commands(tmp_path, DemoSettings(tmp_path))
    chosen = [words for words in commands.values() if demo._MODULES[words[0]] == name]
    assert chosen
    for words in chosen:
        parser.parse_args(words[1:])


def test_budget_is_run_in_epochs() -> None:
    assert DemoSettings(Path(), iterations=2).epochs == (1, 2)
    assert DemoSettings(Path(), iterations=400).epochs == (8, 50)
    assert DemoSettings(Path(), iterations=130).epochs == (3, 50)


def test_foreign_folder_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "data").mkdir()
    for overwrite in (False, True):
        with pytest.raises(UserError, match="empty folder"):
            prepare_folder(tmp_path, overwrite)
    assert (tmp_path / "thesis.tex").is_file()
    assert (tmp_path / "data").is_dir()


def test_earlier_demo_is_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / demo.MARKER).write_text("")
    (tmp_path / "data").mkdir()
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "my_notes.txt").write_text("keep")
    with pytest.raises(UserError, match="--overwrite"):
        prepare_folder(tmp_path, False)
    prepare_folder(tmp_path, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [demo.MARKER, "my_notes.txt"]


@pytest.mark.parametrize("flags", [["--iterations", "0"], ["--seed", "-1"]])
def test_values_out_of_range_are_refused_in_one_line(tmp_path: Path, flags: list[str], capsys) -> None:
    assert main(["-o", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nnssl_demo: error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_failed_step_leaves_no_summary(tmp_path: Path, fakes: list, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = SimpleNamespace(main=lambda argv: 2)
    real = demo.import_module
    monkeypatch.setattr(demo, "import_module", lambda n: failing if n.endswith(".train") else real(n))
    with pytest.raises(UserError, match="train SupervisedTrainer"):
        run_demo(DemoSettings(tmp_path / "out", iterations=2, splits=SPLITS), io.StringIO())
    assert not (tmp_path / "out" / "summary.json").exists()
    assert (tmp_path / "out" / demo.MARKER).exists(), "so that --overwrite may replace it"
