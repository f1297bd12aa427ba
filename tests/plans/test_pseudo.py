"""Masks of unknown quality: what is refused, what they may touch, and what preprocessing makes of them."""

from __future__ import annotations

import json
import shutil

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk

from nnssl.errors import UserError
from nnssl.plans.manifest import load_manifest, require_current
from nnssl.plans.pseudo import ignore_value, pseudo_cases, pseudo_digest, pseudo_weights, require_unseen, with_ignore

SHAPE = (16, 24, 24)
UNSURE = 3


def write_mask(toy, case: str, value=None, spacing=(1.0, 1.0, 2.0), folder: str = "labelsPseudo") -> None:
    """Write a mask on the grid of the toy images: shell, core and unsure voxels, or one value everywhere."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[4:12, 8:16, 8:16], mask[6:10, 10:14, 10:14], mask[:2] = 1, 2, UNSURE
    if value is not None:
        mask[:] = value
    image = sitk.GetImageFromArray(mask)
    image.SetSpacing(spacing)
    (toy.raw / folder).mkdir(exist_ok=True)
    sitk.WriteImage(image, str(toy.raw / folder / f"{case}.nii.gz"))


def write_record(toy, **content) -> None:
    record = {"version": 1, "ignore": UNSURE, "saw": {"trained": {"lab": "a"}}, "cases": {}, **content}
    (toy.raw / "labelsPseudo" / "nnssl_pseudo.json").write_text(json.dumps(record))


def hash_of(toy, role: str, case: str) -> str:
    return load_manifest(toy.folder)[role][case]


def refused(toy, *words: str) -> None:
    with pytest.raises(UserError) as error:
        toy.run()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unsure_voxels_take_the_ignore_label_or_the_next_value():
    assert ignore_value({"background": 0, "a": 1, "b": 2}) == 3
    assert ignore_value({"background": 0, "whole": [1, 2], "core": 2}) == 3
    assert ignore_value({"background": 0, "a": 1, "ignore": 2}) == 2
    source = {"labels": {"background": 0, "a": 1}, "file_ending": ".png"}
    assert with_ignore(source)["labels"] == {"background": 0, "a": 1, "ignore": 2}
    assert source["labels"] == {"background": 0, "a": 1}


@pytest.mark.parametrize(
    ("case", "options", "words"),
    [
        ("case_000", {}, ("imagesUn", "case_000")),  # a labeled case
        ("nobody", {}, ("imagesUn", "nobody")),
        ("case_004", {"spacing": (1.0, 1.0, 3.0)}, ("grid", "case_004", "spacing")),
        ("case_004", {"value": 7}, ("labels of dataset.json", "case_004", "7 in")),
    ],
)
def test_a_mask_that_fits_no_case_grid_or_label_is_refused_by_name(toy, case, options, words):
    write_mask(toy, "case_003")
    write_mask(toy, case, **options)
    write_record(toy)
    refused(toy, *words)


@pytest.mark.parametrize("reason", ["trained", "watched"])
@pytest.mark.parametrize(
    ("role", "case", "folder"), [("monitoring", "case_009", "imagesVal"), ("test", "case_010", "imagesTs")]
)
def test_masks_of_a_model_that_saw_a_held_out_case_are_refused(toy, reason, role, case, folder):
    write_mask(toy, "case_003")
    write_record(toy, saw={"trained": {"x": "y"}, reason: {"renamed": hash_of(toy, role, case)}})
    refused(toy, "val or test", f"{folder}/{case}", reason)
    write_record(toy, saw={reason: {"case_000": hash_of(toy, "labeled", "case_000")}})
    assert toy.run().processed["2d"]["pseudo"] == 1  # a labeled case is no secret


def test_unseen_is_judged_by_content_not_by_name():
    require_unseen({"trained": {"p1": "abc"}}, {"fold 0": {"p1": "xyz"}})
    require_unseen(None, {"fold 0": {"p1": "xyz"}})
    with pytest.raises(UserError, match="fold 0/p2"):
        require_unseen({"trained": {"p1": "abc"}}, {"fold 0": {"p2": "abc"}})


def test_masks_without_a_record_or_without_saw_are_used_with_a_warning(toy):
    write_mask(toy, "case_003")
    with pytest.warns(UserWarning, match="origin of the masks .* is unknown"):
        manifest = toy.run().manifest
    assert manifest["pseudo_source"] == {"ignore": UNSURE, "weights": {"case_003": 1.0}, "saw": None, "origin": None}
    write_record(toy, saw=None)
    with pytest.warns(UserWarning, match="does not say which labeled cases"):
        toy.run()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"version": 9}, ("version 9",)),
        ({"ignore": 4}, ("4 in nnssl_pseudo.json", "allowed 3")),
        ({"cases": {"case_003": {"weight": -1}}}, ("case_003: -1",)),
        ({"cases": {"case_003": {"weight": "much"}}}, ("case_003: 'much'",)),
    ],
)
def test_a_record_that_does_not_fit_is_refused(toy, content, words):
    write_mask(toy, "case_003")
    write_record(toy, **content)
    refused(toy, *words)


def test_weights_are_read_from_the_record_and_not_all_may_be_zero(toy):
    for case in ("case_003", "case_004"):
        write_mask(toy, case)
    write_record(toy, cases={"case_003": {"weight": 0.25}})
    manifest = toy.run().manifest
    assert pseudo_weights(manifest, ["case_003", "case_004"]) == [0.25, 1.0]
    before = pseudo_digest(manifest, "nnUNetPlans_2d", ["case_003", "case_004"])
    assert before != pseudo_digest(manifest, "nnUNetPlans_2d", ["case_003"])
    manifest["pseudo_source"]["weights"]["case_004"] = 0.5
    assert before != pseudo_digest(manifest, "nnUNetPlans_2d", ["case_003", "case_004"])
    manifest["pseudo_source"]["weights"] = {"case_003": 0, "case_004": 0}
    with pytest.raises(UserError, match="weight above 0"):
        pseudo_weights(manifest, ["case_003", "case_004"])


def test_only_new_and_changed_masks_are_preprocessed_and_those_that_go_are_removed(toy):
    for case in ("case_003", "case_004"):
        write_mask(toy, case)
    write_record(toy)
    nothing = {"labeled": 0, "unlabeled": 0, "monitoring": 0}
    assert toy.run().processed["2d"] == {**nothing, "pseudo": 2}
    assert toy.run().processed["2d"] == {**nothing, "pseudo": 0}
    write_mask(toy, "case_004", value=1)
    assert toy.run().processed["2d"] == {**nothing, "pseudo": 1}
    (toy.raw / "labelsPseudo" / "case_003.nii.gz").unlink()
    assert toy.run().processed["2d"] == {**nothing, "pseudo": 0}
    folder = toy.folder / "nnUNetPlans_2d_pseudo"
    assert {path.name for path in folder.iterdir()} == {"case_004.b2nd", "case_004_seg.b2nd", "case_004.pkl"}
    shutil.rmtree(toy.raw / "labelsPseudo")
    assert toy.run().processed["2d"] == nothing
    assert not list(folder.iterdir())
    assert pseudo_cases(load_manifest(toy.folder), "nnUNetPlans_2d") == []


def test_the_preprocessed_mask_is_the_raw_one_on_the_image_of_the_unlabeled_part(toy):
    write_mask(toy, "case_003")
    write_record(toy)
    toy.run()
    part = toy.folder / "nnUNetPlans_2d_pseudo"
    data, seg = (blosc2.open(str(part / f"case_003{end}.b2nd"))[:] for end in ("", "_seg"))
    unlabeled = blosc2.open(str(toy.folder / "nnUNetPlans_2d_unlabeled" / "case_003.b2nd"))[:]
    assert np.array_equal(data, unlabeled)
    assert {int(v): int((seg == v).sum()) for v in (1, 2, UNSURE)} == {1: 448, 2: 64, UNSURE: 2 * 24 * 24}


def test_stale_masks_are_refused_by_training(toy):
    write_mask(toy, "case_003")
    write_record(toy)
    plans = toy.run().plans
    (toy.folder / "nnUNetPlans_2d_pseudo" / "case_003.pkl").unlink()
    with pytest.raises(UserError, match="_pseudo"):
        require_current(toy.folder, plans, "2d")


def test_a_mask_of_an_image_that_is_set_aside_is_left_out_with_a_warning(toy):
    write_mask(toy, "case_003")
    write_mask(toy, "case_004")
    write_record(toy)
    image = sitk.GetImageFromArray(np.full(SHAPE, 5, np.float32))
    sitk.WriteImage(image, str(toy.raw / "imagesUn" / "case_003_0000.nii.gz"))
    with pytest.warns(UserWarning, match="set aside are not used: case_003"):
        assert list(toy.run().manifest["pseudo"]) == ["case_004"]


def test_files_that_are_no_masks_are_named(toy):
    write_mask(toy, "case_003")
    write_record(toy)
    (toy.raw / "labelsPseudo" / "case_004.nrrd").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"no mask CASE.nii.gz are ignored: case_004.nrrd$"):
        assert list(toy.run().manifest["pseudo"]) == ["case_003"]


def test_an_older_manifest_without_masks_is_taken_over(toy):
    path = toy.folder / "nnssl_unlabeled.json"
    manifest = json.loads(path.read_text())
    del manifest["pseudo"], manifest["pseudo_source"], manifest["configurations"]["nnUNetPlans_2d"]["pseudo"]
    path.write_text(json.dumps(manifest))
    assert require_current(toy.folder, toy.plans(), "2d")["labeled"] == ["case_000", "case_001", "case_002"]
    write_mask(toy, "case_003")
    write_record(toy)
    assert toy.run().processed["2d"] == {"labeled": 0, "unlabeled": 0, "monitoring": 0, "pseudo": 1}


def test_garbage_in_the_masks_changes_no_byte_of_fingerprint_plans_and_labeled_data(toy):
    def contents() -> dict[str, bytes]:
        chosen = [*toy.folder.glob("*.json"), *(toy.folder / "nnUNetPlans_2d").iterdir()]
        chosen += [*(toy.folder / "nnUNetPlans_2d_unlabeled").iterdir(), *(toy.folder / "gt_segmentations").iterdir()]
        ours = ("nnssl_unlabeled.json", "nnssl_verified.json")
        return {str(p): decoded(p) for p in chosen if p.name not in ours}

    def decoded(path) -> bytes:
        return blosc2.open(str(path))[:].tobytes() if path.suffix == ".b2nd" else path.read_bytes()

    toy.run(clean=True)
    clean = contents()
    for case in (f"case_{i:03d}" for i in range(3, 9)):
        write_mask(toy, case, value=2)
    write_record(toy)
    assert toy.run(clean=True).processed["2d"]["pseudo"] == 6
    assert len(clean) > 20
    assert contents() == clean
