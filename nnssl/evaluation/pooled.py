"""mIoU of a whole set: pixels of all cases are counted together, then each class gets one IoU.

This is how semantic segmentation of natural images is reported. It is no mean over cases: a large case weighs more than
a small one, and a class that most cases lack is still measured once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

#: Name of what belongs to no class. A class can not have it: the labels of a dataset.json keep it for value 0.
BACKGROUND = "background"


class Counts(NamedTuple):
    """Pixels or voxels of one class: true positive, false positive, false negative."""

    tp: int
    fp: int
    fn: int


def count(prediction: np.ndarray, reference: np.ndarray) -> Counts:
    """Count the agreement of two boolean masks of one shape, from which ignored pixels have been removed."""
    tp = int(np.count_nonzero(prediction & reference))
    return Counts(tp, int(np.count_nonzero(prediction)) - tp, int(np.count_nonzero(reference)) - tp)


def pooled_iou(cases: Iterable[dict[str, Counts]], names: Sequence[str]) -> dict[str, Any]:
    """Return IoU_c = TP_c / (TP_c + FP_c + FN_c), with the counts summed over all cases, and its means over classes.

    A class that is in neither reference nor prediction of any case is undefined: None, and left out of the means.

    Args:
        cases: counts of each case, for every class in ``names`` and for the background.
        names: the classes without the background.

    Returns:
        ``mean`` over background and classes, ``mean_without_background``, and ``iou`` {class: IoU}; 0 to 1 or None.
    """
    total = dict.fromkeys([BACKGROUND, *names], Counts(0, 0, 0))
    for counts in cases:
        total = {name: Counts(*map(sum, zip(total[name], counts[name], strict=True))) for name in total}
    iou = {name: c.tp / sum(c) if sum(c) else None for name, c in total.items()}
    return {
        "mean": _mean(iou.values()),
        "mean_without_background": _mean(iou[name] for name in names),
        "iou": iou,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
