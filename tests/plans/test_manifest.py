"""The manifest: what counts as stale, and that it is never half-written."""

import copy
import json
import os
import subprocess
import sys

import pytest

from nnssl.errors import UserError
from nnssl.plans import manifest as m

PLANS = {
    "plans_name": "nnUNetPlans",
    "transpose_forward": [0, 1, 2],
    "image_reader_writer": "SimpleITKIO",
    "foreground_intensity_properties_per_channel": {"0": {"mean": 3.0}, "1": {"mean": 5.0}},
    "configurations": {
        "3d_fullres": {
            "data_identifier": "nnUNetPlans_3d_fullres",
            "preprocessor_name": "DefaultPreprocessor",
            "spacing": [2.0, 1.0, 1.0],
            "normalization_schemes": ["CTNormalization", "ZScoreNormalization"],
            "use_mask_for_norm": [False, False],
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": {"order": 3},
            "resampling_fn_seg_kwargs": {"order": 1},
            "patch_size": [16, 16, 16],
            "batch_size": 2,
            "architecture": {"network_class_name": "a.B"},
        },
        "small": {"inherits_from": "3d_fullres", "batch_size": 1},
    },
}


def changed(path: str, value) -> dict:
    plans = copy.deepcopy(PLANS)
    *parents, last = path.split("/")
    node = plans
    for key in parents:
        node = node[key]
    assert node[last] != value
    node[last] = value
    return plans


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("transpose_forward", [2, 0, 1]),
        ("image_reader_writer", "NibabelIO"),
        ("foreground_intensity_properties_per_channel/0", {"mean": 4.0}),
        ("configurations/3d_fullres/preprocessor_name", "Other"),
        ("configurations/3d_fullres/spacing", [2.0, 1.0, 1.1]),
        ("configurations/3d_fullres/normalization_schemes", ["CTNormalization", "NoNormalization"]),
        ("configurations/3d_fullres/use_mask_for_norm", [False, True]),
        ("configurations/3d_fullres/resampling_fn_data", "no_resampling_hack"),
        ("configurations/3d_fullres/resampling_fn_seg", "no_resampling_hack"),
        ("configurations/3d_fullres/resampling_fn_data_kwargs", {"order": 1}),
        ("configurations/3d_fullres/resampling_fn_seg_kwargs", {"order": 0}),
    ],
)
def test_what_changes_voxels_changes_the_hash(path, value):
    plans = changed(path, value)
    assert m.preprocessing_hash(plans, "3d_fullres") != m.preprocessing_hash(PLANS, "3d_fullres")
    assert m.preprocessing_hash(plans, "small") != m.preprocessing_hash(PLANS, "small")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("plans_name", "other"),
        ("foreground_intensity_properties_per_channel/1", {"mean": 6.0}),  # z-scores ignore the plan's statistics
        ("configurations/3d_fullres/patch_size", [8, 8, 8]),
        ("configurations/3d_fullres/batch_size", 7),
        ("configurations/3d_fullres/architecture", {}),
        ("configurations/3d_fullres/data_identifier", "elsewhere"),
        ("configurations/3d_fullres/spacing", (2, 1, 1.0)),  # tuples and integers are the same numbers
    ],
)
def test_what_leaves_voxels_alone_leaves_the_hash(path, value):
    plans = changed(path, value) if not isinstance(value, tuple) else copy.deepcopy(PLANS)
    if isinstance(value, tuple):
        plans["configurations"]["3d_fullres"]["spacing"] = tuple(float(v) for v in value)
    assert m.preprocessing_hash(plans, "3d_fullres") == m.preprocessing_hash(PLANS, "3d_fullres")
    assert m.preprocessing_hash(plans, "small") == m.preprocessing_hash(plans, "3d_fullres")


@pytest.fixture
def preprocessed(tmp_path):
    """A folder and manifest with one labeled, two unlabeled and no monitoring case."""
    manifest = m.empty_manifest()
    manifest["cases"] = {c: {"hash": c * 2, "patient": c} for c in ("u1", "u2")}
    manifest["labeled"] = {"l1": "x"}
    entry = {"preprocessing_hash": m.preprocessing_hash(PLANS, "3d_fullres")}
    manifest["configurations"]["nnUNetPlans_3d_fullres"] = {
        **entry,
        "labeled": ["l1"],
        "unlabeled": ["u2", "u1"],
        "monitoring": [],
    }
    for part, cases in (("labeled", ["l1"]), ("unlabeled", ["u1", "u2"])):
        folder = m.part_folder(tmp_path, "nnUNetPlans_3d_fullres", part)
        folder.mkdir()
        for case in cases:
            (folder / f"{case}.pkl").touch()
    m.save_manifest(tmp_path, manifest)
    return tmp_path


