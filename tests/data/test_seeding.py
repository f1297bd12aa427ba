import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnssl.data.seeding import Stream, derive_seed, isolated_cpu_randomness, seed_everything, torch_generator
from nnssl.errors import UserError


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_equal_keys_give_equal_numbers_and_any_other_key_gives_others():
    seen = set()
    for key in [(1, 0, Stream.STEP, 5), (2, 0, Stream.STEP, 5), (1, 1, Stream.STEP, 5), (1, 0, 0, 5), (1, 0, 3, 6)]:
        seed_everything(*key)
        first = draw()
        seed_everything(*key)
        assert draw() == first
        seen.add(first)
    assert len(seen) == 5


@settings(max_examples=50, deadline=None)
@given(st.permutations([3, 5, 8, 13]))
def test_every_argument_has_its_own_place(key):
    assert (derive_seed(*key) == derive_seed(3, 5, 8, 13)) == (key == [3, 5, 8, 13])


def test_seeds_are_the_same_on_every_machine():
    words = np.random.SeedSequence([4, 3, 2, 1]).generate_state(8, np.uint32)
    seeds = derive_seed(4, 3, 2, 1)
    assert seeds.numpy == tuple(int(w) for w in words[:4])
    assert seeds.python == (int(words[4]) << 32) + int(words[5])
    assert seeds.torch == ((int(words[6]) << 32) + int(words[7])) % 2**63


@pytest.mark.parametrize("key", [(-1, 0, 0, 0), (2**32, 0, 0, 0), (0, 0, 0, -1)])
def test_numbers_outside_32_bits_are_refused(key):
    with pytest.raises(UserError, match="32-bit"):
        derive_seed(*key)


def test_streams_keep_their_numbers():
    assert [stream.name for stream in Stream][:6] == [
        "TRAIN_BATCH",
        "UNLABELED_BATCH",
        "VAL_BATCH",
        "STEP",
        "INIT",
        "SAMPLING",
    ]
    assert [int(stream) for stream in Stream] == list(range(len(Stream)))


def test_isolation_returns_every_generator_as_it_was_even_after_an_error():
    seed_everything(0, 0, Stream.STEP, 0)
    expected = draw()
    seed_everything(0, 0, Stream.STEP, 0)
    with pytest.raises(KeyError), isolated_cpu_randomness():
        {}[draw()]
    assert draw() == expected


def test_a_generator_of_its_own_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    a = torch.rand(3, generator=torch_generator(1, 0, Stream.SAMPLING, 2))
    b = torch.rand(3, generator=torch_generator(1, 0, Stream.SAMPLING, 2))
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)
