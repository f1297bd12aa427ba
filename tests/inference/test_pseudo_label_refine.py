"""The plug for refiners: what they get, what they may return, and how folders are exchanged."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl.errors import UserError
from nnssl.inference.pseudo_label_refine import FolderExchange, load_refiner, refine

SCALE = 65535


def example() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return image, label map with labels 1 and 3, and confidences of a half."""
    label = np.zeros((2, 6, 6), np.uint16)
    label[0, :3, :3], label[1, 4:, 4:] = 1, 3
    return np.ones((1, *label.shape), np.float32), label, np.full(label.shape, SCALE // 2, np.uint16)


def test_a_refiner_gets_one_mask_a_label_with_a_tight_box():
    seen = {}

    def keep(image, masks, boxes, labels):
        seen.update(image=image, masks=masks, boxes=boxes, labels=labels)
        return masks, np.ones(len(masks))

    image, label, steps = example()
    refined, after = refine(keep, image, label, steps, SCALE)
    assert np.array_equal(refined, label)
    assert np.array_equal(after, steps)  # what does not change keeps its confidence
    assert seen["labels"].tolist() == [1, 3]
    assert np.array_equal(seen["masks"], np.stack([label == 1, label == 3]))
    assert seen["masks"].dtype == np.uint8
    assert seen["boxes"].tolist() == [[[0, 0, 0], [1, 3, 3]], [[1, 4, 4], [2, 6, 6]]]


def test_small_masks_are_painted_over_large_ones_and_changes_are_as_sure_as_their_score():
    def overlap(image, masks, boxes, labels):
        large, small = np.zeros_like(masks)
        large[0], small[0, 0] = 1, 1
        return np.stack([large, small]), np.array([0.25, 0.75])

    image, label, steps = example()
    refined, after = refine(overlap, image, label, steps, SCALE)
    assert (refined[0, 0] == 3).all()
    assert (refined[0, 1:] == 1).all()
    assert not refined[1].any()
    assert (after[0, 0] == round(0.75 * SCALE)).all()
    assert after[0, 5, 5] == round(0.25 * SCALE)  # taken
    assert after[1, 5, 5] == round(0.75 * SCALE)  # lost by label 3
    assert after[1, 0, 0] == after[0, 1, 1] == SCALE // 2  # as before


def test_a_case_without_foreground_is_not_refined():
    def never(*arguments):
        raise AssertionError("called")

    image, label, steps = example()
    refined, after = refine(never, image, np.zeros_like(label), steps, SCALE)
    assert not refined.any()
    assert np.array_equal(after, steps)


@pytest.mark.parametrize(
    "answer", [lambda m: (m[:1], np.ones(2)), lambda m: (m, np.ones(3)), lambda m: (m, [2.0, 0.5])]
)
def test_answers_of_another_shape_or_range_are_refused(answer):
    image, label, steps = example()
    with pytest.raises(UserError, match="a refiner returns"):
        refine(lambda image, masks, boxes, labels: answer(masks), image, label, steps, SCALE)


def test_a_refiner_is_found_in_the_working_directory_and_a_wrong_name_is_refused(tmp_path, monkeypatch):
    (tmp_path / "toy_refiner.py").write_text(
        "def identity(image, masks, boxes, labels):\n    return masks, labels * 0\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_refiner("toy_refiner:identity").__name__ == "identity"
    for spec in ("toy_refiner:absent", "no_such_module:f", "toy_refiner", "toy_refiner:__name__"):
        with pytest.raises(UserError, match="--refiner"):
            load_refiner(spec)


def test_a_case_goes_out_once_and_comes_back_refined(tmp_path):
    image, label, _ = example()
    source = tmp_path / "case_0000.nii.gz"
    like = sitk.GetImageFromArray(image[0])
    like.SetSpacing((1.0, 2.0, 3.0))
    sitk.WriteImage(like, str(source))
    exchange = FolderExchange(tmp_path / "out", ".nii.gz", {"fold_all": "a"})
    assert exchange.exchange("case", [source], label, {0, 1, 2, 3}) is None
    assert exchange.missing == ["case"]
    assert (tmp_path / "out" / "images" / source.name).read_bytes() == source.read_bytes()
    mask = sitk.ReadImage(str(tmp_path / "out" / "masks" / "case.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(mask), label)
    assert mask.GetSpacing() == like.GetSpacing()

    refined = np.roll(label, 1)
    sitk.WriteImage(sitk.GetImageFromArray(refined), str(tmp_path / "out" / "refined" / "case.nii.gz"))
    with pytest.raises(UserError, match="one model"):
        FolderExchange(tmp_path / "out", ".nii.gz", {"fold_all": "b"})
    again = FolderExchange(tmp_path / "out", ".nii.gz", {"fold_all": "a"})
    assert np.array_equal(again.exchange("case", [source], label, {0, 1, 2, 3}), refined)
    assert not again.missing
    with pytest.raises(UserError, match="refined mask"):
        again.exchange("case", [source], label, {0, 1})
