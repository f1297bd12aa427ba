"""Weak and strong views of one crop, made from the parts of nnU-Net's own training augmentation."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform
from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.rot90 import Rot90Transform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.spatial.transpose import TransposeAxesTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import OneOfTransform, RandomTransform


class Part(Enum):
    """Say what a transform of nnU-Net's pipeline is for; the order is that of an unlabeled pipeline."""

    GEOMETRY = 0
    INTENSITY = 1
    MASK = 2
    LABEL = 3


_GEOMETRY = (
    SpatialTransform,
    MirrorTransform,
    Rot90Transform,
    TransposeAxesTransform,
    Convert3DTo2DTransform,
    Convert2DTo3DTransform,
)
_LABEL = (
    SegOnlyTransform,
    MoveSegAsOneHotToDataTransform,
    # image transforms of the cascade: they work on the one-hot labels moved into the image
    ApplyRandomBinaryOperatorTransform,
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)


def part_of(transform: BasicTransform) -> Part:
    """Return what a transform is for.

    Raises:
        TypeError: the transform is of no known kind, or chooses among transforms of several kinds.
    """
    if isinstance(transform, RandomTransform):
        return part_of(transform.transform)
    if isinstance(transform, (OneOfTransform, ComposeTransforms)):
        inner = transform.list_of_transforms if isinstance(transform, OneOfTransform) else transform.transforms
        parts = {part_of(t) for t in inner}
        if len(parts) == 1:
            return parts.pop()
        raise TypeError(f"{type(transform).__name__} mixes {sorted(part.name for part in parts)}: split it by kind")
    for part, kinds in ((Part.MASK, MaskImageTransform), (Part.GEOMETRY, _GEOMETRY), (Part.LABEL, _LABEL)):
        if isinstance(transform, kinds):
            return part
    if isinstance(transform, ImageOnlyTransform):
        return Part.INTENSITY
    raise TypeError(f"{type(transform).__name__} is no geometric, intensity, mask or label transform nnssl knows")


def _without_benchmark(transform: BasicTransform) -> None:
    """Make Gaussian blur choose its algorithm by rule: nnU-Net's choice by timing is not reproducible."""
    if isinstance(transform, GaussianBlurTransform):
        transform.benchmark = False
    inner = getattr(transform, "transform", None)
    for child in [inner, *getattr(transform, "transforms", []), *getattr(transform, "list_of_transforms", [])]:
        if isinstance(child, BasicTransform):
            _without_benchmark(child)


def reproducible(transform: BasicTransform) -> BasicTransform:
    """Return a copy of a pipeline whose result is a function of the random seeds alone."""
    transform = copy.deepcopy(transform)
    _without_benchmark(transform)
    return transform


class ViewTransforms(BasicTransform):
    """Turn one crop into a weak and a strong view that share their geometry.

    Geometry reaches image, weak view and segmentation alike, intensity transforms only the strong view, masks both
    views. The weak view is a copy taken before the first intensity transform, because transforms write in place.

    Args:
        steps: transforms in the order in which they are applied.

    Call it with ``image`` (c, ...) and ``segmentation`` (1, ...); it returns ``image`` (the strong view), ``weak``
    and ``segmentation``.
    """

    def __init__(self, steps: Sequence[BasicTransform]) -> None:
        super().__init__()
        self.steps = [(part_of(step), step) for step in steps]

    @property
    def masks_image(self) -> bool:
        """Tell whether the outside of the nonzero mask is set to zero, for which the mask must be loaded."""
        return any(part is Part.MASK for part, _ in self.steps)

    def apply(self, data_dict: dict, **params: Any) -> dict:
        for part, step in self.steps:
            if part is Part.INTENSITY:
                self._branch(data_dict)
                data_dict["image"] = self._strengthen(step, data_dict["image"])
            elif part is Part.MASK:
                self._branch(data_dict)
                weak = {"image": data_dict["regression_target"], "segmentation": data_dict["segmentation"]}
                data_dict["regression_target"] = step(**weak)["image"]
                data_dict = step(**data_dict)
            else:
                data_dict = step(**data_dict)
        self._branch(data_dict)
        data_dict["weak"] = data_dict.pop("regression_target")
        return data_dict

    @staticmethod
    def _branch(data_dict: dict) -> None:
        # geometric transforms treat nnU-Net's "regression_target" as they treat an image
        if "regression_target" not in data_dict:
            data_dict["regression_target"] = data_dict["image"].clone()

    @staticmethod
    def _strengthen(step: BasicTransform, image: torch.Tensor) -> torch.Tensor:
        strong = step(image=image)["image"]
        if strong.shape != image.shape:
            raise ValueError(f"{type(step).__name__} changed the strong view's shape {tuple(image.shape)}")
        return strong


def labeled_transforms(stock: ComposeTransforms, weak_view: bool = False) -> BasicTransform:
    """Return nnU-Net's training pipeline for labeled cases, optionally with a weak view beside it.

    ``image`` and ``segmentation`` are bit for bit what the stock pipeline gives for the same seeds (with the blur
    algorithm fixed, see `reproducible`), with and without the weak view.

    Args:
        stock: what ``nnUNetTrainer.get_training_transforms`` returns.
        weak_view: whether the crop is wanted without the intensity transforms too.
    """
    stock = reproducible(stock)
    return ViewTransforms(stock.transforms) if weak_view else stock


def unlabeled_transforms(stock: ComposeTransforms, strong: Iterable[BasicTransform] | None = None) -> ViewTransforms:
    """Return the pipeline for unlabeled cases: geometry once, then the intensity block on the strong view, then masks.

    Transforms that need labels are left out. nnU-Net mirrors after its intensity block and we before: flips commute
    with it in distribution.

    Args:
        stock: what ``nnUNetTrainer.get_training_transforms`` returns.
        strong: a method's own transforms for the strong view in place of nnU-Net's intensity block. They see the
            image (c, ...) alone and must keep its shape; randomness comes from the global generators.
    """
    parts: dict[Part, list[BasicTransform]] = {part: [] for part in Part}
    for step in reproducible(stock).transforms:
        parts[part_of(step)].append(step)
    if strong is not None:
        parts[Part.INTENSITY] = [_as_intensity(reproducible(step)) for step in strong]
    return ViewTransforms(parts[Part.GEOMETRY] + parts[Part.INTENSITY] + parts[Part.MASK])


def _as_intensity(transform: BasicTransform) -> BasicTransform:
    if part_of(transform) is not Part.INTENSITY:
        raise TypeError(f"{type(transform).__name__} is no intensity transform: views must share their geometry")
    return transform
