"""Time embedding and FiLM: closed forms, identity at the start, exactness of the folded norm."""

import math

import pytest
import torch
from torch import nn

from nnssl.networks.conditioning import FiLM, TimeEmbedding, sinusoidal_embedding


def test_sinusoids_against_the_closed_form():
    got = sinusoidal_embedding(torch.tensor([0, 7, 999]), dim=128)
    for row, t in zip(got, (0, 7, 999), strict=True):
        for i in (0, 1, 31, 63):
            w = math.exp(-math.log(1e4) * i / 63)
            assert row[i].item() == pytest.approx(math.sin(t * w), abs=2e-4)
            assert row[64 + i].item() == pytest.approx(math.cos(t * w), abs=2e-4)


def test_embedding_shape_and_autocast():
    torch.manual_seed(0)
    module = TimeEmbedding()
    t = torch.tensor([1, 500])
    expected = module(t)
    assert expected.shape == (2, 512)
    assert not torch.allclose(expected[0], expected[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(t), expected)


def norms(channels):
    torch.manual_seed(1)
    modules = [
        nn.InstanceNorm2d(channels, affine=True),
        nn.InstanceNorm2d(channels, affine=False),
        nn.InstanceNorm2d(channels, affine=True, track_running_stats=True),
        nn.BatchNorm2d(channels),
    ]
    for module in modules:
        if module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return modules


@pytest.mark.parametrize("index", range(4))
def test_film_is_scale_and_shift_of_the_norm(index):
    channels, norm = 5, norms(5)[index]
    torch.manual_seed(0)
    film, x, embedding = FiLM(channels), torch.randn(3, channels, 6, 7), torch.randn(3, 512)
    assert torch.equal(film(norm, x, embedding), norm(x))
    nn.init.normal_(film.linear.weight, std=0.1)
    nn.init.normal_(film.linear.bias)
    gamma, beta = film.linear(embedding)[..., None, None].chunk(2, dim=1)
    torch.testing.assert_close(film(norm, x, embedding), (1 + gamma) * norm(x) + beta, rtol=1e-4, atol=1e-4)


def test_additive_constant_before_the_norm_would_be_lost():
    """The reason for FiLM: what an additive embedding does before InstanceNorm."""
    norm, x = nn.InstanceNorm2d(4), torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(norm(x + 3), norm(x), rtol=0, atol=1e-5)
