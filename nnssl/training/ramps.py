"""Schedules of loss weights: functions of the fraction of the run, from 0 to 1."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

from nnssl.errors import UserError

Schedule = Callable[[float], float]


def constant(fraction: float) -> float:
    """Return 1 at every fraction of the run."""
    _check_fraction(fraction)
    return 1.0


def sigmoid_ramp(fraction: float) -> float:
    """Return ``exp(-5 (1 - f)^2)``, from 0.0067 at the start of the run to 1 at its end.

    The Gaussian ramp-up of Laine and Aila 2017 (arXiv 1610.02242), known as "sigmoid ramp-up".

    Args:
        fraction: f, the fraction of the run that is over, in [0, 1].

    Raises:
        ValueError: the fraction is out of range.
    """
    _check_fraction(fraction)
    return math.exp(-5.0 * (1.0 - fraction) ** 2)


def linear_ramp(fraction: float) -> float:
    """Return the fraction itself, from 0 at the start of the run to 1 at its end."""
    _check_fraction(fraction)
    return float(fraction)


def warmup_step(fraction: float, start: float) -> float:
    """Return 0 before the fraction ``start`` of the run, and 1 from there on.

    Raises:
        ValueError: a fraction is out of range.
    """
    _check_fraction(fraction)
    _check_fraction(start)
    return float(fraction >= start)


def schedule(name: str) -> Schedule:
    """Return the schedule that a setting names.

    Args:
        name: ``constant``, ``ramp`` (:func:`sigmoid_ramp`), ``linear``, or ``warmup`` followed by the percentage of
            the run during which the weight is 0, for example ``warmup10``.

    Returns:
        A function from the fraction of the run in [0, 1] to a factor in [0, 1].

    Raises:
        UserError: no schedule has this name.
    """
    if name in _NAMED:
        return _NAMED[name]
    warmup = re.fullmatch(r"warmup([1-9][0-9]?)", str(name))
    if warmup is None:
        raise UserError(
            "a schedule is named in the settings by a known name",
            repr(name),
            ", ".join([*_NAMED, "warmup1 to warmup99 (percent of the run at 0)"]),
            "set one of these",
        )
    return partial(warmup_step, start=int(warmup[1]) / 100)


def _check_fraction(fraction: float) -> None:
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"a fraction of the run lies in [0, 1], got {fraction}")


_NAMED: dict[str, Schedule] = {"constant": constant, "ramp": sigmoid_ramp, "linear": linear_ramp}
