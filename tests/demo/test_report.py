"""The report is one file that opens offline and says what the numbers are and are not."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from nnssl.demo.report import build_report, write_report
from nnssl.evaluation.overlays import save_overlay

SUMMARY = {
    "seed": 7,
    "iterations": 123,
    "configuration": {"name": "2d", "patch_size": [64, 64], "batch_size": 4, "base_features": 8},
    "data": {"labeled": 3, "unlabeled": 40, "test": 2, "spacing_mm": [8, 1.5, 1.5], "styles": ["bright", "dark"]},
    "versions": {"python": "3.11.7", "nnssl": "0.1.0"},
    "machine": {"platform": "Some<OS>", "cores": 2},
    "commands": ["nnssl_train 900 2d all -tr A & B"],
    "seconds_total": 99.0,
    "trainers": {
        "A": {
            "dice_mean": 0.5,
            "dice": {"x": 0.4, "y": 0.6},
            "hd95_mm": 9.0,
            "seconds": 10.0,
            "cases": {"s1": 0.5, "s2": 0.5},
        },
        "B": {
            "dice_mean": 0.75,
            "dice": {"x": 0.9, "y": None},
            "hd95_mm": None,
            "seconds": 40.0,
            "cases": {"s1": 0.75, "s2": None},
        },
    },
}


class Tags(HTMLParser):
    """Collect attributes that load something, and check that tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    image = np.random.default_rng(0).normal(size=(20, 30))
    mask = np.zeros((20, 30), np.uint8)
    mask[5:10, 5:20] = 1
    save_overlay(image, {"reference": mask, "A": mask}, tmp_path / "s1.png")
    return tmp_path / "s1.png"


def test_report_loads_nothing_from_elsewhere(picture: Path, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", SUMMARY, [picture, picture], {"s1": "bright"})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert len(tags.loads) == 2
    assert all(value.startswith("data:image/png;base64,") for value in tags.loads)
    assert not re.search(r"https?://|url\(|@import|<script|<link", text)
    assert not (tmp_path / "report.html.tmp").exists()


def test_report_shows_numbers_seed_budget_and_commands() -> None:
    text = build_report(SUMMARY, [], {"s1": "bright"})
    for expected in ("0.750", "0.500", "123 steps", "seed (7)", "-tr A &amp; B", "Some&lt;OS&gt;", "99 s in all"):
        assert expected in text


def test_caveats_are_said() -> None:
    text = build_report(SUMMARY, [], {})
    for caveat in ("synthetic", "one seed", "same number of steps, not the same time", "not selected by result"):
        assert caveat.replace(" ", "") in re.sub(r"\s", "", text)


def test_missing_values_are_not_numbers_and_never_best() -> None:
    text = build_report(SUMMARY, [], {})
    assert text.count("<td>n/a</td>") == 3
    assert "nan" not in text.lower().replace("nnunet", "")
    row_a = re.search(r"<tr><td>A</td>(.*?)</tr>", text)[1]
    assert '<td class="best">9.0</td>' in row_a, "a smaller distance is better, and the only one there is best"
    assert '<td class="best">0.600</td>' in row_a


def test_report_does_not_take_sides() -> None:
    """With exchanged numbers the exchanged trainer is marked."""
    for trainer, distance in (("A", 9.0), ("B", 4.0)):
        near = copy.deepcopy(SUMMARY)
        near["trainers"]["A"]["hd95_mm"], near["trainers"]["B"]["hd95_mm"] = 9.0, distance
        near["trainers"][trainer]["hd95_mm"] = 3.0
        assert build_report(near, [], {}).count('<td class="best">3.0</td>') == 1
    swapped = copy.deepcopy(SUMMARY)
    swapped["trainers"]["A"], swapped["trainers"]["B"] = SUMMARY["trainers"]["B"], SUMMARY["trainers"]["A"]
    assert '<tr><td>A</td><td class="best">0.750</td>' in build_report(swapped, [], {})
    assert '<tr><td>B</td><td class="best">0.750</td>' in build_report(SUMMARY, [], {})
