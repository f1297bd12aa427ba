"""One encoder with several decoders."""

import pytest
import torch
from torch.nn import functional

from nnssl.errors import UserError

NETWORK = "nnssl.networks.multi_decoder.MultiDecoderUNet"


def image(ndim: int) -> torch.Tensor:
    return torch.randn(2, 1, *[16] * ndim, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_the_first_decoder_is_the_planned_network(plan, build, deep_supervision):
    base, kwargs, ndim = plan
    stock = build(base, kwargs, deep_supervision=deep_supervision)
    ours = build(NETWORK, {"base": base, "upsampling": ["linear", "nearest"], **kwargs}, 1, 3, deep_supervision)
    state = ours.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in stock.state_dict().items())
    x = image(ndim)
    expected, alone, every = stock(x), ours(x), ours(x, every=True)
    assert len(every) == 3
    for outputs in (alone, every[0]):
        pairs = zip(expected, outputs, strict=True) if deep_supervision else [(expected, outputs)]
        assert all(torch.equal(a, b) for a, b in pairs)
    for output in every:
        levels = output if deep_supervision else [output]
        assert [z.shape for z in levels] == [z.shape for z in (expected if deep_supervision else [expected])]


def test_decoders_differ_in_up_sampling_and_share_the_encoder(plan, build):
    base, kwargs, ndim = plan
    ours = build(NETWORK, {"base": base, "upsampling": ["linear", "nearest", "transposed"], **kwargs})
    x = torch.rand(1, 16, *[4] * ndim)
    up = [decoder.transpconvs[0] for decoder in (ours.decoder, *ours.auxiliary)]
    stride = tuple(up[0].stride)
    assert [type(m).__name__ for m in up[:1] + up[3:]] == [f"ConvTranspose{ndim}d"] * 2
    mode = "bilinear" if ndim == 2 else "trilinear"
    for layer, options in ((up[1], {"mode": mode}), (up[2], {"mode": "nearest"})):
        expected = functional.interpolate(layer[0](x), scale_factor=[float(s) for s in stride], **options)
        assert torch.equal(layer(x), expected)
        assert layer(x).shape == up[0](x).shape
    sum(output.sum() for output in ours(image(ndim), every=True)[1:]).backward()
    assert all(p.grad is not None for p in ours.encoder.parameters())
    assert all(p.grad is None for p in ours.decoder.seg_layers.parameters())
    names = [n for n, _ in ours.named_parameters()]
    assert not any(n.startswith("auxiliary") and "encoder" in n for n in names)


def test_every_decoder_returns_what_its_last_layer_reads(plan, build):
    base, kwargs, ndim = plan
    ours = build(NETWORK, {"base": base, "upsampling": ["nearest"], **kwargs})
    x = image(ndim)
    pairs, decoders = ours(x, every=True, features=True), (ours.decoder, *ours.auxiliary)
    for (output, features), alone, decoder in zip(pairs, ours(x, every=True), decoders, strict=True):
        assert torch.equal(output, alone)
        assert torch.equal(decoder.seg_layers[-1](features), output)


def test_unknown_up_sampling_is_refused(plan, build):
    base, kwargs, _ = plan
    with pytest.raises(UserError, match="up-sampling"):
        build(NETWORK, {"base": base, "upsampling": ["cubic"], **kwargs})
