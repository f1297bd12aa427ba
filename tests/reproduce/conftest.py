"""A toy paper: tables, presets and a converted data set with a published split."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from nnssl_test_tools import nnunet_variables, toy_case, write_nifti

from nnssl.reproduce import table as table_module

#: The call that runs the toy table.
CALL = ["toy", "Toy-1", "-device", "cpu", "-np", "1", "--seeds", "1"]
CASES = [f"case{i}" for i in range(6)]
#: What the toy table holds; ``Toy-1`` labels the first of four training cases and tests on one.
TABLE = {
    "where": "Table 9",
    "dataset": "Toy",
    "published": "Toy-1",
    "protocol": "literature-la",
    "spacing": [2.0, 1.0, 1.0],
    "flaws": ["one seed"],
    "differs": ["final checkpoint"],
}


def write_source(raw: Path, name: str = "Dataset950_Toy", source: str | None = "Toy") -> Path:
    """Write a fully labeled data set of six cases as a converter leaves it; source None: as if imported by hand."""
    folder = raw / name
    for i, case in enumerate(CASES):
        image, label = toy_case(i)
        write_nifti(folder / "imagesTr" / f"{case}_0000.nii.gz", image)
        write_nifti(folder / "labelsTr" / f"{case}.nii.gz", label)
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "box": 1, "ball": 2},
        "numTraining": len(CASES),
        "file_ending": ".nii.gz",
        "nnssl": {"source": source} if source else {},
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    lists = {
        "dataset": "Toy",
        "unit": "case",
        "source": "invented",
        "protocols": {"Toy-1": 1},
        "train": CASES[:4],
        "val": [],
        "test": [CASES[5]],
    }
    if source:
        (folder / "nnssl_published_splits.json").write_text(json.dumps(lists))
    return folder


@pytest.fixture
def make_source():
    """Return the function that writes a converted data set."""
    return write_source


@pytest.fixture
def workspace(tmp_path):
    """nnU-Net's variables in a folder of the test's own, with the toy data set."""
    with nnunet_variables(tmp_path):
        write_source(tmp_path / "raw")
        yield tmp_path


@pytest.fixture
def toy_paper(tmp_path):
    """Replace the package's tables by one paper ``toy`` with the table ``Toy-1`` of three rows."""
    with toy_tables(tmp_path) as folder:
        yield folder


@contextlib.contextmanager
def toy_tables(root: Path) -> Iterator[Path]:
    """Write the toy paper and its preset below ``root``, and let the package read its tables there."""
    preset = {
        "plan": {"configuration": "2d", "patch_size": [32, 32], "batch_size": 2, "base_features": 4},
        "train": {"epochs": 2, "iterations_per_epoch": 2, "set": {"deep_supervision": False}},
        "predict": {"disable_tta": True, "stride": [16, 16]},
    }
    path = root / "toy_preset.json"
    path.write_text(json.dumps(preset))
    run = {"preset": str(path)}
    rows = [
        {"method": "Control", "labeled": "1/0", "reported": [50.0, 40.0, 9.5, 3.25], "trainer": "SupervisedTrainer"},
        {"method": "Teacher+", "labeled": "1/3", "reported": [60.0, 44.0, 8.5, None], "trainer": "MeanTeacherTrainer"},
        {"method": "Unknown", "labeled": "1/3", "reported": [70.0, 55.0, None, None]},
    ]
    rows[0] |= run
    rows[1] |= run | {"set": {"unsupervised_weight": 0.5}, "note": "a note"}
    content = {"paper": "Toy paper", "source": "Nobody 2025", "tables": {"Toy-1": {**TABLE, "rows": rows}}}
    folder = root / "published_tables"
    (folder / "tables").mkdir(parents=True)
    (folder / "tables" / "toy.json").write_text(json.dumps(content))
    flaws = table_module.FOLDER / "flaws.json"
    (folder / "flaws.json").write_text(flaws.read_text(encoding="utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_module, "FOLDER", folder)
        table_module.tables_of.cache_clear()
        yield folder
    table_module.tables_of.cache_clear()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The toy table after ``nnssl_reproduce`` has run it with one seed: (folder, what it printed)."""
    root = tmp_path_factory.mktemp("reproduce")
    with nnunet_variables(root), toy_tables(root), pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_npp", "0")
        patch.setenv("nnUNet_nps", "0")
        write_source(root / "raw")
        from nnssl.cli.reproduce import main

        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert main(CALL) == 0
        yield root, printed.getvalue()
