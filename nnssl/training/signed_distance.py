"""Signed distance maps of labels: how far a voxel is from a class's boundary, and on which side.

Luo et al., "Semi-supervised Medical Image Segmentation through Dual-task Consistency", AAAI 2021 (arXiv 2009.04448),
and Li et al., "Shape-aware Semi-supervised 3D Semantic Segmentation for Medical Images", MICCAI 2020 (arXiv
2007.10732), whose code scales the map of an image to [-1, 1] side by side.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from nnssl.training.label_space import LabelSpace

BoolArray = NDArray[np.bool_]


@torch.no_grad()
def distance_maps(space: LabelSpace, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the signed distance maps of a target (b, K, ...) float32, and bool (b, K, ...) where they are known.

    K counts the foreground classes, or the regions. A distance is known where no ignored voxel is nearer than the
    boundary. Computed on the CPU, by two exact Euclidean distance transforms for each channel that is present in an
    image, on all cores: SciPy and NumPy release the interpreter's lock while they compute.

    Args:
        space: what the target means.
        target: nnU-Net's, at full resolution.
    """
    masks = foreground(space, space.one_hot(target)).bool().cpu().numpy()
    ignored = ~space.valid(target).cpu().numpy()
    maps, known = np.empty(masks.shape, np.float32), np.empty(masks.shape, bool)

    def transform(pair: tuple[int, ...]) -> None:
        maps[pair], known[pair] = signed_distance(masks[pair], ignored[pair[0], 0])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(transform, np.ndindex(*masks.shape[:2])))  # a list: it raises what a thread raised
    return torch.from_numpy(maps).to(target.device), torch.from_numpy(known).to(target.device)


def foreground(space: LabelSpace, channels: Tensor) -> Tensor:
    """Return the channels (b, C, ...) that have a distance map: all but the background, or all regions."""
    return channels if space.regions else channels[:, 1:]


def signed_distance(mask: BoolArray, ignored: BoolArray | None = None) -> tuple[NDArray[np.float32], BoolArray]:
    """Return the signed distance map of one mask, scaled to [-1, 1], and where it is known.

    0 on the mask's outermost voxels, negative inside, positive outside; distances count voxels, whatever the spacing,
    and each side is divided by its largest. A class that is absent is 1 everywhere (the authors' code leaves 0, that
    is "boundary", there), one that fills the image is -1.

    Args:
        mask: one class of one image.
        ignored: voxels of unknown class; None for none. None of them is in the mask.
    """
    unknown = np.zeros_like(mask) if ignored is None else ignored
    outside = ~mask & ~unknown
    # to the nearest voxel of the other side; where a side is empty no voxel asks for the distance to the other
    inward = _distance_to(outside) if mask.any() else np.inf
    outward = _distance_to(mask) if outside.any() else np.inf
    distance = np.where(mask, inward, outward)
    known = ~unknown & (distance <= _distance_to(unknown))
    result = np.zeros(mask.shape, np.float32)
    for side, sign in ((outside & known, 1), (mask & known, -1)):
        largest = distance[side].max(initial=0)
        result[side] = sign * (distance[side] / largest if np.isfinite(largest) else 1)
    result[mask & (distance == 1)] = 0
    return result, known


def _distance_to(voxels: BoolArray) -> NDArray[np.float64]:
    """Return each voxel's distance to the nearest of some voxels; infinite where there are none."""
    if not voxels.any():
        return np.full(voxels.shape, np.inf)
    return ndimage.distance_transform_edt(~voxels)
