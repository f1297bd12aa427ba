"""What of a prediction is sure enough to be learned from: thresholds per class, components, boxes, stability.

Pure functions of NumPy arrays on the grid of an image, (z, y, x). Loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nnssl.errors import UserError

#: No class needs a confidence above this one, however sure the model is of most of its voxels.
LARGEST_THRESHOLD = 0.9
#: Confidences are kept as 16-bit steps of [0, 1] between the two passes over the cases.
STEPS = 65535
#: Boxes grow by this share of their length on every side: their drawers are not exact.
BOX_MARGIN = 0.05
#: A box of which less than this share is predicted as its class is searched again.
SMALLEST_SHARE_OF_BOX = 0.1


@dataclass(frozen=True)
class FilterOptions:
    """What is kept of a prediction.

    Args:
        threshold: confidence below which a voxel is unsure, for every class; None: per class, by quantile.
        quantile: quantile of a class's confidences that becomes its threshold, at most 0.9 (:data:`LARGEST_THRESHOLD`).
        keep_all: no voxel is unsure: the plain prediction, with small components turned into background.
        min_component: components of less than this share of the image's voxels are unsure.
        largest_component: of each class all components but the largest are unsure.
        keep: share of the cases that is kept, the most stable ones.
        weight_by: what becomes a case's weight: none (1), confidence or stability.
    """

    threshold: float | None = None
    quantile: float = 0.5
    keep_all: bool = False
    min_component: float = 1e-4
    largest_component: bool = False
    keep: float = 1.0
    weight_by: str = "none"

    def __post_init__(self) -> None:
        limits = (
            ("--threshold", self.threshold, 0, 1),
            ("--threshold_quantile", self.quantile, 0, 1),
            ("--min_component", self.min_component, 0, 1),
        )
        for flag, value, low, high in limits:
            if value is not None and not low <= value <= high:
                raise UserError(f"{flag} must be a fraction", value, f"{low} to {high}")
        if not 0 < self.keep <= 1:
            raise UserError("--keep must be a share of the cases", self.keep, "above 0, up to 1")
        if self.keep_all and self.threshold is not None:
            raise UserError("--keep_all leaves no voxel out", "--threshold beside it", "one of the two")


@dataclass(frozen=True)
class Box:
    """A box around an object.

    Args:
        label: the object's label.
        low: first voxel, by axis (z, y, x).
        high: voxel behind the last one, by axis.
    """

    label: int
    low: tuple[int, ...]
    high: tuple[int, ...]


def confidence(probs: np.ndarray, regions: bool) -> np.ndarray:
    """Return the probability of the hard prediction (z, y, x): the class's, or that of the least certain region.

    Args:
        probs: probabilities (C, z, y, x).
        regions: whether the channels are independent regions.
    """
    return np.maximum(probs, 1 - probs).min(0) if regions else probs.max(0)


def quantized(values: np.ndarray) -> np.ndarray:
    """Return confidences in [0, 1] as 16-bit steps."""
    return np.rint(np.clip(values, 0, 1) * STEPS).astype(np.uint16)


class Confidences:
    """Counts of the confidences of every predicted label over all cases, in 16-bit steps."""

    def __init__(self) -> None:
        self._counts: dict[int, np.ndarray] = {}

    def add(self, label: np.ndarray, steps: np.ndarray) -> None:
        """Count a case: its label map and its quantized confidences (z, y, x)."""
        for value in np.unique(label):
            counts = np.bincount(steps[label == value], minlength=STEPS + 1)
            self._counts[int(value)] = self._counts.get(int(value), 0) + counts

    def thresholds(self, options: FilterOptions) -> dict[int, float]:
        """Return the smallest confidence of a sure voxel by predicted label."""
        if options.keep_all:
            return dict.fromkeys(sorted(self._counts), 0.0)
        if options.threshold is not None:
            return dict.fromkeys(sorted(self._counts), options.threshold)
        return {c: min(LARGEST_THRESHOLD, self._quantile(c, options.quantile)) for c in sorted(self._counts)}

    def _quantile(self, label: int, q: float) -> float:
        """Return the smallest confidence that at least the share ``q`` of the label's voxels does not exceed."""
        running = np.cumsum(self._counts[label])
        return int(np.searchsorted(running, max(1, math.ceil(q * running[-1])))) / STEPS


