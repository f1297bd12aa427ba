"""Time the selective scan, forward and backward, against mambapy's parallel scan."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

STATES = 16
# Sequence length -> inner channels, as the high-frequency module meets them at 1/16, 1/8 and 1/4 of a published patch.
CHANNELS = {216: 512, 1960: 256, 15680: 128}


def compare(
    lengths: Sequence[int] = tuple(CHANNELS), repeats: int = 5, batch: int = 1, seed: int = 0
) -> list[dict[str, Any]]:
    """Time both scans on equal inputs, interleaved, one warm-up each.

    Both compute y from (u, delta, A, B, C) and the gradients of all five. mambapy's scan takes the decays
    ``exp(delta A)`` and the inputs ``delta u B`` as full tensors, so building them belongs to its time.

    Args:
        lengths: sequence lengths; inner channels are 512 at 216, 256 at 1,960, 128 at 15,680, and those of the nearest
            of these lengths at any other.
        repeats: timed repetitions of each scan.
        batch: sequences.
        seed: of the inputs.

    Returns:
        One record per length: medians in seconds, their ratio (mambapy over ours; above 1 means ours is faster), and
        the largest difference of the outputs relative to the largest output. Without mambapy its fields are None.
    """
    return [_compare_length(length, repeats, batch, seed) for length in lengths]


def _compare_length(length: int, repeats: int, batch: int, seed: int) -> dict[str, Any]:
    import torch

    channels = CHANNELS[min(CHANNELS, key=lambda known: abs(known - length))]
    inputs = _inputs(length, channels, batch, seed)
    scans: dict[str, Callable[..., Any]] = {"nnssl": _ours}
    if (theirs := _mambapy()) is not None:
        scans["mambapy"] = theirs
    outputs = {name: _step(scan, inputs) for name, scan in scans.items()}
    times: dict[str, list[float]] = {name: [] for name in scans}
    for _ in range(repeats):
        for name, scan in scans.items():
            start = time.perf_counter()
            _step(scan, inputs)
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    both = "mambapy" in scans
    return {
        "length": length,
        "channels": channels,
        "states": STATES,
        "batch": batch,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "seconds": medians["nnssl"],
        "mambapy_seconds": medians.get("mambapy"),
        "ratio": medians["mambapy"] / medians["nnssl"] if both else None,
        "difference": _relative_difference(outputs["nnssl"], outputs["mambapy"]) if both else None,
    }


def _inputs(length: int, channels: int, batch: int, seed: int) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(batch, channels, length, generator=generator)
    delta = torch.rand(batch, channels, length, generator=generator) * 0.1 + 1e-3
    A = -torch.arange(1, STATES + 1, dtype=torch.float32).repeat(channels, 1)
    B, C = (torch.randn(batch, STATES, length, generator=generator) for _ in range(2))
    return [v.requires_grad_() for v in (u, delta, A, B, C)]


def _step(scan: Callable[..., Any], inputs: list[Any]) -> Any:
    for value in inputs:
        value.grad = None
    y = scan(*inputs)
    y.square().sum().backward()
    return y.detach()


def _ours(u: Any, delta: Any, A: Any, B: Any, C: Any) -> Any:
    from nnssl.networks.selective_scan import selective_scan

    return selective_scan(u, delta, A, B, C, backend="torch")


def _mambapy() -> Callable[..., Any] | None:
    try:
        from mambapy.pscan import pscan
    except ImportError:
        return None
    import torch

    def scan(u: Any, delta: Any, A: Any, B: Any, C: Any) -> Any:
        u, delta, B, C = (v.transpose(1, 2) for v in (u, delta, B, C))
        decays = torch.exp(delta.unsqueeze(-1) * A)
        states = pscan(decays, (delta * u).unsqueeze(-1) * B.unsqueeze(2))
        return (states @ C.unsqueeze(-1)).squeeze(-1).transpose(1, 2)

    return scan


def _relative_difference(a: Any, b: Any) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--lengths", type=int, nargs="+", default=list(CHANNELS), help="sequence lengths")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions of each scan (default: 5)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default: 1)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run `compare` with the parsed options; the result is plain JSON."""
    return {"scan": compare(args.lengths, args.repeats, args.batch)}
