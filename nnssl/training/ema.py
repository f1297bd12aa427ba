"""The mean teacher: an exponential moving average of a student's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def ema_decay(step: int, decay: float) -> float:
    """Return ``min(1 - 1 / (step + 1), decay)``: a plain average at first, then the given decay.

    Tarvainen and Valpola 2017 (arXiv 1703.01780).

    Args:
        step: number of updates before this one, in iterations.
        decay: upper limit, in [0, 1).

    Raises:
        ValueError: the step is negative.
    """
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    return min(1.0 - 1.0 / (step + 1.0), decay)


class EMATeacher:
    """Hold a copy of a network whose weights follow the student's as ``w <- alpha w + (1 - alpha) w_student``.

    alpha is :func:`ema_decay` of the step; buffers are copied. The copy is in evaluation mode and needs no gradient.
    Parameters are visited once each, however many names a network gives them.

    Args:
        module: the student before compiling and before wrapping for several processes.
        decay: upper limit of alpha, in [0, 1).

    Raises:
        ValueError: the decay is out of range.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay lies in [0, 1), got {decay}")
        self.decay = decay
        self._alpha = 0.0
        self._averaged = AveragedModel(module, multi_avg_fn=self._average)
        self._averaged.n_averaged.fill_(1)  # the step alone decides alpha, also after a resumed run
        self._averaged.requires_grad_(False)
        self._averaged.eval()

    @property
    def module(self) -> nn.Module:
        """The teacher network."""
        return self._averaged.module

    @torch.no_grad()
    def update(self, student_module: nn.Module, step: int) -> None:
        """Move the teacher toward the student after an optimizer step.

        Args:
            student_module: the network given at construction, or its compiled or wrapped form.
            step: number of updates before this one (0 copies the student).

        Raises:
            ValueError: the step is negative, or the student has other parameters than the teacher.
        """
        self._alpha = ema_decay(step, self.decay)
        ours = [parameter.shape for parameter in self.module.parameters()]
        if ours != [parameter.shape for parameter in student_module.parameters()]:
            raise ValueError("the student's parameters do not match the teacher's")
        self._averaged.update_parameters(student_module)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the teacher's weights and buffers as plain tensors by name."""
        return {name: tensor.detach() for name, tensor in self.module.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; every name must match."""
        self.module.load_state_dict(state, strict=True)

    def _average(self, teacher: Any, student: Any, _: Any) -> None:
        torch._foreach_lerp_(teacher, student, 1.0 - self._alpha)
