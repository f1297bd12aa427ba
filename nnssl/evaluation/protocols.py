"""What is computed for one case and class: the mm protocol, and the voxel protocols of three families of papers.

The ``literature-*`` protocols exist to put a number beside a published table, not to judge a segmentation: they measure
in voxels, and each family answers an empty mask in its own way. The definitions are those of medpy 0.5.2 (``dc``,
``jc``, ``hd95``, ``asd``; connectivity 1, no spacing), written anew with scipy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import ndimage

from nnssl.errors import UserError, nearest
from nnssl.evaluation.metrics import MM_METRICS, bounding_box, dice, directed_distances, emptiness, jaccard, mm_metrics

#: Metrics of the literature protocols; asd is one-directional, prediction to reference.
LITERATURE_METRICS = ("dice", "jaccard", "hd95", "asd")

CaseMetrics = dict[str, "float | None"]


@dataclass(frozen=True)
class EmptyRule:
    """What a family's code reports, in the order of :data:`LITERATURE_METRICS`, when a mask is empty.

    Args:
        prediction: only the prediction is empty.
        reference: only the reference is empty; None where the family's code stops with an error.
        both: both masks are empty.
    """

    prediction: tuple[float | None, ...]
    reference: tuple[float | None, ...]
    both: tuple[float | None, ...]


_ZEROS_WHEN_NOTHING_PREDICTED = EmptyRule((0.0, 0.0, 0.0, 0.0), (0.0, 0.0, None, None), (0.0, 0.0, 0.0, 0.0))
_DIFFRECT_RULE = EmptyRule((0.0, 0.0, 50.0, 10.0), (0.0, 0.0, 50.0, 10.0), (0.0, 0.0, 50.0, 10.0))
_AD_RULE = EmptyRule((0.0, 0.0, 128.0, 128.0), (0.0, 0.0, 128.0, 128.0), (0.01, 0.01, 0.0, 0.0))


@dataclass(frozen=True)
class Protocol:
    """A named way to measure one case and class.

    Args:
        name: name on the command line.
        unit: unit of the distances.
        metrics: names of the metrics in the order they are printed.
        compute: function of (prediction, reference, spacing in mm, tolerance in mm).
        notes: what a reader of the numbers must know.
    """

    name: str
    unit: str
    metrics: tuple[str, ...]
    compute: Callable[[np.ndarray, np.ndarray, Sequence[float], float], CaseMetrics]
    notes: tuple[str, ...] = ()


def literature_metrics(prediction: np.ndarray, reference: np.ndarray, rule: EmptyRule) -> CaseMetrics:
    """Compute dc, jc, hd95 and asd as medpy defines them, in voxels, with a family's rule for empty masks.

    The surface is the mask without its erosion by the cross (4 or 6 neighbors), voxels on the array's border included;
    hd95 is the 95th percentile of the pooled distances of both directions; asd is the mean distance from the
    prediction's surface to the reference's and not the other way round.

    Args:
        prediction: boolean mask, 2D or 3D.
        reference: boolean mask of the same shape.
        rule: values for empty masks.
    """
    empty = emptiness(prediction, reference)
    if empty != "none_empty":
        values = rule.both if empty == "both_empty" else rule.reference if prediction.any() else rule.prediction
        return dict(zip(LITERATURE_METRICS, values, strict=True))
    box = bounding_box(prediction, reference)  # changes no surface: the voxels beyond the box are background
    prediction, reference = prediction[box], reference[box]
    border_prediction, border_reference = _border(prediction), _border(reference)
    steps = (1.0,) * prediction.ndim
    to_reference = directed_distances(border_prediction, border_reference, steps)
    to_prediction = directed_distances(border_reference, border_prediction, steps)
    return {
        "dice": dice(prediction, reference),
        "jaccard": jaccard(prediction, reference),
        "hd95": float(np.percentile(np.concatenate([to_reference, to_prediction]), 95)),
        "asd": float(to_reference.mean()),
    }


def get_protocol(name: str) -> Protocol:
    """Return a protocol by name.

    Raises:
        UserError: if there is none of that name.
    """
    if name not in PROTOCOLS:
        raise UserError("--protocol must name a protocol", repr(name), nearest(name, PROTOCOLS))
    return PROTOCOLS[name]


def _border(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask, ndimage.generate_binary_structure(mask.ndim, 1))


def _in_voxels(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerance_mm: float, rule: EmptyRule
) -> CaseMetrics:
    return literature_metrics(prediction, reference, rule)


def _literature(name: str, rule: EmptyRule, *notes: str) -> Protocol:
    return Protocol(name, "voxel", LITERATURE_METRICS, partial(_in_voxels, rule=rule), (*_VOXEL_NOTES, *notes))


_VOXEL_NOTES = (
    "hd95 and asd are in voxels whatever the table of the paper says: the spacing, also between slices, counts as 1",
    "hd95 pools both directions before the percentile; asd runs from prediction to reference only",
)

#: The protocols by name.
PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol("mm", "mm", MM_METRICS, mm_metrics),
        _literature(
            "literature-la",
            _ZEROS_WHEN_NOTHING_PREDICTED,
            "UA-MT, DTC, MC-Net, SS-Net, BCP: an empty prediction scores 0 in all four metrics, so that a "
            "failure counts as a perfect distance",
            "the papers measure on scans cropped around the reference, at test time too",
            "their code stops at an empty reference: here the overlap is 0 and the distance is left out",
        ),
        _literature(
            "literature-acdc",
            _ZEROS_WHEN_NOTHING_PREDICTED,
            "MC-Net, SS-Net (2D) and SSL4MIS' validation: an empty prediction scores 0 in all four metrics, also where "
            "the reference is empty: a failure counts as a perfect distance, a rightly empty class as Dice 0",
            "the gap between slices (5 to 10 mm) counts as one voxel of about 1.4 mm",
            "other code differs: DiffRect's has a protocol of its own, SSL4MIS' test stops with an error",
            "their code stops at an empty reference: here the overlap is 0 and the distance is left out",
        ),
        _literature(
            "literature-diffrect",
            _DIFFRECT_RULE,
            "DiffRect's test: any empty mask scores 0, 0, 50, 10, so that a rightly empty class counts as Dice 0",
            "the gap between slices (5 to 10 mm) counts as one voxel of about 1.4 mm",
        ),
        _literature(
            "literature-ad",
            _AD_RULE,
            "GenericSSL (A&D), DHC: one empty mask scores 0, 0, 128, 128",
            "both masks empty score 1 on a scale of 0 to 100, an error of that code: here 0.01, with distance 0",
            "the papers measure on the resized grid of their preprocessing",
        ),
    )
}
