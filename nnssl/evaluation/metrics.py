"""Overlap and surface metrics of one binary mask against another, in mm, as pure functions.

Surfaces are those of Nikolov et al. 2018 (arXiv:1809.04430) and the package ``surface-distance-based-measures``:
surface elements sit on the corners between voxels and are weighted by their area (contour length in 2D). Distances run
between the nearest elements of both surfaces. The element tables, the percentile and the surface Dice are the package's
own; the elements are found and matched here (same values, faster, without the NumPy names its release 0.1 still uses).

Empty masks: both empty is undefined and returned as None (the caller leaves the case out and counts it); one empty
gives overlap 0 and, as distance, the diagonal of the image, which no pair of masks in that image can exceed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import surface_distance
from scipy import ndimage
from scipy.spatial import cKDTree
from surface_distance import lookup_tables

#: Metrics of the mm protocol in the order they are printed.
MM_METRICS = ("dice", "jaccard", "hd95", "assd", "nsd")
#: Spacings in file headers are float32: a distance that exceeds the tolerance by less than this counts as within it.
TOLERANCE_SLACK_MM = 1e-6
#: Radius of the first search for the nearest surface, in steps of the finest axis.
NEAR_STEPS = 10
#: A far point in the k-d tree costs about as much as this many voxels of a distance map (measured: 500 to 1,500).
FAR_POINT_COST = 1000

Emptiness = Literal["both_empty", "one_empty", "none_empty"]
EMPTINESS: tuple[Emptiness, ...] = ("both_empty", "one_empty", "none_empty")


def emptiness(prediction: np.ndarray, reference: np.ndarray) -> Emptiness:
    """Say whether both masks, one of them, or none is empty."""
    filled = int(prediction.any()) + int(reference.any())
    return EMPTINESS[filled]


def dice(prediction: np.ndarray, reference: np.ndarray) -> float | None:
    """Return 2|A∩B| / (|A| + |B|); None if both masks are empty.

    Args:
        prediction: boolean mask of any shape.
        reference: boolean mask of the same shape.
    """
    prediction, reference = _as_masks(prediction, reference)
    total = np.count_nonzero(prediction) + np.count_nonzero(reference)
    return float(2 * np.count_nonzero(prediction & reference) / total) if total else None


def jaccard(prediction: np.ndarray, reference: np.ndarray) -> float | None:
    """Return |A∩B| / |A∪B|; None if both masks are empty."""
    prediction, reference = _as_masks(prediction, reference)
    union = np.count_nonzero(prediction | reference)
    return float(np.count_nonzero(prediction & reference) / union) if union else None


def hd95(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> float | None:
    """Return the robust Hausdorff distance: the larger of the two directed 95th percentiles over surface area.

    Args:
        prediction: boolean mask, 2D or 3D.
        reference: boolean mask of the same shape.
        spacing: voxel size in mm, one per array axis.

    Returns:
        Distance in mm; the image diagonal if one mask is empty; None if both are.
    """
    return mm_metrics(prediction, reference, spacing)["hd95"]


def assd(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> float | None:
    """Return the average symmetric surface distance in mm: the area-weighted mean over the elements of both surfaces.

    Arguments and empty masks as in :func:`hd95`.
    """
    return mm_metrics(prediction, reference, spacing)["assd"]


def nsd(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerance_mm: float = 1.0
) -> float | None:
    """Return the normalized surface Dice: the share of both surfaces that lies within ``tolerance_mm`` of the other.

    Arguments as in :func:`hd95`; 0 if one mask is empty, None if both are.
    """
    return mm_metrics(prediction, reference, spacing, tolerance_mm)["nsd"]


def mm_metrics(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerance_mm: float = 1.0
) -> dict[str, float | None]:
    """Compute all metrics of the mm protocol (:data:`MM_METRICS`) with one search for the surfaces.

    An axis of length 1 is dropped: a single slice is a 2D image with a contour, not a slab with two faces.

    Args:
        prediction: boolean mask, 2D or 3D.
        reference: boolean mask of the same shape.
        spacing: voxel size in mm, one per array axis.
        tolerance_mm: tolerance of the normalized surface Dice.

    Returns:
        Metric name to value; every value None if both masks are empty.
    """
    prediction, reference = _as_masks(prediction, reference)
    if len(spacing) != prediction.ndim:
        raise ValueError(f"spacing has {len(spacing)} entries for {prediction.ndim} axes")
    prediction, reference, spacing = _drop_single_axes(prediction, reference, tuple(float(s) for s in spacing))
    empty = emptiness(prediction, reference)
    if empty == "both_empty":
        return dict.fromkeys(MM_METRICS)
    if empty == "one_empty":
        diagonal = image_diagonal(prediction.shape, spacing)
        return {"dice": 0.0, "jaccard": 0.0, "hd95": diagonal, "assd": diagonal, "nsd": 0.0}
    box = bounding_box(prediction, reference)
    prediction, reference = prediction[box], reference[box]
    surfaces = surface_distances(prediction, reference, spacing)
    surface_dice = surface_distance.compute_surface_dice_at_tolerance(surfaces, tolerance_mm + TOLERANCE_SLACK_MM)
    return {
        "dice": dice(prediction, reference),
        "jaccard": jaccard(prediction, reference),
        "hd95": float(surface_distance.compute_robust_hausdorff(surfaces, 95)),
        "assd": _pooled_mean(surfaces),
        "nsd": float(surface_dice),
    }


def surface_distances(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> dict[str, np.ndarray]:
    """Return distances and areas of the surface elements of two masks, neither of them empty.

    Args:
        prediction: boolean mask, 2D or 3D.
        reference: boolean mask of the same shape.
        spacing: voxel size in mm.

    Returns:
        What ``surface_distance.compute_surface_distances`` returns: sorted distances in mm in both directions and the
        areas in mm² (2D: lengths in mm) in the same order.
    """
    spacing = tuple(spacing)
    surface_reference, areas_reference = _surface_elements(reference, spacing)
    surface_prediction, areas_prediction = _surface_elements(prediction, spacing)
    from_reference = directed_distances(surface_reference, surface_prediction, spacing)
    from_prediction = directed_distances(surface_prediction, surface_reference, spacing)
    order_reference = np.lexsort((areas_reference, from_reference))
    order_prediction = np.lexsort((areas_prediction, from_prediction))
    return {
        "distances_gt_to_pred": from_reference[order_reference],
        "distances_pred_to_gt": from_prediction[order_prediction],
        "surfel_areas_gt": areas_reference[order_reference],
        "surfel_areas_pred": areas_prediction[order_prediction],
    }


def directed_distances(points: np.ndarray, targets: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Return the distance of each point of a lattice mask to the nearest point of another one.

    Near points (the bulk, in a usable segmentation) are looked up in a k-d tree. Its search slows down where much of
    the other surface is equally far, so that many far points are read from a distance map instead, whose cost depends
    on the volume alone.

    Args:
        points: boolean mask of the points to start from, 2D or 3D.
        targets: boolean mask of the same shape, not empty.
        spacing: step of the lattice along each axis.

    Returns:
        One distance per point, in the unit of ``spacing`` and the order of ``np.argwhere(points)``.
    """
    scale = np.asarray(spacing, dtype=float)
    start = np.argwhere(points) * scale
    tree = cKDTree(np.argwhere(targets) * scale, balanced_tree=False, compact_nodes=False)
    distances = tree.query(start, distance_upper_bound=NEAR_STEPS * scale.min())[0]
    far = np.isinf(distances)
    if np.count_nonzero(far) * FAR_POINT_COST < points.size:
        distances[far] = tree.query(start[far])[0]
    else:
        distances[far] = ndimage.distance_transform_edt(~targets, sampling=scale)[points][far]
    return distances


