"""The record of a run survives a kill and a resume."""

from __future__ import annotations

import csv
import json

from nnssl.training.run_log import RunLog, flatten


def record(epoch: int, loss: float = 1.0) -> dict:
    return {"epoch": epoch, "losses": {"loss_a": loss}, "branches": {"network": None if epoch == 0 else 0.5}}


def test_records_of_later_epochs_are_dropped_on_resume_and_written_again(tmp_path):
    log = RunLog(tmp_path)
    for epoch in range(3):
        log.write(record(epoch))
    log = RunLog(tmp_path, first_epoch=2)
    log.write(record(2, loss=7.0))
    lines = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["losses"]["loss_a"]) for r in lines] == [(0, 1.0), (1, 1.0), (2, 7.0)]


def test_a_torn_last_line_is_dropped(tmp_path):
    log = RunLog(tmp_path)
    log.write(record(0))
    with open(tmp_path / "progress.jsonl", "a") as file:
        file.write('{"epoch": 1, "los')
    assert [r["epoch"] for r in RunLog(tmp_path, first_epoch=5).records] == [0]


def test_the_table_holds_every_record_with_missing_values_empty(tmp_path):
    log = RunLog(tmp_path)
    log.write(record(0))
    log.write({**record(1), "losses": {"loss_a": 0.5, "loss_b": 2.0}})
    with open(tmp_path / "progress.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["losses/loss_b"] == ""
    assert rows[0]["branches/network"] == ""
    assert rows[1]["losses/loss_b"] == "2.0"
    assert (tmp_path / "losses.png").stat().st_size > 1000


def test_flatten_names_nested_values_by_their_path():
    assert flatten({"a": 1, "b": {"c": {"d": 2}}}) == {"a": 1, "b/c/d": 2}
