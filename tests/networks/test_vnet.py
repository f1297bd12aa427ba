"""The V-Net: published size, shapes, time embedding, high-frequency module."""

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnssl.errors import UserError
from nnssl.networks.vnet import VNet

VNET = "nnssl.networks.vnet.VNet"


def image(ndim, channels=1, size=16):
    return torch.randn(2, channels, *[size] * ndim, generator=torch.Generator().manual_seed(1))


def small(ndim=2, **kwargs):
    torch.manual_seed(0)
    return VNet(1, 3, n_filters=2, ndim=ndim, **kwargs)


def count(**kwargs):
    with torch.device("meta"):
        return sum(p.numel() for p in VNet(**kwargs).parameters())


def test_published_parameter_counts():
    assert round(count(input_channels=1, num_classes=2) / 1e6, 3) == 9.449
    conditioned = count(input_channels=3, num_classes=2, conditioning=True)
    # about 11.2 M with one unused Linear for each block's last convolution, which is not built here
    unused = sum(513 * w for w in (16, 32, 64, 128, 256, 128, 64, 32, 16))
    assert round((conditioned + unused) / 1e6, 1) == 11.2


@pytest.mark.parametrize("ndim", [2, 3])
def test_shapes_and_features(ndim):
    network = small(ndim).eval()
    logits, features = network(image(ndim), features=True)
    assert logits.shape == (2, 3, *[16] * ndim)
    assert features.shape == (2, network.feature_channels, *[16] * ndim)
    torch.testing.assert_close(network.seg_layer(features), logits)
    assert torch.equal(network(image(ndim)), logits)


@pytest.mark.parametrize("ndim", [2, 3])
def test_nnunet_builder_builds_it(ndim):
    kwargs = {"n_filters": 2, "conv_op": f"torch.nn.modules.conv.Conv{ndim}d"}
    network = get_network_from_plans(VNET, kwargs, ["conv_op"], 1, 2, deep_supervision=True)
    assert network(image(ndim)).shape == (2, 2, *[16] * ndim)


def test_output_depends_on_time_from_the_start():
    network = small(conditioning=True).eval()
    x = image(2)
    early, late = (network(x, t=torch.tensor([t, t])) for t in (3, 900))
    assert (early - late).norm() / early.norm() > 1e-3
    torch.testing.assert_close(network(x, t=torch.tensor([3, 900])), torch.stack((early[0], late[1])))


def test_every_time_site_receives_a_gradient():
    network = small(conditioning=True)
    network(image(2, size=32), t=torch.tensor([3, 9])).square().mean().backward()
    sites = [p for n, p in network.named_parameters() if "_sites" in n]
    assert len(sites) == 2 * (8 + 7 + 5)  # weight and bias: scale changes, encoder blocks, decoder blocks
    assert all(p.grad.abs().sum() > 0 for p in sites)


def test_hfm_sits_on_block_four_by_default():
    network, plain = small(hfm={"threshold": 0.6}).eval(), small().eval()
    assert list(network.hfm) == ["3"]
    x = image(2, size=64)
    ours, theirs = network._encode(x, None), plain._encode(x, None)
    assert torch.equal(ours[2], theirs[2])
    torch.testing.assert_close(ours[3], network.hfm["3"](theirs[3]))


def test_added_parts_leave_the_plain_weights_alone():
    plain, full = small().state_dict(), small(conditioning=True, hfm={"stages": [2]}).state_dict()
    assert all(torch.equal(v, full[k]) for k, v in plain.items())


def test_misuse_is_refused():
    with pytest.raises(UserError, match="divisible by 16"):
        small()(image(2, size=24))
    with pytest.raises(UserError):
        small(hfm={"stages": [7]})
    with pytest.raises(UserError):
        VNet(1, 2, ndim=4)
    with pytest.raises(ValueError, match="without conditioning"):
        small()(image(2), t=torch.tensor([1, 1]))
