"""Reading and matching of masks: formats, geometry, bad files."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl.errors import UserError
from nnssl.evaluation.masks import list_masks, match_masks, read_mask, require_same_geometry

LABELS = np.arange(24).reshape(2, 3, 4) % 3
TURN = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_volumes_keep_labels_and_spacing(tmp_path, write, ending):
    mask = read_mask(write(tmp_path / f"a{ending}", LABELS))
    assert np.array_equal(mask.array, LABELS)
    assert mask.spacing == pytest.approx((3.0, 1.0, 0.5))


def test_png_counts_pixels(tmp_path, write):
    mask = read_mask(write(tmp_path / "a.png", LABELS[0], spacing=(0.2, 0.2)))
    assert np.array_equal(mask.array, LABELS[0])
    assert mask.spacing == (1.0, 1.0)
    assert not mask.has_spacing


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("size", {"array": LABELS[:, :2]}),
        ("spacing", {"spacing": (0.5, 1.0, 3.01)}),
        ("origin", {"origin": (0.0, 0.1, 0.0)}),
        ("direction", {"direction": TURN}),
    ],
)
def test_another_grid_is_refused_by_name(tmp_path, write, what, change):
    reference = read_mask(write(tmp_path / "r.nii.gz", LABELS))
    prediction = read_mask(write(tmp_path / "p.nii.gz", **({"array": LABELS} | change)))
    with pytest.raises(UserError, match=f"case: {what}"):
        require_same_geometry("case", reference, prediction)


def test_rounding_of_headers_is_no_other_grid(tmp_path, write):
    reference = read_mask(write(tmp_path / "r.mha", LABELS))
    near = {"spacing": (0.500001, 1.0, 3.0), "origin": (1e-4, 0, 0)}
    require_same_geometry("case", reference, read_mask(write(tmp_path / "p.nii.gz", LABELS, **near)))


def test_a_missing_prediction_is_named_and_an_extra_one_reported(tmp_path, write):
    for case in ("a", "b"):
        write(tmp_path / "ref" / f"{case}.nii.gz", LABELS)
    for case in ("a", "z"):
        write(tmp_path / "pred" / f"{case}.mha", LABELS)
    with pytest.raises(UserError, match=r"for b;"):
        match_masks(tmp_path / "ref", tmp_path / "pred")
    write(tmp_path / "pred" / "b.nii.gz", LABELS)
    pairs, extra = match_masks(tmp_path / "ref", tmp_path / "pred")
    assert list(pairs) == ["a", "b"]
    assert extra == ["z"]


def test_folders_without_masks_are_refused(tmp_path, write):
    with pytest.raises(UserError, match="exist"):
        list_masks(tmp_path / "absent")
    (tmp_path / "plans.json").write_text("{}")
    (tmp_path / "._a.nii.gz").write_text("resource fork")
    with pytest.raises(UserError, match="must hold masks"):
        list_masks(tmp_path)
    write(tmp_path / "a.nii.gz", LABELS)
    write(tmp_path / "a.mha", LABELS)
    with pytest.raises(UserError, match="one mask per case"):
        list_masks(tmp_path)


def test_bad_files_are_refused(tmp_path, write):
    truncated = write(tmp_path / "t.nii.gz", np.random.default_rng(0).integers(0, 3, (20, 20, 20)))
    truncated.write_bytes(truncated.read_bytes()[:200])
    with pytest.raises(UserError, match="readable"):
        read_mask(truncated)
    for name, value, message in (("scores", 0.5, "integer"), ("nan", np.nan, "NaN")):
        path = tmp_path / f"{name}.nii.gz"
        sitk.WriteImage(sitk.GetImageFromArray(np.full((2, 3, 4), value)), str(path))
        with pytest.raises(UserError, match=message):
            read_mask(path)
    color = tmp_path / "color.png"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 3), np.uint8), isVector=True), str(color))
    with pytest.raises(UserError, match="one channel"):
        read_mask(color)


def test_integers_saved_as_floats_are_labels(tmp_path):
    path = tmp_path / "f.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(LABELS.astype(np.float32)), str(path))
    assert np.array_equal(read_mask(path).array, LABELS)
