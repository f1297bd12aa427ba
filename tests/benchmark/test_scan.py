"""The scan benchmark times two scans that compute the same thing and reports plain JSON."""

import argparse
import json

import pytest

from nnssl.benchmark import scan


def test_record_is_json_and_both_scans_agree():
    pytest.importorskip("mambapy")
    parser = argparse.ArgumentParser()
    scan.add_arguments(parser)
    result = scan.run(parser.parse_args(["--lengths", "9", "16", "--repeats", "2"]))
    records = json.loads(json.dumps(result))["scan"]
    assert [r["length"] for r in records] == [9, 16]
    for record in records:
        assert record["difference"] < 1e-5
        assert record["ratio"] == pytest.approx(record["mambapy_seconds"] / record["seconds"])


def test_without_mambapy_our_own_time_is_still_reported(monkeypatch):
    monkeypatch.setattr(scan, "_mambapy", lambda: None)
    (record,) = scan.compare([5], repeats=1)
    assert record["seconds"] > 0
    assert record["ratio"] is None
