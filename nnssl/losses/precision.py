"""Single precision for the losses: no autocast, no half-precision inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

HALF_TYPES = (torch.float16, torch.bfloat16)


def fp32(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Run ``function`` with autocast off and its half-precision tensors raised to float32.

    Half-precision tensors are found in the arguments and, one level at a time, in lists, tuples and mappings among
    them. float32 and float64 tensors keep their type. The device type is that of the first tensor found.

    Args:
        function: a function of tensors, for example a loss.

    Returns:
        The same function, computed in full precision.
    """

    @functools.wraps(function)
    def in_full_precision(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with _autocast_off(args, kwargs):
            return function(*_raised(args), **_raised(kwargs))

    return in_full_precision


def _autocast_off(*arguments: object) -> AbstractContextManager[Any]:
    device_type = next((tensor.device.type for tensor in _tensors(arguments)), None)
    # a device type without autocast (or with it off) needs no context, and some refuse even a disabled one
    if device_type is None or not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _raised(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF_TYPES else value
    if isinstance(value, Mapping):
        return {key: _raised(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_raised(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_raised(item) for item in value)
    return value
