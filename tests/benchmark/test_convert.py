"""The conversion benchmark times a real conversion against a loop that writes the same number of files."""

from __future__ import annotations

import argparse
import json
import os

import pytest

from nnssl.benchmark import convert


def test_both_sides_write_the_same_files_and_the_ratio_is_theirs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("nnUNet_raw", "untouched")
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    result = convert.run(parser.parse_args(["--cases", "2", "--shape", "4", "9", "8", "--repeats", "1"]))
    found = json.loads(json.dumps(result))
    assert found["cases"] == 2
    assert found["bytes"]["plain"] > 0
    assert found["bytes"]["nnssl_convert"] == pytest.approx(found["bytes"]["plain"], rel=0.05)
    seconds = {side: values["median"] for side, values in found["seconds"].items()}
    assert found["time_ratio"] == pytest.approx(seconds["nnssl_convert"] / seconds["plain"])
    assert os.environ["nnUNet_raw"] == "untouched"
