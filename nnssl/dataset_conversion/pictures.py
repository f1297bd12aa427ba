"""Photographs and video frames (JPEG, PNG) and masks drawn on them, for converters of 2D data sets.

nnU-Net takes no JPEG, since a JPEG of a mask holds values that nobody drew; frames are decoded and written as PNG.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnssl.imageio import ImageReadError

if TYPE_CHECKING:
    from PIL.Image import Image


def load_picture(path: Path) -> Image:
    """Decode a picture as it is stored: indices of a palette stay indices.

    Raises:
        ImageReadError: if it is missing, truncated or no picture.
    """
    from PIL import Image

    if not Path(path).is_file():
        raise ImageReadError("file not found")
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError, ValueError) as error:  # a broken PNG is a SyntaxError
        raise ImageReadError(f"not readable as a picture: {error}".replace(f" {str(path)!r}", "")) from error


def load_pixels(path: Path) -> np.ndarray:
    """Return the pixels of a grey picture (y, x) or of an RGB picture (y, x, 3), 0 to 255.

    Raises:
        ImageReadError: as :func:`load_picture`, and for pictures of another kind.
    """
    picture = load_picture(path)
    if picture.mode not in ("L", "RGB"):
        raise ImageReadError(f"a picture of kind {picture.mode}; 8-bit grey and RGB are supported")
    return np.asarray(picture)


def is_grey(path: Path) -> bool:
    """Whether red, green and blue agree in every pixel."""
    pixels = load_pixels(path)
    return pixels.ndim == 2 or bool((pixels == pixels[..., :1]).all())


def read_grey(path: Path) -> Any:
    """Read a picture for which :func:`is_grey` holds as a SimpleITK image of one channel."""
    pixels = load_pixels(path)
    return as_image(pixels if pixels.ndim == 2 else pixels[..., 0])


def read_rgb(path: Path) -> Any:
    """Read a picture as a SimpleITK image of three components a pixel; a grey one gets three equal ones."""
    pixels = load_pixels(path)
    return as_image(pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=-1))


def as_image(pixels: np.ndarray) -> Any:
    """Return pixels (y, x) or (y, x, components) as a 2D SimpleITK image."""
    import SimpleITK as sitk

    return sitk.GetImageFromArray(np.ascontiguousarray(pixels), isVector=pixels.ndim == 3)
