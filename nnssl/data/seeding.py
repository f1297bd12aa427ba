"""Randomness as a function of (seed, rank, stream, index), so that no generator state is ever stored."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch

from nnssl.errors import UserError

_WORD = 2**32


class Stream(IntEnum):
    """Name the independent sources of randomness of one run.

    The numbers are part of what a seed means: never renumber them, only append.
    """

    TRAIN_BATCH = 0
    UNLABELED_BATCH = 1
    VAL_BATCH = 2
    STEP = 3
    INIT = 4
    SAMPLING = 5
    SPLIT = 6
    MONITORING_BATCH = 7
    PSEUDO_BATCH = 8


class Seeds(NamedTuple):
    """Hold the seeds of one draw.

    Args:
        numpy: four 32-bit words for ``numpy.random.seed``.
        python: 64-bit integer for ``random.seed``.
        torch: 63-bit integer for ``torch.manual_seed`` or ``torch.Generator.manual_seed``.
    """

    numpy: tuple[int, ...]
    python: int
    torch: int


def derive_seed(seed: int, rank: int, stream: int, index: int) -> Seeds:
    """Derive independent seeds for one draw with ``numpy.random.SeedSequence([seed, rank, stream, index])``.

    Different arguments give statistically independent seeds, equal arguments give equal seeds on every machine.

    Args:
        seed: the run's seed, 0 <= seed < 2**32.
        rank: the process's rank under distributed training, 0 otherwise.
        stream: what the numbers are for, see `Stream`.
        index: position in the stream (batch or iteration number).

    Raises:
        UserError: an argument is negative or does not fit into 32 bits.
    """
    key = [int(seed), int(rank), int(stream), int(index)]
    if any(not 0 <= word < _WORD for word in key):
        # a longer or shorter key could coincide with another one: SeedSequence pads with zeros
        raise UserError(
            "seed, rank, stream and index are 32-bit numbers", key, "0 <= number < 2**32", "choose another seed"
        )
    words = [int(word) for word in np.random.SeedSequence(key).generate_state(8, np.uint32)]
    return Seeds(tuple(words[:4]), words[4] * _WORD + words[5], (words[6] * _WORD + words[7]) % 2**63)


def seed_everything(seed: int, rank: int, stream: int, index: int) -> None:
    """Seed Python, NumPy and torch (CPU and every accelerator) of this process, see `derive_seed`."""
    seeds = derive_seed(seed, rank, stream, index)
    random.seed(seeds.python)
    np.random.seed(seeds.numpy)
    torch.manual_seed(seeds.torch)


def torch_generator(seed: int, rank: int, stream: int, index: int, device: str = "cpu") -> torch.Generator:
    """Make a torch generator of its own, independent of the process's global one, see `derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, rank, stream, index).torch)


@contextmanager
def isolated_cpu_randomness() -> Iterator[None]:
    """Give Python's, NumPy's and torch's CPU generators back in the state in which they were found.

    Accelerator generators are not touched, so that the context is safe in forked workers.
    """
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(cpu)


def seed_cpu(seeds: Seeds) -> None:
    """Seed Python, NumPy and torch's CPU generator, and no accelerator (``torch.manual_seed`` would)."""
    random.seed(seeds.python)
    np.random.seed(seeds.numpy)
    torch.default_generator.manual_seed(seeds.torch)
