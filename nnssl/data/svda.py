"""SVDA, the sampling-based volumetric data augmentation of A&D: three of six operations for each crop.

Wang and Li, NeurIPS 2023 (arXiv 2310.11320), with the ranges of the authors' code. Labeled and unlabeled crops get the
same treatment. Spatial operations may follow intensity operations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

from nnssl.data.views import Part, ViewTransforms, part_of, reproducible

#: Rotation about the first axis (3D) or in the plane (2D), radians.
ANGLE = math.radians(15)
#: Factor of the field of view: below 1 the crop is enlarged. Half of the time it stays as it is.
ZOOM, ZOOM_PROBABILITY = (0.7, 1.0), 0.5
#: Multiplier of the brightness, factor of contrast and gamma, width of the blur in voxels: all around 1.
RANGE = (0.7, 1.3)
#: Where a rotation brings in what lies outside: image 0, label -1 (nnU-Net's own mark, background after its pipeline).
OUTSIDE = -1


class Svda(BasicTransform):
    """Draw operations without replacement, in random order, and apply each with a probability.

    Args:
        count: operations drawn for a crop.
        probability: that a drawn operation is applied.
        weak_view: keep a copy with the spatial operations alone, as nnU-Net's ``regression_target``.

    Raises:
        ValueError: more operations than there are.
    """

    def __init__(self, count: int = 3, probability: float = 0.7, weak_view: bool = False) -> None:
        super().__init__()
        around_one = BGContrast(RANGE)  # below or above 1 with equal probability
        self.operations: list[BasicTransform | str] = [
            "rotation",
            "scaling",
            GaussianBlurTransform(RANGE, synchronize_axes=True, benchmark=False),
            MultiplicativeBrightnessTransform(RANGE, synchronize_channels=False),
            ContrastTransform(around_one, preserve_range=True, synchronize_channels=False),
            GammaTransform(around_one, 0, synchronize_channels=False, p_per_channel=1, p_retain_stats=1),
        ]
        if not 0 <= count <= len(self.operations):
            raise ValueError(f"count must lie in 0..{len(self.operations)}, got {count}")
        self.count, self.probability, self.weak_view = count, probability, weak_view

    def get_parameters(self, **data_dict: Any) -> dict:
        drawn = torch.randperm(len(self.operations))[: self.count].tolist()
        return {"chosen": [i for i in drawn if torch.rand(1).item() < self.probability]}

    def apply(self, data_dict: dict, chosen: list[int]) -> dict:
        """Apply the operations of the given numbers, in this order."""
        if self.weak_view:
            data_dict["regression_target"] = data_dict["image"].clone()
        for operation in (self.operations[i] for i in chosen):
            if isinstance(operation, str):
                data_dict = spatial(operation, tuple(data_dict["image"].shape[1:]))(**data_dict)
            else:
                data_dict["image"] = operation(image=data_dict["image"])["image"]
        return data_dict


def spatial(kind: str, size: tuple[int, ...]) -> SpatialTransform:
    """Return SVDA's rotation or scaling of crops of a size; both keep the size."""
    angle = (-ANGLE, ANGLE) if len(size) == 2 else _first_axis
    moves: dict[str, dict[str, Any]] = {
        "rotation": {"p_rotation": 1.0, "rotation": angle},
        "scaling": {"p_scaling": ZOOM_PROBABILITY, "scaling": ZOOM, "p_synchronize_scaling_across_axes": 1.0},
    }
    return _crop(size, **moves[kind])


def _first_axis(*args: object, dim: int = 0, **kwargs: object) -> float:
    """Draw an angle about the first axis and none about the others, in the form nnU-Net's transform asks for."""
    return ANGLE * (2 * torch.rand(1).item() - 1) if dim == 0 else 0.0


def _crop(size: tuple[int, ...], **moves: Any) -> SpatialTransform:
    """Return a centered crop, with or without a movement."""
    outside = {"border_mode_seg": "constant", "padding_value_seg": OUTSIDE}
    return SpatialTransform(size, patch_center_dist_from_border=0, random_crop=False, **outside, **moves)


def svda_views(stock: ComposeTransforms, count: int = 3, probability: float = 0.7) -> ComposeTransforms:
    """Return nnU-Net's training pipeline with a plain crop and SVDA in place of its geometry and intensity transforms.

    The crop comes before the rotation, whose corners are empty. There are no flips. Images and labels are interpolated
    as nnU-Net does; the authors' code takes cubic splines for images.

    Args:
        stock: what ``nnUNetTrainer.get_training_transforms`` returns.
        count: operations drawn for a crop.
        probability: that a drawn operation is applied.
    """
    parts: dict[Part, list[BasicTransform]] = {part: [] for part in Part}
    for step in stock.transforms:
        if isinstance(step, SpatialTransform):
            step = _crop(tuple(step.patch_size))
        if not isinstance(step, MirrorTransform):
            parts[part_of(step)].append(step)
    return ComposeTransforms([*parts[Part.GEOMETRY], Svda(count, probability), *parts[Part.MASK], *parts[Part.LABEL]])


def svda_unlabeled(pipeline: ComposeTransforms) -> ViewTransforms:
    """Return SVDA's pipeline for unlabeled crops: the strong view is SVDA's, the weak one has its geometry alone.

    Args:
        pipeline: what :func:`svda_views` returns.
    """
    steps = reproducible(pipeline).transforms
    (svda,) = (step for step in steps if isinstance(step, Svda))
    plain = [step for step in steps if step is not svda and part_of(step) is not Part.LABEL]
    views = ViewTransforms(plain)
    place = sum(part is Part.GEOMETRY for part, _ in views.steps)
    svda.weak_view = True
    views.steps.insert(place, (Part.GEOMETRY, svda))
    return views
