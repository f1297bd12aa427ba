"""The literature's crop around the reference label, for comparison with published numbers only.

A model that is trained and tested on such crops has been told where the object is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.imageio import ImageReadError

#: What ``provenance`` of a data set with label-cut crops begins with.
MARK = "label-cut crop"


@dataclass(frozen=True)
class LabelCrop:
    """Cut a scan to the box of its label and a margin.

    Args:
        margin: added on each side along x, y, z; None: that axis stays whole.
        unit: ``mm`` or ``voxels``, of both numbers.
        minimum: size along each axis that the box reaches at least, where the scan is large enough.
        origin: whose crop it is, and how it deviates.
    """

    margin: tuple[float | None, float | None, float | None]
    unit: str
    minimum: float
    origin: str

    def described(self) -> str:
        """Return the crop as one line for ``provenance``."""
        axes = ", ".join(
            f"{axis} whole" if m is None else f"{axis} {m:g}" for axis, m in zip("xyz", self.margin, strict=True)
        )
        least = f", at least {self.minimum:g}" if self.minimum else ""
        margin = f"margin {axes} ({self.unit}{least})"
        return f"{MARK} by --literature_crop: box of the reference label, {margin}; {self.origin}"

    def box(self, label: np.ndarray, spacing: tuple[float, ...]) -> tuple[list[int], list[int]]:
        """Return first voxel and size of the crop along x, y, z.

        Args:
            label: (z, y, x).
            spacing: mm along x, y, z.

        Raises:
            ImageReadError: if the label is empty.
        """
        starts: list[int] = []
        sizes: list[int] = []
        foreground = label > 0
        for axis, (margin, step) in enumerate(zip(self.margin, spacing, strict=True)):
            whole = label.shape[2 - axis]
            others = tuple(i for i in range(3) if i != 2 - axis)
            hit = np.flatnonzero(foreground.any(axis=others))
            if not hit.size:
                raise ImageReadError("an empty label has no box to crop to")
            if margin is None:
                starts, sizes = [*starts, 0], [*sizes, whole]
                continue
            scale = step if self.unit == "mm" else 1.0
            first, last = int(hit[0]), int(hit[-1])
            more = max(0, round(self.minimum / scale) - (last - first + 1))
            low = max(0, first - round(margin / scale) - more // 2)
            high = min(whole, last + 1 + round(margin / scale) + (more + 1) // 2)
            starts, sizes = [*starts, low], [*sizes, high - low]
        return starts, sizes

    def wrap(self, load: Callable[[], Any], load_label: Callable[[], Any]) -> Callable[[Path], Any]:
        """Return a reader that crops what ``load`` returns to the box of what ``load_label`` returns."""
        return partial(_read_cropped, crop=self, load=load, load_label=load_label)


def _read_cropped(path: Path, crop: LabelCrop, load: Callable[[], Any], load_label: Callable[[], Any]) -> Any:
    """Read and cut; ``path`` names the file for messages only."""
    import SimpleITK as sitk

    label, loaded = load_label(), load()
    start, size = crop.box(sitk.GetArrayViewFromImage(label), label.GetSpacing())
    cut = []
    for image in loaded if isinstance(loaded, list) else [loaded]:
        if image.GetSize() != label.GetSize():
            raise ImageReadError(f"size {image.GetSize()} and {label.GetSize()} (image, label)")
        cut.append(sitk.RegionOfInterest(image, size, start))
    return cut if isinstance(loaded, list) else cut[0]
