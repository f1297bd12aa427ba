"""Interleaved timing: what is compared runs in turns, so that a busy machine slows both sides alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(sides: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Return the seconds of ``repeats`` calls of each side, taken in turns after ``warmup`` calls of each."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(warmup + repeats):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if round_number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Return minimum, median and maximum of a list of seconds."""
    return {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)}