def below(label: np.ndarray, steps: np.ndarray, thresholds: dict[int, float]) -> np.ndarray:
    """Return bool (z, y, x), True where the quantized confidence is below the threshold of the predicted label."""
    unsure = np.zeros(label.shape, bool)
    for value, threshold in thresholds.items():
        unsure |= (label == value) & (steps < round(threshold * STEPS))
    return unsure


def doubtful_components(label: np.ndarray, options: FilterOptions) -> np.ndarray:
    """Return bool (z, y, x), True in foreground components that are too small or not the largest of their label.

    Components are connected through faces.
    """
    from scipy import ndimage

    doubtful = np.zeros(label.shape, bool)
    smallest = options.min_component * label.size
    for value in np.unique(label[label > 0]):
        components, count = ndimage.label(label == value)
        sizes = np.bincount(components.ravel(), minlength=count + 1)
        sizes[0] = 0
        drop = (sizes > 0) & (sizes < smallest)
        if options.largest_component:
            drop |= (sizes > 0) & (np.arange(count + 1) != sizes.argmax())
        doubtful |= drop[components]
    return doubtful


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean Dice of two label maps over the foreground labels that either holds; 1 if neither holds any."""
    values = np.union1d(np.unique(a), np.unique(b))
    dice = [2 * ((a == v) & (b == v)).sum() / ((a == v).sum() + (b == v).sum()) for v in values if v > 0]
    return float(np.mean(dice)) if dice else 1.0


def apply_boxes(probs: np.ndarray, boxes: Sequence[Box]) -> tuple[np.ndarray, np.ndarray]:
    """Let each label appear in its own boxes only, and look again in boxes that stay nearly empty.

    A label's probability counts inside the union of its boxes, each grown by 5 %, and is 0 elsewhere. Where less than a
    tenth of a box shows its label, the voxels above half of the label's highest probability in the box take it.

    Args:
        probs: probabilities (C, z, y, x) of exclusive classes, channel = label.
        boxes: all boxes of the image; a label without one is absent.

    Returns:
        Label map and confidence (z, y, x). Boxes in which the label has no probability at all have confidence 0.
    """
    kept = np.zeros_like(probs, dtype=np.float32)
    kept[0] = probs[0]
    for box in boxes:
        inside = _grown(box, probs.shape[1:])
        kept[box.label][inside] = probs[box.label][inside]
    kept /= np.maximum(kept.sum(0), np.finfo(np.float32).tiny)
    label, sure = kept.argmax(0).astype(np.uint16), kept.max(0)
    for box in boxes:
        inside = tuple(slice(low, high) for low, high in zip(box.low, box.high, strict=True))
        if (label[inside] == box.label).mean() >= SMALLEST_SHARE_OF_BOX:
            continue
        mine = probs[box.label][inside]
        if mine.max() == 0:
            sure[inside] = 0
            continue
        found = mine > 0.5 * mine.max()
        label[inside] = np.where(found, box.label, label[inside])
        sure[inside] = np.where(found, mine, sure[inside])
    return label, sure


def _grown(box: Box, shape: Iterable[int]) -> tuple[slice, ...]:
    slices = []
    for low, high, size in zip(box.low, box.high, shape, strict=True):
        margin = math.ceil(BOX_MARGIN * (high - low))
        slices.append(slice(max(0, low - margin), min(size, high + margin)))
    return tuple(slices)


def most_stable(stability: dict[str, float], keep: float) -> list[str]:
    """Return the most stable share of the cases, sorted by name; at least one. Ties go by name."""
    count = max(1, round(keep * len(stability)))
    return sorted(sorted(stability, key=lambda case: (-stability[case], case))[:count])
