"""nnU-Net's deeply supervised loss with weights of classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnssl.losses.class_weighted import class_weighted_loss
from nnssl.trainers.base import SemiSupervisedTrainer, full_resolution


def class_weighted_supervision(
    trainer: SemiSupervisedTrainer, output: Any, target: Any, weights: Tensor, include_background: bool = False
) -> Tensor:
    """Return the supervised loss with weights W of classes, summed over resolutions with nnU-Net's factors.

    Args:
        trainer: an initialized trainer of exclusive classes.
        output: logits (b, C, ...), or a list of them from full to lowest resolution.
        target: integer labels (b, 1, ...), or a list of them.
        weights: W (C,), at least 0.
        include_background: the Dice counts class 0 too.
    """
    space, batch_dice = trainer.label_space, trainer.configuration_manager.batch_dice
    levels = zip(output, target, strict=True) if isinstance(output, list) else [(output, full_resolution(target))]
    factors = getattr(trainer.loss, "weight_factors", (1.0,))
    loss = sum(
        factor
        * class_weighted_loss(
            logits, label, weights, space.valid(label), include_background=include_background, batch_dice=batch_dice
        )
        for factor, (logits, label) in zip(factors, levels, strict=True)
        if factor != 0
    )
    return torch.as_tensor(loss)
