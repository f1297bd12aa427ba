"""Reading photographs and masks: kinds of picture, truncated files, grey and RGB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from nnssl.dataset_conversion.pictures import is_grey, load_picture, load_pixels, read_grey, read_rgb
from nnssl.imageio import ImageReadError


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (6, 9, 3)).astype(np.uint8)


def save(path: Path, array: np.ndarray) -> Path:
    Image.fromarray(array).save(path)
    return path


def test_rgb_keeps_its_channels_and_axes(tmp_path, pixels):
    image = read_rgb(save(tmp_path / "a.png", pixels))
    assert (image.GetSize(), image.GetNumberOfComponentsPerPixel()) == ((9, 6), 3)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), pixels)


def test_grey_is_one_channel_however_it_is_stored(tmp_path, pixels):
    grey = pixels[..., 0]
    for name, stored in (("l.png", grey), ("rgb.png", np.repeat(grey[..., None], 3, axis=-1))):
        path = save(tmp_path / name, stored)
        assert is_grey(path)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read_grey(path)), grey)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read_rgb(path)), np.repeat(grey[..., None], 3, axis=-1))
    assert not is_grey(save(tmp_path / "color.png", pixels))


def test_palette_indices_stay_indices(tmp_path):
    picture = Image.fromarray(np.array([[0, 2], [1, 2]], np.uint8)).convert("P")
    picture.putdata([0, 2, 1, 2])
    picture.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    picture.save(tmp_path / "p.png")
    assert np.asarray(load_picture(tmp_path / "p.png")).tolist() == [[0, 2], [1, 2]]
    with pytest.raises(ImageReadError, match="kind P"):
        load_pixels(tmp_path / "p.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_truncated_and_missing_files_are_refused(tmp_path, pixels, name):
    path = save(tmp_path / name, np.tile(pixels, (40, 40, 1)))
    with pytest.raises(ImageReadError, match="not found"):
        load_picture(tmp_path / "absent.png")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageReadError, match="not readable"):
        load_picture(path)
    path.write_text("no picture")
    with pytest.raises(ImageReadError, match="not readable"):
        load_picture(path)
