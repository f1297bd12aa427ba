"""The checks of a raw data set: what is refused, set aside, warned of, and hashed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl.errors import UserError
from nnssl.layout import RawDataset
from nnssl.plans import verify
from nnssl.plans.verify import count_values, scan_case, verify_raw_dataset

SHAPE = (4, 6, 5)


def write(path: Path, array: np.ndarray, spacing: tuple = (1.0, 1.0, 2.5), origin: tuple = (3.5, 0.0, -8.25)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    sitk.WriteImage(image, str(path))
    return path


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 500, SHAPE).astype(np.float32)


def label(values: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    return np.resize(np.array(values, np.uint8), SHAPE)


@pytest.fixture
def raw_folder(tmp_path: Path) -> Path:
    """Two labeled cases, two unlabeled, one val, one test."""
    folder = tmp_path / "Dataset007_Toy"
    seeds = iter(range(100))
    for images, labels, cases in (
        ("imagesTr", "labelsTr", ("a1_f1", "a2_f1")),
        ("imagesUn", None, ("u1_f1", "u2_f1")),
        ("imagesVal", "labelsVal", ("v1_f1",)),
        ("imagesTs", None, ("t1_f1",)),
    ):
        for case in cases:
            write(folder / images / f"{case}_0000.nii.gz", noise(next(seeds)))
            if labels:
                write(folder / labels / f"{case}.nii.gz", label())
    content = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "x": 1, "y": 2}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({**content, "nnssl": {"patient_pattern": "(.+)_f"}}))
    return folder


@pytest.fixture
def check(raw_folder: Path) -> Callable[..., verify.Verified]:
    return lambda **kwargs: verify_raw_dataset(RawDataset.load(raw_folder), 1, **kwargs)


def test_sound_data_set_passes(check):
    verified = check()
    assert verified.set_aside == {}
    assert {folder: sorted(cases) for folder, cases in verified.hashes.items()} == {
        "imagesTr": ["a1_f1", "a2_f1"],
        "imagesUn": ["u1_f1", "u2_f1"],
        "imagesVal": ["v1_f1"],
        "imagesTs": ["t1_f1"],
    }


def test_a_pool_of_processes_finds_the_same(raw_folder: Path, check):
    assert verify_raw_dataset(RawDataset.load(raw_folder), 2) == check()


# What is refused ------------------------------------------------------------------------------------------------------
def test_no_labeled_case_is_refused(raw_folder: Path, check):
    for path in raw_folder.glob("*Tr/*"):
        path.unlink()
    with pytest.raises(UserError, match="at least one labeled case"):
        check()


def test_a_case_labeled_and_unlabeled_is_refused(raw_folder: Path, check):
    write(raw_folder / "imagesUn" / "a1_f1_0000.nii.gz", noise(50))
    with pytest.raises(UserError, match="imagesTr and imagesUn: a1_f1"):
        check()


@pytest.mark.parametrize(("folder", "case"), [("imagesTr", "a2_f1"), ("imagesVal", "v1_f1"), ("imagesTs", "t1_f1")])
def test_unlabeled_copy_of_another_image_is_refused_and_both_are_named(raw_folder: Path, check, folder, case):
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(raw_folder / folder / f"{case}_0000.nii.gz")))
    write(raw_folder / "imagesUn" / "copy_f1_0000.nii.gz", array.astype(np.int16))  # another type, same content
    with pytest.raises(UserError, match=f"imagesUn/copy_f1 equals {folder}/{case}"):
        check()


@pytest.mark.parametrize("folder", ["imagesVal", "imagesTs"])
def test_a_file_copied_under_its_own_name_is_refused_too(raw_folder: Path, check, folder: str):
    path = next((raw_folder / folder).iterdir())
    shutil.copy(path, raw_folder / "imagesUn" / path.name)
    with pytest.raises(UserError, match=f"equals {folder}/"):
        check()


@pytest.mark.parametrize("folder", ["imagesTr", "imagesVal"])
@pytest.mark.parametrize(("bad", "why"), [(np.nan, "NaN"), (None, "constant")])
def test_nan_or_constant_labeled_image_is_refused(raw_folder: Path, check, folder: str, bad, why: str):
    path = next((raw_folder / folder).iterdir())
    array = noise(3) if bad is not None else np.full(SHAPE, 7, np.float32)
    if bad is not None:
        array[0, 0, 0] = bad
    write(path, array)
    with pytest.raises(UserError, match=why) as error:
        check(check_integrity=False)
    assert path.name[:5] in str(error.value)


@pytest.mark.parametrize(
    ("spacing", "origin", "what"), [((1, 1, 2), (3.5, 0, -8.25), "spacing"), ((1, 1, 2.5), (3, 0, -8.25), "origin")]
)
def test_label_on_another_grid_is_refused(raw_folder: Path, check, spacing, origin, what: str):
    write(raw_folder / "labelsTr" / "a1_f1.nii.gz", label(), spacing, origin)
    with pytest.raises(UserError, match=f"one grid; got imagesTr/a1_f1: {what}"):
        check()
    check(check_integrity=False)


def test_label_of_another_size_is_refused(raw_folder: Path, check):
    write(raw_folder / "labelsTr" / "a1_f1.nii.gz", label()[:3])
    with pytest.raises(UserError, match="size"):
        check()


def test_label_with_another_orientation_is_refused(raw_folder: Path, check):
    path = raw_folder / "labelsTr" / "a1_f1.nii.gz"
    image = sitk.ReadImage(str(path))
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(path))
    with pytest.raises(UserError, match="direction"):
        check()


def test_unknown_label_value_is_refused_with_its_count(raw_folder: Path, check):
    wrong = label()
    wrong.flat[:3] = 9
    write(raw_folder / "labelsTr" / "a2_f1.nii.gz", wrong)
    with pytest.raises(UserError, match=r"a2_f1: value 9 in 3 voxels; allowed \[0, 1, 2\]"):
        check()


def test_missing_label_and_missing_channel_are_refused(raw_folder: Path, check):
    (raw_folder / "labelsTr" / "a2_f1.nii.gz").rename(raw_folder / "spare.nii.gz")
    with pytest.raises(UserError, match="none for a2_f1"):
        check(check_integrity=False)
    (raw_folder / "spare.nii.gz").rename(raw_folder / "labelsTr" / "a2_f1.nii.gz")
    write(raw_folder / "imagesTr" / "a2_f1_0001.nii.gz", noise(60))
    with pytest.raises(UserError, match="a2_f1: 2; allowed 1"):
        check()


# What is set aside ----------------------------------------------------------------------------------------------------
def test_unusable_unlabeled_files_are_set_aside_with_their_reason(raw_folder: Path, check):
    folder = raw_folder / "imagesUn"
    whole = (folder / "u1_f1_0000.nii.gz").read_bytes()
    (folder / "short_f1_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "text_f1_0000.nii.gz").write_text("hello")
    (folder / "notes.txt").write_text("hello")
    write(folder / "const_f1_0000.nii.gz", np.zeros(SHAPE, np.float32))
    holes = noise(70)
    holes[1] = np.nan
    write(folder / "nan_f1_0000.nii.gz", holes)
    write(folder / "two_f1_0000.nii.gz", noise(71))
    write(folder / "two_f1_0001.nii.gz", noise(72))
    write(folder / "second_f1_0001.nii.gz", noise(73))
    aside = check().set_aside
    reasons = {
        "short_f1": "truncated",
        "text_f1": "gzip",
        "notes.txt": "no image",
        "const_f1": "constant",
        "nan_f1": "NaN",
        "two_f1": "2 channels instead of 1",
        "second_f1": "numbered _0001",
    }
    assert aside.keys() == reasons.keys()
    assert all(reason in aside[name] for name, reason in reasons.items())
    assert sorted(check().hashes["imagesUn"]) == ["u1_f1", "u2_f1"]


@pytest.mark.parametrize("held_out", ["v1", "t1"])
def test_another_frame_of_a_held_out_patient_is_set_aside(raw_folder: Path, check, held_out: str):
    write(raw_folder / "imagesUn" / f"{held_out}_f2_0000.nii.gz", noise(80))
    assert held_out in check().set_aside[f"{held_out}_f2"]


def test_what_the_import_kept_out_is_named_until_it_comes_back(raw_folder: Path, check):
    path = raw_folder / "dataset.json"
    content = json.loads(path.read_text())
    content["nnssl"]["set_aside"] = {"old": "truncated", "u1_f1": "truncated"}
    path.write_text(json.dumps(content))
    assert check().set_aside == {"old": "truncated"}


# What runs with a warning ---------------------------------------------------------------------------------------------
def test_absent_class_is_a_warning(raw_folder: Path, check):
    for path in (raw_folder / "labelsTr").iterdir():
        write(path, label((0, 1)))
    with pytest.warns(UserWarning, match="no labeled case shows: y"):
        check()


def test_labeled_patient_who_is_held_out_is_a_warning(raw_folder: Path, check):
    write(raw_folder / "imagesTs" / "a2_f7_0000.nii.gz", noise(60))
    with pytest.warns(UserWarning, match="imagesTr and imagesTs.*: a2$"):
        check()


def test_unreadable_test_image_is_a_warning(raw_folder: Path, check):
    (raw_folder / "imagesTs" / "t1_f1_0000.nii.gz").write_text("x")
    with pytest.warns(UserWarning, match="t1_f1"):
        assert check().hashes["imagesTs"] == {}


def test_same_image_twice_among_the_unlabeled_is_a_warning(raw_folder: Path, check):
    twin = raw_folder / "imagesUn" / "w_f1_0000.nii.gz"
    twin.write_bytes((raw_folder / "imagesUn" / "u1_f1_0000.nii.gz").read_bytes())
    with pytest.warns(UserWarning, match="same image"):
        check()


# Single cases and hashes ----------------------------------------------------------------------------------------------
def test_channels_on_different_grids_are_a_fault(tmp_path: Path):
    files = [write(tmp_path / "c_0000.nii.gz", noise(0)), write(tmp_path / "c_0001.nii.gz", noise(1), (1, 1, 2))]
    assert "channels differ in spacing" in scan_case(files, None).problem


def test_hash_depends_on_content_and_grid_only(tmp_path: Path):
    array = noise(5)
    same = [
        write(tmp_path / "a.nii.gz", array),
        write(tmp_path / "b.nii", array.astype(np.float64)),
        write(tmp_path / "c.nrrd", array.astype(np.int16)),
        write(tmp_path / "d.mha", array),
    ]
    other = array.copy()
    other[-1, -1, -1] += 1
    different = [
        write(tmp_path / "e.nii.gz", other),
        write(tmp_path / "f.nii.gz", array, spacing=(1.0, 1.0, 2.6)),
        write(tmp_path / "g.nii.gz", array, origin=(3.5, 0.1, -8.25)),
        write(tmp_path / "h.nii.gz", array[::-1].copy()),
        write(tmp_path / "i.nii.gz", array.reshape(4, 5, 6)),
    ]

    def image_hash(images: list[Path]) -> str | None:
        return scan_case(images, None).hash

    assert len({image_hash([path]) for path in same}) == 1
    assert len({image_hash([path]) for path in [same[0], *different]}) == 6
    assert image_hash([same[0], different[0]]) != image_hash([different[0], same[0]])
    assert image_hash([tmp_path / "absent.nii.gz"]) is None


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, bool])
def test_count_values_equals_numpy(dtype: type):
    array = np.random.default_rng(0).integers(0, 2 if dtype is bool else 7, (5, 6)).astype(dtype)
    values, counts = np.unique(array, return_counts=True)
    assert count_values(array) == dict(zip(values.astype(float).tolist(), counts.tolist(), strict=True))
    assert count_values(np.array([0.5, 0.5, -1.0])) == {0.5: 2, -1.0: 1}


# The cache ------------------------------------------------------------------------------------------------------------
def test_cache_spares_unchanged_files_and_notices_changed_ones(raw_folder: Path, check, monkeypatch, tmp_path: Path):
    cache = tmp_path / "cache" / "scans.json"
    first = check(cache_path=cache)
    read = []
    original = verify.scan_case
    monkeypatch.setattr(
        verify, "scan_case", lambda images, label: read.append(images[0].name) or original(images, label)
    )
    assert check(cache_path=cache) == first
    assert read == []
    path = write(raw_folder / "imagesUn" / "u1_f1_0000.nii.gz", np.zeros(SHAPE, np.float32))
    os.utime(path, ns=(1, 1))
    assert check(cache_path=cache).set_aside.keys() == {"u1_f1"}
    assert read == ["u1_f1_0000.nii.gz"]


def test_an_interrupted_check_keeps_what_it_has_scanned(raw_folder: Path, check, monkeypatch, tmp_path: Path):
    original, read = verify.scan_case, []

    def stops(images: list[Path], label: Path | None) -> verify.CaseScan:
        read.append(images[0].name)
        if len(read) == 4:
            raise KeyboardInterrupt
        return original(images, label)

    monkeypatch.setattr(verify, "scan_case", stops)
    with pytest.raises(KeyboardInterrupt):
        check(cache_path=tmp_path / "scans.json")
    done = read[:3]
    check(cache_path=tmp_path / "scans.json")
    assert not set(done) & set(read[4:])
    assert len(set(read)) == 6


def test_scan_without_label_does_not_stand_for_one_with_it(raw_folder: Path, check, tmp_path: Path):
    write(raw_folder / "labelsTr" / "a1_f1.nii.gz", label((0, 9)))
    check(cache_path=tmp_path / "c.json", check_integrity=False)
    with pytest.raises(UserError, match="value 9"):
        check(cache_path=tmp_path / "c.json")


def test_broken_cache_counts_as_empty(check, tmp_path: Path):
    (tmp_path / "c.json").write_text("{")
    assert check(cache_path=tmp_path / "c.json") == check()
