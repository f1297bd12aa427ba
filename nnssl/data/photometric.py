"""DiffRect's published views: flips and one rotation for both, slight photometric changes for the strong one.

Liu et al., MICCAI 2024 (arXiv 2407.09918), section 3.1, with the ranges of the authors' code. The strong view is a weak
one: enhancements of at most 10 % and a blur below one voxel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from torch import Tensor

from nnssl.data.views import Part, part_of

CENTER = 5.0  # of the smoothing kernel whose other elements are 1


class Enhance(ImageOnlyTransform):
    """Raise contrast, sharpness and brightness, in random order, each with a probability.

    Images of nnU-Net are z-scored, so each channel is mapped to [0, 1] by its own smallest and largest value, changed
    and clipped there, and mapped back.

    Args:
        factor: range of the enhancement factor, 1 = unchanged.
        probability: of each of the three.
    """

    def __init__(self, factor: tuple[float, float] = (1.0, 1.1), probability: float = 0.5) -> None:
        super().__init__()
        self.factor, self.probability = factor, probability

    def get_parameters(self, **data_dict: object) -> dict:
        low, high = self.factor
        order = torch.randperm(len(ENHANCEMENTS)).tolist()
        chosen = [i for i in order if torch.rand(1).item() < self.probability]
        return {"steps": [(i, low + (high - low) * torch.rand(1).item()) for i in chosen]}

    def _apply_to_image(self, img: Tensor, steps: list[tuple[int, float]]) -> Tensor:
        if not steps:
            return img
        axes = list(range(1, img.ndim))
        low, high = img.amin(axes, keepdim=True), img.amax(axes, keepdim=True)
        extent = (high - low).clamp_min(torch.finfo(img.dtype).tiny)
        scaled = (img - low) / extent
        for index, factor in steps:
            scaled = ENHANCEMENTS[index](scaled, factor).clamp(0, 1)
        return scaled * extent + low


def contrast(x: Tensor, factor: float) -> Tensor:
    """Return ``m + f (x - m)``, m the mean of each channel, for x (c, ...) in [0, 1]."""
    mean = x.mean(list(range(1, x.ndim)), keepdim=True)
    return mean + factor * (x - mean)


def brightness(x: Tensor, factor: float) -> Tensor:
    """Return ``f x``."""
    return factor * x


def sharpness(x: Tensor, factor: float) -> Tensor:
    """Return ``s + f (x - s)``, s smoothed by a 3-voxel kernel of ones with 5 in its center; the border stays."""
    ndim = x.ndim - 1
    kernel = torch.ones([3] * ndim, dtype=x.dtype)
    kernel[(1,) * ndim] = CENTER
    conv = {2: F.conv2d, 3: F.conv3d}[ndim]
    smooth = x.clone()
    inner = (slice(None), *[slice(1, -1)] * ndim)
    smooth[inner] = conv(x[:, None], (kernel / kernel.sum())[None, None])[:, 0]
    return smooth + factor * (x - smooth)


ENHANCEMENTS: tuple[Callable[[Tensor, float], Tensor], ...] = (contrast, sharpness, brightness)


def published_views(stock: ComposeTransforms) -> ComposeTransforms:
    """Return nnU-Net's training pipeline with the paper's geometry and intensity transforms in place of its own.

    Flips of every axis with probability 1/2, then, with probability 1/2, a rotation by any angle (in 3D about the first
    axis, the slice axis). nnU-Net's linear interpolation replaces the nearest neighbors of the authors' code.

    Args:
        stock: what ``nnUNetTrainer.get_training_transforms`` returns.
    """
    geometry = [step for step in stock.transforms if part_of(step) is Part.GEOMETRY]
    others = [step for step in stock.transforms if part_of(step) not in (Part.GEOMETRY, Part.INTENSITY)]
    flat = any(isinstance(step, Convert3DTo2DTransform) for step in geometry)
    moved = [_rotation(step) if isinstance(step, SpatialTransform) else step for step in geometry]
    spatial = next(step for step in geometry if isinstance(step, SpatialTransform))
    flips = MirrorTransform(allowed_axes=tuple(range(len(spatial.patch_size) + flat)))
    blur = GaussianBlurTransform((1e-3, 1.0), synchronize_channels=True, synchronize_axes=True)
    intensity: list[BasicTransform] = [Enhance(), RandomTransform(blur, apply_probability=0.5)]
    kept = [step for step in moved if not isinstance(step, MirrorTransform)]
    return ComposeTransforms([*kept, flips, *intensity, *others])


def _rotation(stock: SpatialTransform) -> SpatialTransform:
    """Return a crop of the same size with the paper's rotation: half of the time, by any angle."""
    angle = (0.0, 2 * math.pi)
    return SpatialTransform(
        stock.patch_size,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_rotation=0.5,
        rotation=angle if len(stock.patch_size) == 2 else _AboutFirstAxis(angle),
        border_mode_seg=stock.border_mode_seg,
        padding_value_seg=stock.padding_value_seg,
    )


class _AboutFirstAxis:
    """Angles of a 3D rotation about the first axis alone, in the form nnU-Net's transform asks for."""

    def __init__(self, angle: tuple[float, float]) -> None:
        self.angle = angle

    def __call__(self, *args: object, dim: int = 0, **kwargs: object) -> float:
        low, high = self.angle
        return low + (high - low) * torch.rand(1).item() if dim == 0 else 0.0
