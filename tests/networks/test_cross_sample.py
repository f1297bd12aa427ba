"""CAML's second network."""

import pytest
import torch

from nnssl.networks.cross_sample import CrossSampleAttention

NETWORK = "nnssl.networks.cross_sample.CrossSampleUNet"


def test_samples_see_each_other_in_training_alone(plan, build):
    base, kwargs, ndim = plan
    network = build(NETWORK, {"base": base, **kwargs})
    for layer in (network.attention.intra, network.attention.inter):
        for module in layer.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif isinstance(module, torch.nn.MultiheadAttention):
                module.dropout = 0.0
    x = torch.randn(2, 1, *[16] * ndim, generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[1] += torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(2))
    assert torch.equal(network.eval()(x)[0], network(other)[0])
    assert not torch.allclose(network.train()(x)[0], network(other)[0], atol=1e-4)


def test_it_differs_from_the_planned_network_in_up_sampling_and_attention_alone(plan, build):
    base, kwargs, ndim = plan
    stock, ours = (
        build(name, extra, deep_supervision=True)
        for name, extra in ((base, kwargs), (NETWORK, {"base": base, **kwargs}))
    )
    changed = ("transpconvs", "attention.")
    names = {n for n in stock.state_dict() if not any(c in n for c in changed)}
    state = ours.state_dict()
    assert {n for n in state if not any(c in n for c in changed)} <= names
    assert all(state[n].shape == stock.state_dict()[n].shape for n in state if n in names)
    x = torch.randn(2, 1, *[16] * ndim)
    assert [z.shape for z in ours(x)] == [z.shape for z in stock(x)]


@pytest.mark.parametrize("channels", [8, 6, 5])
def test_attention_goes_over_positions_then_over_samples(channels):
    """It commutes with permuting samples and positions, and a sample's own positions see each other."""
    torch.manual_seed(0)
    attention = CrossSampleAttention(channels).eval()
    x = torch.randn(3, channels, 4, 5)
    y = attention(x)
    assert y.shape == x.shape
    torch.testing.assert_close(attention(x[[2, 0, 1]]), y[[2, 0, 1]])
    torch.testing.assert_close(attention(x.flip(2, 3)), y.flip(2, 3))
    tokens = attention.intra(x.flatten(2).permute(2, 0, 1))
    expected = torch.stack([attention.inter(position[:, None])[:, 0] for position in tokens])
    torch.testing.assert_close(y.flatten(2).permute(2, 0, 1), expected)
