"""The literature's U-Net: published size, a functional rewrite, shapes, and the sites where an embedding enters."""

import pytest
import torch
import torch.nn.functional as F
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnssl.errors import UserError
from nnssl.networks.conv_unet import CONV, ConvBlock, Decoder, Encoder, LiteratureUNet, Style, Up

UNET = "nnssl.networks.conv_unet.LiteratureUNet"


def image(*size, channels=1):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


def small(ndim=2, **kwargs):
    torch.manual_seed(0)
    return LiteratureUNet(1, 3, ndim=ndim, width=2, **kwargs)


@pytest.mark.parametrize(("classes", "published"), [(2, 1_813_474), (3, 1_813_619), (4, 1_813_764)])
def test_published_parameter_counts(classes, published):
    with torch.device("meta"):
        assert sum(p.numel() for p in LiteratureUNet(1, classes).parameters()) == published


def test_forward_equals_the_published_table_written_with_functions():
    network = small().eval()
    for module in network.modules():  # running statistics and affine weights that matter
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
    weights = network.state_dict()

    def block(x, name):
        for i in (1, 2):
            x = F.conv2d(x, weights[f"{name}.conv{i}.weight"], weights[f"{name}.conv{i}.bias"], padding=1)
            mean, var, scale, shift = (
                weights[f"{name}.norm{i}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
            )
            x = torch.where((x := F.batch_norm(x, mean, var, scale, shift)) > 0, x, 0.01 * x)
        return x

    x, skips = image(32, 32), []
    for level in range(5):
        x = block(F.max_pool2d(x, 2) if level else x, f"encoder.blocks.{level}")
        skips.append(x)
    for step, skip in enumerate(skips[3::-1]):
        name = f"decoder.ups.{step}"
        x = F.conv2d(x, weights[f"{name}.reduce.weight"], weights[f"{name}.reduce.bias"])
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        x = block(torch.cat((skip, x), 1), f"{name}.block")
    expected = F.conv2d(x, weights["decoder.out.weight"], weights["decoder.out.bias"], padding=1)
    torch.testing.assert_close(network(image(32, 32)), expected)


def test_dropout_grows_with_depth_and_spares_the_decoder():
    network = small()
    assert [b.dropout.p for b in network.encoder.blocks] == [0.05, 0.1, 0.2, 0.3, 0.5]
    assert {up.block.dropout.p for up in network.decoder.ups} == {0.0}
    x = image(32, 32)
    assert not torch.equal(network(x), network(x))


@pytest.mark.parametrize("size", [(16, 16), (19, 33), (16, 16, 16), (17, 24, 16)])
def test_output_has_the_inputs_size(size):
    assert small(len(size))(image(*size)).shape == (2, 3, *size)


@pytest.mark.parametrize("ndim", [2, 3])
def test_nnunet_builder_builds_it(ndim):
    network = get_network_from_plans(UNET, {"ndim": ndim, "width": 2}, [], 1, 2, deep_supervision=True)
    assert network(image(*[16] * ndim)).shape == (2, 2, *[16] * ndim)
    assert not hasattr(network.decoder, "deep_supervision")  # what the base trainer would toggle


def test_misuse_is_refused():
    with pytest.raises(UserError, match="16 voxels"):
        small()(image(32, 15))
    with pytest.raises(UserError, match="2 or 3"):
        LiteratureUNet(1, 2, ndim=4)
    for norm in ("instance", "group"):
        with pytest.raises(ValueError, match="batch normalization only"):
            Style(2, norm, "additive")


@pytest.mark.parametrize(("channels", "groups"), [(16, 8), (12, 1)])
def test_group_norm_falls_back_to_one_group(channels, groups):
    assert Style(2, "group").make_norm(channels).num_groups == groups


def test_an_added_embedding_enters_after_the_first_non_linearity():
    torch.manual_seed(0)
    block, x, embedding = ConvBlock(Style(2, "batch", "additive"), 1, 4).eval(), image(8, 8), torch.randn(2, 512)
    first = F.leaky_relu(block.norm1(block.conv1(x)), 0.01) + block.site(embedding)[:, :, None, None]
    torch.testing.assert_close(block(x, embedding), F.leaky_relu(block.norm2(block.conv2(first)), 0.01))
    assert not torch.allclose(block(x, embedding), block(x))


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_film_acts_after_both_norms(norm):
    torch.manual_seed(0)
    block, x, embedding = ConvBlock(Style(2, norm, "film"), 1, 4).eval(), image(8, 8), torch.randn(2, 512)
    assert torch.equal(block(x, embedding), block(x))  # zero at the start
    for film in (block.film1, block.film2):
        torch.nn.init.normal_(film.linear.weight, std=0.05)
    y = x
    for i in (1, 2):
        film, conv, norm = (getattr(block, f"{part}{i}") for part in ("film", "conv", "norm"))
        gamma, beta = film.linear(embedding)[..., None, None].chunk(2, 1)
        y = F.leaky_relu((1 + gamma) * norm(conv(y)) + beta, 0.01)
    torch.testing.assert_close(block(x, embedding), y, rtol=1e-4, atol=1e-4)


def test_fused_features_reach_the_next_level():
    torch.manual_seed(0)
    style = Style(2, "instance")
    encoder = Encoder(style, 1, [2, 4], [[2, 2]], [[3, 3]] * 2, [0, 0])
    other = [torch.randn(2, 2, 16, 16), torch.randn(2, 4, 8, 8)]
    x, got = image(16, 16), encoder(image(16, 16), fuse=other)
    first = encoder.blocks[0](x) + other[0]
    torch.testing.assert_close(got[0], first)
    torch.testing.assert_close(got[1], encoder.blocks[1](F.max_pool2d(first, 2)) + other[1])


def test_anisotropic_levels_keep_their_sizes():
    encoder = Encoder(Style(3), 1, [2, 2, 2], [[1, 2, 2], [2, 2, 2]], [[1, 3, 3], [1, 3, 3], [3, 3, 3]], [0] * 3)
    decoder = Decoder(Style(3), [2, 2, 2], [[1, 3, 3], [1, 3, 3], [3, 3, 3]], 3)
    features = encoder(image(5, 14, 12))
    assert [tuple(f.shape[2:]) for f in features] == [(5, 14, 12), (5, 7, 6), (2, 3, 3)]
    assert decoder(features).shape == (2, 3, 5, 14, 12)


def test_without_a_skip_only_its_size_counts():
    torch.manual_seed(0)
    x, skip = torch.randn(2, 4, 4, 4), torch.randn(2, 2, 9, 7)
    for kept in (True, False):
        up = Up(Style(2), 4, 2, skip=kept)
        assert up(x, skip).shape == skip.shape
        assert torch.equal(up(x, skip), up(x, torch.zeros_like(skip))) != kept


def test_channels_last_convolution_equals_the_usual_one_with_usual_strides():
    torch.manual_seed(0)
    ours, usual = CONV[3](3, 4, (3, 1, 3), padding=(1, 0, 1)), torch.nn.Conv3d(3, 4, (3, 1, 3), padding=(1, 0, 1))
    usual.load_state_dict(ours.state_dict())
    outcomes = []
    for convolution in (ours, usual):
        x = torch.randn(2, 3, 5, 6, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
        layouts = []
        x.register_hook(lambda gradient, layouts=layouts: layouts.append(gradient.is_contiguous()))
        y = convolution(x)
        y.square().sum().backward()
        assert y.is_contiguous()
        assert layouts == [True]
        outcomes.append([y, x.grad, convolution.weight.grad, convolution.bias.grad])
    for got, want in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want)
