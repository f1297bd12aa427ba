"""The planned network as a pyramid."""

import pytest
import torch

PYRAMID = "nnssl.networks.pyramid.PyramidUNet"


def image(ndim: int) -> torch.Tensor:
    return torch.randn(2, 1, *[16] * ndim, generator=torch.Generator().manual_seed(1))


def test_equals_the_planned_network_outside_its_mode(plan, build):
    base, kwargs, ndim = plan
    stock, ours = build(base, kwargs, deep_supervision=True), build(PYRAMID, {"base": base, **kwargs}, 1, 3, True)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for a, b in zip(stock(image(ndim)), ours(image(ndim)), strict=True):
        assert torch.equal(a, b)


def test_an_undisturbed_pyramid_is_the_list_of_deep_supervision(plan, build):
    base, kwargs, ndim = plan
    network = build(PYRAMID, {"base": base, **kwargs}, 1, 3, True)
    expected = network(image(ndim))
    network.decoder.deep_supervision = False
    got = network(image(ndim), pyramid=True)
    assert len(got) == 2
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("disturbance", [{"dropout": 0.5}, {"noise": 0.3}])
def test_disturbances_reach_every_head_and_keep_the_mean(plan, build, disturbance):
    base, kwargs, ndim = plan
    network = build(PYRAMID, {"base": base, **kwargs})
    with torch.no_grad():
        clean = network(image(ndim), pyramid=True)
        drawn = [network(image(ndim), pyramid=True, **disturbance) for _ in range(200)]
    for level, expected in enumerate(clean):
        stacked = torch.stack([d[level] for d in drawn])
        assert stacked.std(0).min() > 0
        error = (stacked.mean(0) - expected).abs().mean() / stacked.std(0).mean()
        assert error < 3 / 200**0.5


def test_the_features_of_every_resolution_are_what_its_head_reads(plan, build):
    base, kwargs, ndim = plan
    network = build(PYRAMID, {"base": base, **kwargs}, 1, 3, True)
    output, scales = network(image(ndim), scales=True)
    assert len(scales) == len(network.decoder.seg_layers)
    for logits, features, head in zip(output, scales[::-1], network.decoder.seg_layers[::-1], strict=True):
        assert torch.equal(head(features), logits)
    network.decoder.deep_supervision = False
    alone, same = network(image(ndim), scales=True)
    assert torch.equal(alone, output[0])
    assert len(same) == len(scales)
