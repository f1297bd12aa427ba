"""Preprocessing: no label of an unlabeled case is read, and a rerun touches only what changed."""

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnssl.errors import UserError
from nnssl.plans.manifest import load_manifest, require_current


def files_of(folder) -> dict:
    """Return {relative path: (time, content)} of every file but the cache of scans, which holds file times."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "nnssl_verified.json"
    }


def contents(folder) -> dict:
    return {name: content for name, (_, content) in files_of(folder).items()}


def touched(before: dict, after: dict) -> set[str]:
    """Return the cases whose preprocessed files changed, appeared or vanished."""
    names = {n for n in before.keys() | after.keys() if before.get(n) != after.get(n) and "Plans_" in n}
    return {n.rsplit("/", 1)[1].split(".")[0].removesuffix("_seg") for n in names}


def brighten(path) -> None:
    image = sitk.ReadImage(str(path))
    sitk.WriteImage(image * 2.0, str(path))


def test_garbage_in_hidden_labels_changes_no_byte(new_toy):
    results = []
    for name in ("honest", "garbage"):
        toy = new_toy(name, labeled=2, unlabeled=3)
        for case in ("case_002", "case_003", "case_004"):
            image = sitk.ReadImage(str(toy.raw / "imagesUn" / f"{case}_0000.nii.gz"))
            label = sitk.Cast(image > 120, sitk.sitkUInt8)
            if name == "garbage":
                label = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 99, (3, 4, 5)).astype(np.uint8))
            for folder in ("labelsTr", "labelsUn"):
                (toy.raw / folder).mkdir(exist_ok=True)
                sitk.WriteImage(label, str(toy.raw / folder / f"{case}.nii.gz"))
        toy.run("2d", "3d_fullres")
        results.append(contents(toy.folder))
    assert results[0].keys() == results[1].keys()
    assert {name for name in results[0] if results[0][name] != results[1][name]} == set()
    assert not any("gt_segmentations/case_002" in name for name in results[0])


def test_stock_data_set_reads_unlabeled_cases_without_labels(toy):
    folder = toy.folder / "nnUNetPlans_2d_unlabeled"
    data_set = infer_dataset_class(str(folder))(str(folder))
    assert data_set.identifiers == [f"case_{i:03d}" for i in range(3, 9)]
    for case in data_set.identifiers:
        data, seg, _, properties = data_set.load_case(case)
        assert data.shape == seg.shape == (1, 16, 24, 24)
        assert set(np.unique(seg[:])) <= {-1, 0}
        assert "class_locations" not in properties
        assert abs(float(data[:].mean())) < 1e-3  # z-scored


def test_monitoring_cases_have_their_labels_beside_the_training_data(toy):
    folder = toy.folder / "nnUNetPlans_2d_monitoring"
    data_set = infer_dataset_class(str(folder))(str(folder))
    assert data_set.identifiers == ["case_009"]
    assert set(np.unique(data_set.load_case("case_009")[1][:])) == {0, 1, 2}


def test_a_rerun_touches_nothing(toy):
    before = files_of(toy.folder)
    prepared = toy.run()
    assert prepared.processed == {"2d": {"labeled": 0, "unlabeled": 0, "monitoring": 0}}
    after = files_of(toy.folder)
    assert {n for n in before if before[n] != after[n]} <= {"dataset.json"}  # nnU-Net's planner copies it each time


def test_only_a_changed_unlabeled_image_is_done_again(toy):
    before = files_of(toy.folder)
    fingerprint = before["dataset_fingerprint.json"]
    brighten(toy.raw / "imagesUn" / "case_004_0000.nii.gz")
    assert toy.run().processed["2d"] == {"labeled": 0, "unlabeled": 1, "monitoring": 0}
    after = files_of(toy.folder)
    assert touched(before, after) == {"case_004"}
    assert after["dataset_fingerprint.json"] == fingerprint


def test_removed_and_moved_cases_leave_no_file_behind(toy):
    toy.run("3d_fullres")
    before = files_of(toy.folder)
    (toy.raw / "imagesUn" / "case_004_0000.nii.gz").unlink()
    shutil.move(toy.raw / "imagesUn" / "case_005_0000.nii.gz", toy.raw / "imagesTr" / "case_005_0000.nii.gz")
    shutil.copy(toy.raw / "labelsTr" / "case_000.nii.gz", toy.raw / "labelsTr" / "case_005.nii.gz")
    assert toy.run("2d").processed["2d"] == {"labeled": 1, "unlabeled": 0, "monitoring": 0}
    assert touched(before, files_of(toy.folder)) == {"case_004", "case_005"}
    assert require_current(toy.folder, toy.plans(), "2d")["labeled"] == ["case_000", "case_001", "case_002", "case_005"]
    assert (toy.folder / "gt_segmentations" / "case_005.nii.gz").is_file()
    assert not list((toy.folder / "nnUNetPlans_3d_fullres_unlabeled").glob("case_00[45]*"))
    with pytest.raises(UserError, match=r"1 missing \(case_005\)"):  # 3d_fullres lags behind now
        require_current(toy.folder, toy.plans(), "3d_fullres")
    assert len(json.loads((toy.folder / "splits_final.json").read_text())) == 4


def test_a_changed_label_renews_its_case_and_the_fingerprint(toy):
    before = files_of(toy.folder)
    label = toy.raw / "labelsTr" / "case_001.nii.gz"
    image = sitk.ReadImage(str(label))
    array = sitk.GetArrayFromImage(image)
    array[array == 2] = 1
    changed = sitk.GetImageFromArray(array)
    changed.CopyInformation(image)
    sitk.WriteImage(changed, str(label))
    assert toy.run().processed["2d"] == {"labeled": 1, "unlabeled": 0, "monitoring": 0}
    assert touched(before, files_of(toy.folder)) == {"case_001"}
    assert (toy.folder / "gt_segmentations" / "case_001.nii.gz").read_bytes() == label.read_bytes()


def test_ct_statistics_of_a_new_label_renew_everything(new_toy):
    toy = new_toy("ct", labeled=2, unlabeled=2, monitoring=1, test=0, channel="CT")
    toy.run()
    brighten(toy.raw / "imagesTr" / "case_000_0000.nii.gz")
    old_plans = toy.plans()
    assert toy.run().processed["2d"] == {"labeled": 2, "unlabeled": 2, "monitoring": 1}
    with pytest.raises(UserError, match="under the plan in use"):
        require_current(toy.folder, old_plans, "2d")


def test_renamed_classes_renew_what_holds_labels(toy):
    content = json.loads((toy.raw / "dataset.json").read_text())
    content["labels"] = {"background": 0, "core": [1, 2], "shell": 2}
    content["regions_class_order"] = [1, 2]
    (toy.raw / "dataset.json").write_text(json.dumps(content))
    assert toy.run().processed["2d"] == {"labeled": 3, "unlabeled": 0, "monitoring": 1}


def test_an_interrupted_run_is_refused_and_then_continued(toy, monkeypatch):
    brighten(toy.raw / "imagesUn" / "case_004_0000.nii.gz")
    brighten(toy.raw / "imagesUn" / "case_006_0000.nii.gz")
    original = DefaultPreprocessor.run_case_save

    def interrupted(self, output, *rest):
        if output.endswith("case_006"):
            raise KeyboardInterrupt
        original(self, output, *rest)

    monkeypatch.setattr(DefaultPreprocessor, "run_case_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toy.run()
    with pytest.raises(UserError, match=r"1 missing \(case_006\)"):
        require_current(toy.folder, toy.plans(), "2d")
    monkeypatch.setattr(DefaultPreprocessor, "run_case_save", original)
    assert toy.run().processed["2d"] == {"labeled": 0, "unlabeled": 1, "monitoring": 0}
    assert require_current(toy.folder, toy.plans(), "2d")


def test_an_interrupted_run_leaves_no_stale_ground_truth(toy, monkeypatch):
    label = toy.raw / "labelsTr" / "case_001.nii.gz"
    image = sitk.ReadImage(str(label))
    sitk.WriteImage(sitk.Cast(image > 0, sitk.sitkUInt8), str(label))

    def interrupted(self, *arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DefaultPreprocessor, "run_case_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            toy.run()
    toy.run()
    assert (toy.folder / "gt_segmentations" / "case_001.nii.gz").read_bytes() == label.read_bytes()


def test_a_stray_file_among_the_labeled_is_ignored(new_toy):
    toy = new_toy("stray", labeled=2, unlabeled=1)
    (toy.raw / "imagesTr" / "._case_000_0000.nii.gz").write_bytes(b"what macOS writes beside files on other disks")
    assert toy.run().processed["2d"]["labeled"] == 2


def test_cases_that_fail_are_set_aside_and_the_run_goes_on(toy, monkeypatch):
    shutil.copy(toy.raw / "dataset.json", toy.raw / "imagesUn" / "text_0000.nii.gz")
    brighten(toy.raw / "imagesUn" / "case_004_0000.nii.gz")
    original = DefaultPreprocessor.run_case_save

    def failing(self, output, *rest):
        if output.endswith("case_004"):
            raise RuntimeError("no such luck")
        original(self, output, *rest)

    monkeypatch.setattr(DefaultPreprocessor, "run_case_save", failing)
    toy.run()
    manifest = load_manifest(toy.folder)
    assert set(manifest["set_aside"]) == {"text", "case_004"}
    assert manifest["set_aside"]["case_004"] == "RuntimeError: no such luck"
    assert "case_004" not in require_current(toy.folder, toy.plans(), "2d")["unlabeled"]
    monkeypatch.setattr(DefaultPreprocessor, "run_case_save", original)
    toy.run()
    assert "case_004" in require_current(toy.folder, toy.plans(), "2d")["unlabeled"]


def test_a_labeled_case_that_fails_stops_the_run(toy, monkeypatch):
    brighten(toy.raw / "imagesTr" / "case_001_0000.nii.gz")

    def failing(self, output, *rest):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(DefaultPreprocessor, "run_case_save", failing)
    with pytest.raises(UserError, match="case_001: RuntimeError: no such luck"):
        toy.run()
    with pytest.raises(UserError, match=r"1 missing \(case_001\)"):
        require_current(toy.folder, toy.plans(), "2d")


def test_folders_of_unknown_origin_are_emptied(toy):
    folder = toy.folder / "nnUNetPlans_2d_unlabeled"
    shutil.copy(folder / "case_003.pkl", folder / "stranger.pkl")
    (folder / "case_005_seg.b2nd").unlink()
    assert toy.run().processed["2d"] == {"labeled": 0, "unlabeled": 1, "monitoring": 0}
    assert require_current(toy.folder, toy.plans(), "2d")


def test_a_users_splits_are_kept_and_ours_follow_the_labels(toy):
    path = toy.folder / "splits_final.json"
    assert [s["val"] for s in json.loads(path.read_text())] == [["case_000"], ["case_001"], ["case_002"]]
    mine = [{"train": ["case_000"], "val": ["case_001"]}]
    path.write_text(json.dumps(mine))
    toy.run()
    toy.run()
    assert json.loads(path.read_text()) == mine
    (toy.raw / "splits_final.json").write_text(json.dumps([{"train": ["case_001"], "val": ["case_000"]}]))
    with pytest.raises(UserError, match="must agree"):
        toy.run()
    path.unlink()
    toy.run()
    assert json.loads(path.read_text()) == [{"train": ["case_001"], "val": ["case_000"]}]


def test_images_smaller_than_the_patch_and_no_unlabeled_case_run(new_toy):
    from nnssl.plans.options import Overrides

    toy = new_toy("tiny", labeled=1, unlabeled=0, monitoring=0, test=0, shape=(5, 9, 9))
    prepared = toy.run("2d", planning={"overrides": {"2d": Overrides(patch_size=(32, 32), base_features=4)}})
    assert require_current(toy.folder, prepared.plans, "2d")["unlabeled"] == []
    assert json.loads((toy.folder / "splits_final.json").read_text()) == []


def test_clean_trusts_no_earlier_scan(toy):
    cache = toy.folder / "nnssl_verified.json"
    scans = json.loads(cache.read_text())
    scans["scans"]["imagesUn/case_004"]["scan"]["hash"] = "0" * 64
    cache.write_text(json.dumps(scans))
    assert toy.run().manifest["cases"]["case_004"]["hash"] == "0" * 64
    assert toy.run(clean=True).manifest["cases"]["case_004"]["hash"] != "0" * 64


def test_clean_starts_over_even_from_a_broken_manifest(toy):
    shutil.move(toy.raw / "imagesUn" / "case_005_0000.nii.gz", toy.raw / "imagesTr" / "case_005_0000.nii.gz")
    shutil.copy(toy.raw / "labelsTr" / "case_000.nii.gz", toy.raw / "labelsTr" / "case_005.nii.gz")
    assert toy.run(clean=True).processed["2d"] == {"labeled": 4, "unlabeled": 5, "monitoring": 1}
    assert len(json.loads((toy.folder / "splits_final.json").read_text())) == 4  # still ours, so it follows the labels
    (toy.folder / "nnssl_unlabeled.json").write_text("{")
    with pytest.raises(UserError, match="--clean"):
        toy.run()
    assert toy.run(clean=True).processed["2d"]["unlabeled"] == 5