def image_diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Return the length of the diagonal of an image in mm, from outer corner to outer corner."""
    return float(np.linalg.norm(np.multiply(shape, spacing)))


def bounding_box(*masks: np.ndarray) -> tuple[slice, ...]:
    """Return the smallest box that holds the foreground of all masks; at least one must have some."""
    box = []
    for axis in range(masks[0].ndim):
        others = tuple(a for a in range(masks[0].ndim) if a != axis)
        occupied = np.flatnonzero(np.any([mask.any(axis=others) for mask in masks], axis=0))
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
        masks = tuple(mask[(slice(None),) * axis + (box[-1],)] for mask in masks)  # the next axis looks at less
    return tuple(box)


def _as_masks(prediction: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if prediction.shape != reference.shape:
        raise ValueError(f"masks differ in shape: {prediction.shape} and {reference.shape}")
    return prediction.astype(bool, copy=False), reference.astype(bool, copy=False)


def _drop_single_axes(
    prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    while prediction.ndim > 2 and 1 in prediction.shape:
        axis = prediction.shape.index(1)
        prediction, reference = prediction.squeeze(axis), reference.squeeze(axis)
        spacing = spacing[:axis] + spacing[axis + 1 :]
    return prediction, reference, spacing


def _surface_elements(mask: np.ndarray, spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mask of corners on the surface of a mask and the area each of them stands for."""
    codes = _neighbour_codes(mask)
    on_surface = (codes != 0) & (codes != 2 ** (2**mask.ndim) - 1)
    return on_surface, _element_areas(spacing)[codes[on_surface]]


def _neighbour_codes(mask: np.ndarray) -> np.ndarray:
    """Encode, for each corner between voxels, which of its 2^d voxels are foreground (outside the array: none)."""
    kernel = np.asarray(
        lookup_tables.ENCODE_NEIGHBOURHOOD_2D_KERNEL if mask.ndim == 2 else lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL
    )
    padded = np.pad(mask, 1).view(np.uint8)
    corners = tuple(n + 1 for n in mask.shape)
    codes = np.zeros(corners, np.uint8)
    for offset in np.ndindex(*kernel.shape):
        window = tuple(slice(o, o + n) for o, n in zip(offset, corners, strict=True))
        codes += padded[window] * np.uint8(kernel[offset])
    return codes


@lru_cache(maxsize=64)
def _element_areas(spacing: tuple[float, ...]) -> np.ndarray:
    if len(spacing) == 2:
        return lookup_tables.create_table_neighbour_code_to_contour_length(spacing)
    return lookup_tables.create_table_neighbour_code_to_surface_area(spacing)


def _pooled_mean(surfaces: dict[str, np.ndarray]) -> float:
    areas = np.concatenate([surfaces["surfel_areas_gt"], surfaces["surfel_areas_pred"]])
    distances = np.concatenate([surfaces["distances_gt_to_pred"], surfaces["distances_pred_to_gt"]])
    return float(np.sum(areas * distances) / np.sum(areas))
