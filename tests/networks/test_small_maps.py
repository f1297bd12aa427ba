"""Convolutions of maps smaller than their kernel: right gradients under bfloat16 on a CPU."""

import copy

import pytest
import torch
from torch import nn

from nnssl.networks.small_maps import guard_small_maps, smaller_than_kernel

SMALL = [((2, 3, 2), 3, 1), ((1, 1, 1), 3, 2), ((3, 4, 4), 5, 1), ((1, 4), 3, 2)]


def poison_free_memory():
    """Leave NaN in the memory the allocator hands out next: code that reads what it did not write meets it."""
    for size in (300, 1000, 3000, 10000, 30000, 100000):
        torch.full((size,), float("nan"))


def gradient(convolution, x, half):
    convolution.zero_grad()
    poison_free_memory()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        y = convolution(x)
    y.float().square().mean().backward()
    return convolution.weight.grad.clone()


@pytest.mark.parametrize(("size", "kernel", "stride"), SMALL)
def test_weight_gradients_of_small_maps_are_those_of_single_precision(size, kernel, stride):
    torch.manual_seed(0)
    kind = {2: nn.Conv2d, 3: nn.Conv3d}[len(size)]
    model = nn.Sequential(kind(16, 16, kernel, stride, kernel // 2))
    guard_small_maps(model)
    x = torch.randn(2, 16, *size)
    want = gradient(model[0], x, half=False)
    for _ in range(5):
        torch.testing.assert_close(gradient(model[0], x, half=True), want)


def test_larger_maps_stay_in_bfloat16():
    model = nn.Sequential(nn.Conv3d(8, 8, 3, padding=1))
    guard_small_maps(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.zeros(1, 8, 3, 3, 3)).dtype == torch.bfloat16
        assert model(torch.zeros(1, 8, 2, 3, 3)).dtype == torch.float32


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "small"),
    [
        ((2, 9, 9), (3, 3, 3), 1, True),
        ((2, 9, 9), (1, 3, 3), 1, False),
        ((9, 9, 2), (3, 3, 3), 1, True),
        ((3, 3, 3), (3, 3, 3), 2, False),
        ((1, 1, 1), (1, 1, 1), 2, False),
        ((2, 9, 2), (2, 2, 2), 3, True),
    ],
)
def test_an_axis_is_small_below_its_own_kernel_or_step(size, kernel, stride, small):
    assert smaller_than_kernel(nn.Conv3d(1, 1, kernel, stride), torch.zeros(1, 1, *size)) == small


def test_copies_are_guarded_with_weights_of_their_own():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1))
    before = copy.deepcopy(model.state_dict())
    guard_small_maps(model)
    assert model.state_dict().keys() == before.keys()
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin[0].weight)
    nn.init.zeros_(twin[0].bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert twin(torch.ones(1, 2, 2, 2)).dtype == torch.float32
        assert not twin(torch.ones(1, 2, 2, 2)).any()
        assert model(torch.ones(1, 2, 2, 2)).any()
