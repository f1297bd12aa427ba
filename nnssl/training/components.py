"""Connected components of hard pseudo-labels."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor


@torch.no_grad()
def largest_components(hard: Tensor) -> Tensor:
    """Return a hard label in which each class of each item keeps its largest connected component alone.

    The filter of BCP (Bai et al. 2023, arXiv 2305.00673). Voxels that touch at a corner are connected; of components of
    one size the first stays; what is taken away becomes background. Runs on the CPU.

    Args:
        hard: label map (b, 1, ...) of integers from 0, the background, or bool regions (b, R, ...), each filtered by
            itself.
    """
    maps = hard.cpu().numpy().copy()
    touching = ndimage.generate_binary_structure(maps.ndim - 2, maps.ndim - 2)
    for item in maps:
        for channel in item:
            boxes = ndimage.find_objects(channel.astype(np.uint8) if channel.dtype == bool else channel)
            for value, box in enumerate(boxes, 1):
                if box is None:
                    continue
                part = channel[box]  # a view of the class's bounding box: most classes are small
                components, count = ndimage.label(part == value, touching)
                if count > 1:
                    sizes = np.bincount(components.ravel())
                    part[(components > 0) & (components != 1 + sizes[1:].argmax())] = 0
    return torch.from_numpy(maps).to(hard.device)