def test_current_data_pass(preprocessed):
    assert m.unlabeled_cases(preprocessed, PLANS, "3d_fullres") == ["u1", "u2"]
    assert m.monitoring_cases(preprocessed, PLANS, "small") == []


def test_missing_manifest_configuration_or_name_are_refused(preprocessed, tmp_path_factory):
    with pytest.raises(UserError, match="must be preprocessed by nnssl"):
        m.require_current(tmp_path_factory.mktemp("empty"), PLANS, "3d_fullres")
    with pytest.raises(UserError, match="nearest: 3d_fullres"):
        m.require_current(preprocessed, PLANS, "3d_fulres")
    with pytest.raises(UserError, match="must be preprocessed before it is used; got elsewhere"):
        m.require_current(preprocessed, changed("configurations/3d_fullres/data_identifier", "elsewhere"), "3d_fullres")


def test_data_of_another_plan_are_refused(preprocessed):
    with pytest.raises(UserError, match="under the plan in use"):
        m.require_current(preprocessed, changed("configurations/3d_fullres/spacing", [3.0, 1.0, 1.0]), "3d_fullres")


@pytest.mark.parametrize("suffix", ["", "_unlabeled", "_monitoring"])
def test_strange_or_missing_files_are_refused(preprocessed, suffix):
    folder = preprocessed / f"nnUNetPlans_3d_fullres{suffix}"
    folder.mkdir(exist_ok=True)
    (folder / "stranger.pkl").touch()
    with pytest.raises(UserError, match=r"1 unexpected \(stranger\)"):
        m.require_current(preprocessed, PLANS, "3d_fullres")
    (folder / "stranger.pkl").unlink()
    for file in folder.iterdir():
        file.unlink()
        with pytest.raises(UserError, match=rf"1 missing \({file.stem}\)"):
            m.require_current(preprocessed, PLANS, "3d_fullres")
        file.touch()


def test_a_configuration_that_lags_behind_the_data_set_is_refused(preprocessed):
    manifest = m.load_manifest(preprocessed)
    manifest["cases"]["u3"] = {"hash": "h", "patient": "u3"}
    m.save_manifest(preprocessed, manifest)
    with pytest.raises(UserError, match=r"1 missing \(u3\)"):
        m.require_current(preprocessed, PLANS, "3d_fullres")


def test_digest_follows_ids_contents_and_plan(preprocessed):
    manifest = m.load_manifest(preprocessed)
    identifier = "nnUNetPlans_3d_fullres"
    reference = m.manifest_digest(manifest, identifier)
    entry = manifest["configurations"][identifier]
    entry["unlabeled"].sort()
    manifest["set_aside"]["x"] = "why"
    assert m.manifest_digest(manifest, identifier) == reference
    for change in (
        lambda: manifest["cases"]["u1"].update(hash="other"),
        lambda: entry.update(unlabeled=["u1"]),
        lambda: entry.update(preprocessing_hash="other"),
    ):
        before = m.manifest_digest(manifest, identifier)
        change()
        assert m.manifest_digest(manifest, identifier) != before


def test_a_failed_write_leaves_the_old_manifest_and_nothing_else(preprocessed, monkeypatch):
    before = (preprocessed / m.MANIFEST_NAME).read_bytes()
    names = sorted(os.listdir(preprocessed))

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        m.save_manifest(preprocessed, m.empty_manifest())
    assert (preprocessed / m.MANIFEST_NAME).read_bytes() == before
    assert sorted(os.listdir(preprocessed)) == names


@pytest.mark.parametrize("content", ["{", json.dumps({"version": 99})])
def test_a_broken_or_unknown_manifest_is_refused(tmp_path, content):
    (tmp_path / m.MANIFEST_NAME).write_text(content)
    with pytest.raises(UserError, match="--clean"):
        m.load_manifest(tmp_path)


def test_manifest_splits_and_options_load_no_torch():
    code = (
        "import sys; from nnssl.plans import manifest, splits, options, preset, parallel, pipeline;"
        "import nnssl.cli.plan_and_preprocess; print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
