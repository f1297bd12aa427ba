"""Sliding windows as the semi-supervised literature lays them: strides in voxels, plain averages of probabilities.

nnU-Net has one step for all axes, in shares of the patch, and averages logits under a Gaussian in half precision. A
stride of a few voxels adds hundreds of tiles a voxel, more than half precision can count; here sums are single.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor
from tqdm import tqdm

from nnssl.errors import UserError

#: Probabilities are kept this far from 0 and 1 before they are turned back into logits.
SMALLEST = 1e-7


def tile_starts(size: int, patch: int, stride: int) -> list[int]:
    """Return the first voxels of the tiles along one axis: every ``stride`` voxels, the last one at the far end.

    As in the test code of UA-MT, MC-Net and SSL4MIS: ceil((size - patch) / stride) + 1 tiles, min(i stride, size -
    patch) each.

    Args:
        size: voxels of the image, at least ``patch``.
        patch: voxels of a tile.
        stride: voxels between two tiles.
    """
    count = -(-(size - patch) // stride) + 1
    return [min(i * stride, size - patch) for i in range(count)]


class StridePredictor(nnUNetPredictor):
    """nnU-Net's predictor with strides in voxels and uniform weights; it returns logits of averaged probabilities.

    Args:
        stride: voxels between tiles, one number an axis of the patch, in the plan's axis order.
        others: as for nnU-Net's predictor; its step size and its Gaussian are not used.
    """

    def __init__(self, stride: Sequence[int], **others: Any) -> None:
        super().__init__(**others)
        self.stride = tuple(int(v) for v in stride)

    def _internal_get_sliding_window_slicers(self, image_size: tuple[int, ...]) -> list[tuple]:
        patch = self.configuration_manager.patch_size
        if len(self.stride) != len(patch):
            got = f"{len(self.stride)} numbers for a patch of {'x'.join(map(str, patch))}"
            raise UserError("--stride has one number an axis of the patch", got, f"{len(patch)} numbers")
        if any(step > side for step, side in zip(self.stride, patch, strict=True)):
            got = f"{list(self.stride)} for a patch of {'x'.join(map(str, patch))}"
            raise UserError("--stride must not exceed the patch, or voxels are never seen", got, None, "choose less")
        sizes = image_size[len(image_size) - len(patch) :]
        axes = [tile_starts(*numbers) for numbers in zip(sizes, patch, self.stride, strict=True)]
        slices = range(image_size[0]) if len(patch) < len(image_size) else (None,)
        found = []
        for z, *corner in product(slices, *axes):
            tile = [slice(start, start + side) for start, side in zip(corner, patch, strict=True)]
            found.append((slice(None), *(() if z is None else (z,)), *tile))
        return found

    def _internal_predict_sliding_window_return_logits(
        self, data: Tensor, slicers: Sequence[tuple], do_on_device: bool = True
    ) -> Tensor:
        home = self.device if do_on_device else torch.device("cpu")
        data = data.to(home)
        total = torch.zeros((self.label_manager.num_segmentation_heads, *data.shape[1:]), device=home)
        count = torch.zeros(data.shape[1:], device=home)
        for place in tqdm(slicers, disable=not self.allow_tqdm):
            tile = data[place][None].to(self.device)
            logits = self._internal_maybe_mirror_and_predict(tile)[0].float()
            total[place] += self.label_manager.apply_inference_nonlin(logits).to(home)
            count[place[1:]] += 1
        mean = (total / count).clamp(SMALLEST, 1 - SMALLEST)
        return torch.logit(mean) if self.label_manager.has_regions else mean.log()
