"""What a network's heads mean: classes of a softmax, or regions of sigmoids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nnssl.losses.precision import fp32

if TYPE_CHECKING:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager


@dataclass(frozen=True)
class LabelSpace:
    """Translate between logits, probabilities and nnU-Net's training targets.

    Without regions a target is an integer map (b, 1, ...) and the heads form a softmax. With regions a target is a
    mask per region (b, R, ...), and nnU-Net appends the mask of the ignore label as a last channel where the data set
    has one, (b, R + 1, ...); the heads are independent sigmoids.

    Args:
        num_heads: output channels of the network: classes with background, or regions.
        regions: True for region-based training.
        ignore_label: the label that takes no part in a loss, or None.
    """

    num_heads: int
    regions: bool = False
    ignore_label: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads < (1 if self.regions else 2):
            raise ValueError(f"too few heads: {self.num_heads} (regions: {self.regions})")
        if not self.regions and self.ignore_label is not None and 0 <= self.ignore_label < self.num_heads:
            raise ValueError(f"the ignore label {self.ignore_label} is one of the {self.num_heads} classes")

    @classmethod
    def from_label_manager(cls, label_manager: LabelManager) -> LabelSpace:
        """Read the label space of a data set from nnU-Net's label manager."""
        return cls(label_manager.num_segmentation_heads, label_manager.has_regions, label_manager.ignore_label)

    @property
    def max_entropy(self) -> float:
        """Largest value of :meth:`entropy`, in nats: ln C, or ln 2 for regions."""
        return math.log(2) if self.regions else math.log(self.num_heads)

    def probs(self, logits: Tensor) -> Tensor:
        """Return probabilities (b, C, ...) of logits (b, C, ...) in float32 (softmax, or sigmoid for regions)."""
        self._check_heads(logits)
        return _sigmoid(logits) if self.regions else _softmax(logits)

    @torch.no_grad()
    def harden(self, probs: Tensor) -> Tensor:
        """Return the hard prediction in the layout of a target without ignored voxels.

        Args:
            probs: (b, C, ...). Logits give the same result without regions only.

        Returns:
            int64 label map (b, 1, ...) by argmax, or bool regions (b, R, ...) where the probability exceeds 0.5.
        """
        self._check_heads(probs)
        return probs > 0.5 if self.regions else probs.argmax(1, keepdim=True)

    def confidence(self, probs: Tensor) -> Tensor:
        """Return the probability of the hard prediction (b, 1, ...): the class's, or of the least certain region."""
        self._check_heads(probs)
        probs = probs.float()
        if self.regions:
            return torch.maximum(probs, 1 - probs).amin(1, keepdim=True)
        return probs.amax(1, keepdim=True)

    def entropy(self, probs: Tensor) -> Tensor:
        """Return the entropy per voxel in nats (b, 1, ...); for regions that of the least certain region."""
        self._check_heads(probs)
        probs = probs.float()
        if self.regions:  # one region may lie at its boundary while all others are sure: a sum would hide it
            return (_plogp(probs) + _plogp(1 - probs)).amax(1, keepdim=True)
        return _plogp(probs).sum(1, keepdim=True)

    def one_hot(self, target: Tensor) -> Tensor:
        """Return a target as float32 channels (b, C, ...); ignored voxels are zero in every channel."""
        self._check_target(target)
        if self.regions:
            return (target[:, : self.num_heads].bool() & self.valid(target)).float()
        classes = torch.arange(self.num_heads, device=target.device).view(1, -1, *[1] * (target.ndim - 2))
        return (target == classes).float()

    def valid(self, target: Tensor) -> Tensor:
        """Return bool (b, 1, ...), False where the target carries the ignore label."""
        self._check_target(target)
        if self.regions and target.shape[1] == self.num_heads + 1:
            return ~target[:, self.num_heads :].bool()
        if self.regions or self.ignore_label is None:
            return torch.ones_like(target[:, :1], dtype=torch.bool)
        return target != self.ignore_label

    def foreground(self, target: Tensor) -> Tensor:
        """Return bool (b, 1, ...), True where the target is neither background nor ignored."""
        self._check_target(target)
        if self.regions:
            return target[:, : self.num_heads].bool().any(1, keepdim=True) & self.valid(target)
        return (target > 0) & self.valid(target)

    def _check_heads(self, heads: Tensor) -> None:
        if heads.shape[1] != self.num_heads:
            raise ValueError(f"expected {self.num_heads} channels, got {tuple(heads.shape)}")

    def _check_target(self, target: Tensor) -> None:
        allowed = {1}
        if self.regions:  # a hardened prediction has no ignore channel, a target has one where the data set has
            allowed = {self.num_heads} if self.ignore_label is None else {self.num_heads, self.num_heads + 1}
        if target.shape[1] not in allowed:
            raise ValueError(f"a target has {sorted(allowed)} channels here, got {tuple(target.shape)}")


@fp32
def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(1)


@fp32
def _sigmoid(logits: Tensor) -> Tensor:
    return logits.sigmoid()


@fp32
def _plogp(probs: Tensor) -> Tensor:
    # the clamp bounds the gradient of the logarithm at probability 0, where -p ln p is 0 all the same
    return -probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
