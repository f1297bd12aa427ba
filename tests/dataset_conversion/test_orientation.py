"""A label that is mirrored or turned is found by the outline of what it shows, and one that can't be judged passes."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl.dataset_conversion.orientation import better_turned
from nnssl.dataset_conversion.pancreas import read_label
from nnssl.imageio import ImageReadError

SIZE = 40
WINDOW = (-150, 350)
TURNS = [turn for turn in product((False, True), repeat=4) if any(turn)]


def abdomen(seed: int = 0, organ: float = 90, noise: float = 30) -> tuple[np.ndarray, np.ndarray]:
    """Fat with a small bright organ on one side and a large one as bright on the other: (scan, label), (z, y, x)."""
    z, y, x = np.ogrid[:SIZE, :SIZE, :SIZE]
    # 1200 voxels, off every plane of symmetry
    label = ((z - 10) / 6) ** 2 + ((y - 16) / 6) ** 2 + ((x - 30) / 8) ** 2 < 1
    scan = np.where(label | (x < 19), organ, -90.0)
    scan += np.random.default_rng(seed).normal(0, noise, scan.shape)
    return scan.astype(np.int16), label.astype(np.uint8)


def turned(array: np.ndarray, turn: tuple[bool, ...]) -> np.ndarray:
    """Swap the last two axes if the first number says so, then mirror the axes that the others name."""
    array = array.swapaxes(1, 2) if turn[0] else array
    return np.ascontiguousarray(np.flip(array, [axis for axis in range(3) if turn[axis + 1]]))


@pytest.mark.parametrize("turn", TURNS)
def test_every_turned_label_is_found(turn):
    scan, label = abdomen()
    assert better_turned(scan, label, *WINDOW, 30) is None
    assert better_turned(scan, turned(label, turn), *WINDOW, 30) is not None


@pytest.mark.parametrize("turn", TURNS)
def test_scan_and_label_turned_alike_fit(turn):
    scan, label = (turned(array, turn) for array in abdomen())
    assert better_turned(scan, label, *WINDOW, 30) is None


def test_the_change_that_mends_it_is_named():
    scan, label = abdomen(noise=0)
    found = better_turned(scan, label[:, :, ::-1], *WINDOW, 30)
    assert found.startswith("mirrored left-right it would be 180 brighter than what surrounds it, as it lies ")
    assert better_turned(scan, label.swapaxes(1, 2), *WINDOW, 30).startswith("with x and y swapped it would be 180 ")


def test_what_the_scan_can_not_tell_passes():
    scan, label = abdomen(organ=-90)  # nothing stands out
    assert better_turned(scan, label[:, :, ::-1], *WINDOW, 30) is None
    scan, label = abdomen()
    scan = np.maximum(scan, scan[:, :, ::-1])  # a symmetric body
    assert better_turned(scan, label[:, :, ::-1], *WINDOW, 30) is None
    few = np.zeros_like(label)
    few[10, 16, 28:33] = 1
    scan, _ = abdomen()
    assert better_turned(scan, few[:, :, ::-1], *WINDOW, 30) is None
    assert better_turned(scan, np.ones_like(label), *WINDOW, 30) is None  # nothing surrounds it


def test_a_label_with_a_contrast_of_its_own_is_not_doubted():
    """A kidney may stand out more, but not three times as much."""
    scan, label = abdomen(noise=0)
    scan[:] = 0
    scan[label[:, :, ::-1] > 0] = 90
    for own, doubted in ((40, False), (20, True)):
        scan[label > 0] = own
        assert (better_turned(scan, label, *WINDOW, 30) is not None) == doubted
    scan = scan // 4  # both stand out little
    assert better_turned(scan, label, *WINDOW, 30) is None


def test_a_right_label_of_weak_contrast_is_not_refused_by_chance():
    for seed in range(20):
        scan, label = abdomen(seed, organ=-78, noise=0)  # 12 brighter than fat
        texture = np.random.default_rng(seed).normal(0, 60, [SIZE // 4] * 3)
        scan = scan + np.kron(texture, np.ones((4, 4, 4)))
        scan[label > 0] = scan[_around(label)].mean() + 12
        assert better_turned(scan, label, *WINDOW, 30) is None


def _around(label: np.ndarray) -> np.ndarray:
    from scipy.ndimage import binary_dilation

    return binary_dilation(label > 0, iterations=3) & (label == 0)


def test_the_pancreas_on_the_livers_side_is_refused(tmp_path: Path):
    scan, label = abdomen()
    image, right, wrong = (tmp_path / f"{name}.nii.gz" for name in ("image", "right", "wrong"))
    for path, array in ((image, scan), (right, label), (wrong, label[:, :, ::-1])):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_label(right, image)), label)
    with pytest.raises(ImageReadError, match=r"mirrored left-right it would be \d+ brighter .* another order"):
        read_label(wrong, image)
