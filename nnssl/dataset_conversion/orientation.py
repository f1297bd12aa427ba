"""Whether a label lies on its scan the right way round, as far as the grey levels can tell."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

#: Voxels of the margin around the structure that it is compared with.
RING = 3
#: Labels of fewer voxels are not judged: two means of so few say nothing.
ENOUGH = 1000
#: The best of many other places must lie this many standard deviations above them: some place is always the best.
STANDS_OUT = 4
#: Names of the axes of an axial array (z, y, x).
_AXES = ("head-foot", "front-back", "left-right")


def better_turned(image: np.ndarray, label: np.ndarray, low: float, high: float, margin: float) -> str | None:
    """Say how a label would have to be mirrored or turned to fit its scan clearly better than as it lies.

    A structure that is brighter than what surrounds it is so where it was drawn. Somewhere else, also within another
    bright organ, its outline follows nothing, and both sides of it are alike on average. So the contrast
    mean(inside) - mean(ring around it) of the place where it belongs stands out.

    Args:
        image: (z, y, x), grey levels.
        label: (z, y, x), foreground above 0.
        low, high: grey levels are clipped to this window: no bone, air or contrast agent decides.
        margin: contrast by which another place must be better, and three times as high.

    Returns:
        the change and both contrasts; None if the label fits as it lies, or the scan can't tell.
    """
    inside = np.argwhere(label > 0)
    if len(inside) < ENOUGH:
        return None
    around = _ring(label > 0, inside)
    if not len(around):
        return None
    found = {name: _contrast(image, turned, low, high) for name, turned in _turns(image.shape, inside, around)}
    own = found.pop("")
    best = max(found, key=found.__getitem__)
    others = [value for name, value in found.items() if name != best]
    by_chance = np.mean(others) + STANDS_OUT * np.std(others)
    if found[best] - own < margin or own > found[best] / 3 or found[best] < by_chance:
        return None
    return f"{best} it would be {found[best]:.0f} brighter than what surrounds it, as it lies {own:.0f}"


def _ring(mask: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return the indices of the voxels within RING steps of the structure."""
    from scipy.ndimage import binary_dilation

    begin = np.maximum(inside.min(0) - RING, 0)
    box = mask[tuple(slice(a, b + 1) for a, b in zip(begin, inside.max(0) + RING, strict=True))]
    return np.argwhere(binary_dilation(box, iterations=RING) & ~box) + begin


def _contrast(image: np.ndarray, parts: tuple[np.ndarray, np.ndarray], low: float, high: float) -> float:
    inside, around = (np.clip(image[tuple(part.T)], low, high).mean(dtype=np.float64) for part in parts)
    return float(inside - around)


def _turns(
    shape: tuple[int, ...], inside: np.ndarray, around: np.ndarray
) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """Yield the name and the indices of every way to store the same slices; the first, unnamed, is as they are."""
    last = np.array(shape) - 1
    for swap in (False, True) if shape[1] == shape[2] else (False,):
        for flips in product((False, True), repeat=3):
            names = [axis for axis, flip in zip(_AXES, flips, strict=True) if flip]
            words = ["with x and y swapped"] if swap else []
            words += [f"mirrored {' and '.join(names)}"] if names else []
            parts = [part[:, [0, 2, 1]] if swap else part for part in (inside, around)]
            turned = [np.where(flips, last - part, part) for part in parts]
            yield " and ".join(words), (turned[0], turned[1])
