"""M&Ms from a tiny copy of OpenDataset: 4D files, a table of subjects, vendors as domains."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl.cli import make_subset
from nnssl.dataset_conversion import volumes
from nnssl.dataset_conversion.published import load_published
from nnssl.imageio import read_array
from nnssl.layout import RawDataset

PUBLISHED = load_published("mnms.json")
LABELED = PUBLISHED["protocols"]["MnMs-A-2"]["labeled"][:2]  # vendor B
SUBJECTS = {LABELED[0]: "B", LABELED[1]: "B", PUBLISHED["A"][0]: "A", PUBLISHED["C"][0]: "C"}
POOL = "Z0Z0Z0"  # a subject of Training/Unlabeled, in no published list
FRAMES = 40


def cine(toy, seed: int, frames: tuple[int, ...], label: bool) -> sitk.Image:
    """A 4D file whose annotated frames are scans or masks of their own seed."""
    empty = toy.scan(0) * 0
    parts = [toy.mask(seed + t, (0, 1, 2, 3)) if label else toy.scan(seed + t) for t in range(FRAMES)]
    return sitk.JoinSeries(
        [p if t in frames or not label else sitk.Cast(empty, sitk.sitkUInt8) for t, p in enumerate(parts)]
    )


@pytest.fixture
def mnms(download: Path, toy) -> Path:
    rows = ["External code,VendorName,Vendor,Centre,ED,ES"]
    for i, (subject, vendor) in enumerate(SUBJECTS.items()):
        part = "Testing" if vendor == "C" else "Training/Labeled"
        frames = tuple(PUBLISHED["frames"][subject])
        toy.write(cine(toy, 100 * i, frames, False), download / part / subject / f"{subject}_sa.nii.gz")
        toy.write(cine(toy, 100 * i, frames, True), download / part / subject / f"{subject}_sa_gt.nii.gz")
        rows.append(f"{subject},X,{vendor},1,{frames[1]},{frames[0]}")
    toy.write(cine(toy, 900, (), False), download / "Training/Unlabeled" / POOL / f"{POOL}_sa.nii.gz")
    rows.append(f"{POOL},X,C,4,3,7")
    (download / "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv").write_text("\n".join(rows))
    return download


def test_annotated_frames_of_every_part_are_cases(convert_to, mnms: Path, toy):
    dataset, _, err = convert_to("MnMs")
    expected = [f"{s}_sa_{f}" for s in SUBJECTS for f in PUBLISHED["frames"][s]]
    assert sorted(dataset.cases("imagesTr")) == sorted(expected)
    subject, frame = LABELED[1], PUBLISHED["frames"][LABELED[1]][1]
    array, grid = read_array(dataset.cases("imagesTr")[f"{subject}_sa_{frame}"][0])
    np.testing.assert_array_equal(array[0], sitk.GetArrayFromImage(toy.scan(100 + frame)))
    assert grid.spacing == pytest.approx(toy.scan(0).GetSpacing())
    label = read_array(dataset.label_file("imagesTr", f"{subject}_sa_{frame}"))[0][0]
    np.testing.assert_array_equal(label, sitk.GetArrayFromImage(toy.mask(100 + frame, (0, 1, 2, 3))))
    assert {dataset.nnssl["domains"][f"{s}_sa_{f}"] for s in LABELED for f in PUBLISHED["frames"][s]} == {"B"}
    assert dataset.patient(f"{subject}_sa_{frame}") == subject
    assert "2 images without labels are left out" in err


def test_each_file_is_read_once_for_all_its_frames(convert_to, mnms: Path, monkeypatch):
    read: list[str] = []
    original = volumes.read_image
    monkeypatch.setattr(volumes, "read_image", lambda path: read.append(path.name) or original(path))
    convert_to("MnMs")
    assert sorted(read) == sorted(f"{s}_sa{part}.nii.gz" for s in SUBJECTS for part in ("", "_gt"))


def test_a_file_that_has_changed_is_read_again(tmp_path: Path, toy):
    path = tmp_path / "x.nii.gz"
    for seed in (1, 2):
        toy.write(toy.scan(seed), path)
        os.utime(path, ns=(seed, seed))
        np.testing.assert_array_equal(
            sitk.GetArrayFromImage(volumes.read_again(path)), sitk.GetArrayFromImage(toy.scan(seed))
        )


def test_subjects_without_labels_are_the_pool(convert_to, mnms: Path):
    dataset, _, _ = convert_to("MnMs", "--with_unlabeled")
    assert list(dataset.cases("imagesUn")) == [f"{POOL}_sa_3", f"{POOL}_sa_7"]
    assert dataset.nnssl["domains"][f"{POOL}_sa_3"] == "C"


def test_without_the_table_published_vendors_and_frames_count(convert_to, mnms: Path):
    next(mnms.glob("*.csv")).unlink()
    dataset, _, err = convert_to("MnMs")
    assert len(dataset.cases("imagesTr")) == 8
    assert "no table of the subjects" in err
    assert f"set aside: {POOL}: neither the table nor the published lists" in err


def test_table_wins_over_the_published_lists(convert_to, mnms: Path):
    (table,) = mnms.glob("*.csv")
    table.write_text(table.read_text().replace(f"{LABELED[0]},X,B", f"{LABELED[0]},X,D"))
    dataset, _, err = convert_to("MnMs")
    assert f"vendor or frames of 1 subjects are not the published ones; the table counts: {LABELED[0]}" in err
    assert {dataset.nnssl["domains"][c] for c in dataset.cases("imagesTr") if c.startswith(LABELED[0])} == {"D"}


def test_frame_beyond_the_file_is_refused(convert_fails, mnms: Path):
    (table,) = mnms.glob("*.csv")
    table.write_text(table.read_text() + f"\n{LABELED[0]},X,B,1,0,{FRAMES}")
    assert f"has no frame {FRAMES}" in convert_fails("MnMs")


def test_vendor_left_out_as_published(convert_to, mnms: Path, raw: Path, run):
    convert_to("MnMs")
    code, _, err = run(make_subset.main, "-d", 60, "-o", 61, "-n", "DG", "--published", "MnMs-A-2")
    assert code == 0, err
    dataset = RawDataset.load(raw / "Dataset061_DG")
    roles = {
        folder: {dataset.patient(c) for c in dataset.cases(folder)} for folder in ("imagesTr", "imagesUn", "imagesTs")
    }
    assert roles == {"imagesTr": set(LABELED), "imagesUn": {PUBLISHED["C"][0]}, "imagesTs": {PUBLISHED["A"][0]}}
