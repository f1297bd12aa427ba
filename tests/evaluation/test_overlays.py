"""Overlay pictures: one panel for the image and one a mask, contours where the masks are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from nnssl.evaluation.overlays import COLORS, largest_slice, save_overlay

IMAGE = np.random.default_rng(0).normal(100, 10, (40, 40))


def square(value: int, first: int, last: int) -> np.ndarray:
    mask = np.zeros((40, 40), np.uint8)
    mask[first:last, first:last] = value
    return mask


def pixels_of(path: Path, color: str) -> np.ndarray:
    """Return the columns of a picture that hold a color."""
    picture = imread(path)[..., :3]
    return np.flatnonzero((np.abs(picture - np.array(to_rgb(color))) < 0.02).all(-1).any(0)) / picture.shape[1]


def test_contours_show_in_the_panel_of_their_mask(tmp_path: Path) -> None:
    save_overlay(IMAGE, {"a": square(1, 10, 30), "b": square(2, 10, 30)}, tmp_path / "new" / "x.png")
    first, second = (pixels_of(tmp_path / "new" / "x.png", COLORS[i]) for i in (0, 1))
    assert ((first > 1 / 3) & (first < 2 / 3)).any(), "class 1 is drawn in the middle panel"
    assert (second > 2 / 3).any(), "class 2 is drawn in the last panel"
    assert not (first > 0.75).any()


def test_spacing_sets_the_proportions(tmp_path: Path) -> None:
    save_overlay(IMAGE, {"a": square(1, 5, 9)}, tmp_path / "even.png", (1.0, 1.0))
    save_overlay(IMAGE, {"a": square(1, 5, 9)}, tmp_path / "tall.png", (3.0, 1.0))
    even, tall = (imread(tmp_path / f"{n}.png").shape for n in ("even", "tall"))
    assert tall[0] > 2 * even[0]


def test_constant_image_and_empty_mask_are_drawn(tmp_path: Path) -> None:
    save_overlay(np.zeros((8, 8)), {"empty": np.zeros((8, 8), int)}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0


def test_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shape"):
        save_overlay(IMAGE, {"a": np.zeros((40, 41), int)}, tmp_path / "x.png")


def test_largest_slice() -> None:
    label = np.zeros((5, 8, 8), np.uint8)
    label[1, :3, :3], label[3, :4, :4] = 2, 1
    assert largest_slice(label) == 3
