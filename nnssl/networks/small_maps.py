"""Convolutions of maps smaller than their kernel, kept out of bfloat16 on CPUs.

There oneDNN (as torch 2.13 ships it) computes their weight gradient wrongly: it reads and writes memory that is not its
own, so that weights turn NaN now and then, or wrong, or the process dies.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def smaller_than_kernel(convolution: nn.Module, x: Tensor) -> bool:
    """Return whether any axis of a map (b, c, ...) is shorter than the convolution's kernel or step there.

    Every wrong gradient found was of such a map: larger maps, up to two voxels beyond kernels of 1, 2, 3 and 5 with
    strides of 1 to 3, were compared with single precision.
    """
    sizes = zip(x.shape[2:], convolution.kernel_size, convolution.stride, strict=True)
    return any(kernel > 1 and size < max(kernel, stride) for size, kernel, stride in sizes)


class _Guard(nn.Module):
    """Mixed in before a convolution's own class."""

    def forward(self, x: Tensor) -> Tensor:
        if not smaller_than_kernel(self, x):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


#: One guarded class a convolution's own class.
_GUARDED: dict[type, type] = {}


def guard_small_maps(module: nn.Module) -> None:
    """Let the module's convolutions take maps smaller than their kernel in single precision under autocast.

    The classes of its layers change in place (weights, names and hooks stay), so that a copy, an EMA teacher's for
    one, is guarded too.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)) and not isinstance(layer, _Guard):
            kind = type(layer)
            layer.__class__ = _GUARDED.setdefault(kind, type(kind.__name__, (_Guard, kind), {}))
