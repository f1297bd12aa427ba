"""nnssl_info tells what exists, for people and for programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nnssl.cli.info import TOPICS, main


@pytest.mark.parametrize("topic", TOPICS)
def test_json_is_valid_and_the_table_names_the_same(topic: str, capsys: pytest.CaptureFixture) -> None:
    assert main([topic, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert main([topic]) == 0
    table = capsys.readouterr().out
    names = content if topic == "system" else [next(iter(row.values())) for row in content]
    assert all(str(name) in table for name in names)


def test_trainers_carry_method_paper_cost_and_memory(capsys: pytest.CaptureFixture) -> None:
    main(["trainers", "--json"])
    rows = {row["trainer"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"SupervisedTrainer", "MeanTeacherTrainer", "CPSTrainer", "DiffCLTrainer"} <= rows.keys()
    assert rows["SupervisedTrainer"]["step_cost"] == 1
    assert rows["DiffCLTrainer"]["step_cost"] > 1
    for row in rows.values():
        assert {"method", "paper", "family", "step_cost", "memory_factor", "predicts"} <= row.keys()


def test_datasets_carry_licence_and_source(capsys: pytest.CaptureFixture) -> None:
    main(["datasets", "--json"])
    rows = {row["dataset"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"ACDC", "LA"} <= rows.keys()
    assert all(row["licence"] and row["source"].startswith("https://") for row in rows.values())
    assert rows["LA"]["published_splits"] == ["LA-4", "LA-8", "LA-16"]
    assert rows["Prostate"]["published_splits"] == []
    assert rows["Prostate"]["own_splits"] == ["Prostate-2-own1", "Prostate-2-own2"]
    assert rows["LA"]["converter"] == "nnssl_convert LA SRC -d ID"
    assert rows["LA"]["literature_crop"] == ["challenge"]


def test_system_names_the_shim_that_stock_commands_need(capsys: pytest.CaptureFixture) -> None:
    main(["system", "--json"])
    facts = json.loads(capsys.readouterr().out)
    shim = Path(facts["trainer shim"])
    assert shim.is_dir()
    assert list(shim.glob("*.py"))
    assert str(shim) in facts["for stock nnUNetv2_predict"]
    assert facts["device"] in ("cuda", "mps", "cpu")


@pytest.mark.parametrize("topic", ["trainers", "datasets", "presets"])
def test_lists_load_no_torch(topic: str) -> None:
    code = f"import sys; from nnssl.cli.info import main; main([{topic!r}]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
