"""The label-diffusion network: sizes, who sees the label, sampling that repeats, and that it can learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nnssl.diffusion.continuous import step_pairs
from nnssl.networks.conditioning import FiLM
from nnssl.networks.label_diffusion import DecoderShape, LabelDiffusionNet, LabelSampling, pad_to_multiple

VIT = {
    "kind": "vit",
    "name": "vit_tiny_patch16_224",
    "size": [64, 64],
    "model": {"embed_dim": 64, "depth": 4, "num_heads": 2},
}
DECODER = {"width": 16, "embedding": 8, "norm": "group", "upsample": [4, 4]}
PLAIN = "dynamic_network_architectures.architectures.unet.PlainConvUNet"


def vit_net(channels=1, classes=3, sampling=None, **decoder) -> LabelDiffusionNet:
    torch.manual_seed(0)
    net = LabelDiffusionNet(channels, classes, VIT, DECODER | decoder, sampling or {})
    return wake(net).eval()


def planned_net(ndim=2, classes=3, **decoder) -> LabelDiffusionNet:
    torch.manual_seed(0)
    base = {
        "n_stages": 3,
        "features_per_stage": [4, 4, 8],
        "conv_op": getattr(torch.nn, f"Conv{ndim}d"),
        "kernel_sizes": [[3] * ndim] * 3,
        "strides": [[1] * ndim, [2] * ndim, [1] + [2] * (ndim - 1)],
        "n_conv_per_stage": 1,
        "n_conv_per_stage_decoder": 1,
        "norm_op": getattr(torch.nn, f"InstanceNorm{ndim}d"),
        "norm_op_kwargs": {"affine": True},
        "nonlin": torch.nn.LeakyReLU,
    }
    encoder = {"kind": "plan", "base": PLAIN, "stages": [0, 1, 2], "cell": [2] * ndim}
    shape = {**DECODER, "upsample": [2] * ndim, **decoder}
    return wake(LabelDiffusionNet(1, classes, encoder, shape, {}, **base)).eval()


def wake(net: LabelDiffusionNet) -> LabelDiffusionNet:
    """Let time reach the output: FiLM starts as identity."""
    for module in net.modules():
        if isinstance(module, FiLM):
            torch.nn.init.normal_(module.linear.weight, std=0.1)
    return net


def inputs(net, size=(64, 64), count=2, classes=3, channels=1):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, channels, *size, generator=generator)
    label = torch.randint(0, classes, (count, 1, *[-(-n // 8) for n in size]), generator=generator)
    label = F.interpolate(label.float(), size=size).long()
    t = torch.linspace(0.1, 0.6, count)
    return x, {"label": label, "t": t, "noise": torch.randn(count, *net.latent_shape(size), generator=generator)}


# ---------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", [(64, 64), (60, 107), (32, 32), (125, 125)])  # an eighth of 480 x 854, half of 250
def test_logits_have_the_images_size_whatever_it_is(size):
    net = vit_net()
    x, given = inputs(net, size)
    with torch.no_grad():
        assert net(x).shape == (2, 3, *size)
        out = net(x, **given)
    grid = tuple(-(-n // 16) for n in size)
    assert out.logits.shape == out.aux[0].shape == (2, 3, *size)
    assert out.cells.shape == (2, *grid)
    assert out.embedding.shape == (2, 8, *grid)


@pytest.mark.parametrize("size", [(8, 16, 16), (7, 13, 16)])
def test_three_dimensions_work_the_same(size):
    net = planned_net(3)
    x, given = inputs(net, size)
    with torch.no_grad():
        assert net(x).shape == net(x, **given).logits.shape == (2, 3, *size)


def test_padding_is_at_the_end_and_marks_labels_as_unknown():
    padded = pad_to_multiple(torch.ones(1, 1, 5, 4), (4, 4), 3)
    assert padded.shape == (1, 1, 8, 4)
    assert (padded[..., :5, :] == 1).all()
    assert (padded[..., 5:, :] == 3).all()
    net = vit_net()
    x, given = inputs(net, (20, 32))
    given["label"].zero_()
    assert net(x, **given).cells[0].tolist() == [[0, 0], [3, 3]]


# ---------------------------------------------------------------------------------------------------- labels


def test_interior_cells_of_a_class_have_one_embedding():
    net = vit_net()
    x, given = inputs(net, (128, 128))
    given["label"].zero_()
    given["label"][..., 80:] = 1
    embedding = net(x, **given).embedding[0]
    inside = embedding[:, 1:-1, 1:4].flatten(1)
    torch.testing.assert_close(inside, inside[:, :1].expand_as(inside))
    assert (embedding[:, 3, 2] - embedding[:, 3, 6]).norm() > 0.01  # another class
    assert (embedding[:, 3, 2] - embedding[:, 3, 4]).norm() > 1e-3  # a neighbor of the boundary
    assert torch.allclose(embedding.norm(dim=0), torch.ones(8, 8), atol=1e-5)


@pytest.mark.parametrize("down", ["nearest", "area"])
def test_cells_take_their_centers_label_or_the_shares_of_their_voxels(down):
    net = vit_net(label_down=down)
    label = torch.zeros(1, 1, 32, 32, dtype=torch.int64)
    label[..., 8, 8] = 1  # one center
    label[..., 16:, 16:24] = 2  # half a cell, left of its center
    shares, cells = net._cells(label)
    assert torch.allclose(shares.sum(1), torch.ones(1, 2, 2))
    if down == "nearest":
        assert cells[0].tolist() == [[1, 0], [0, 0]]
    else:
        assert cells[0, 0, 0] == 0
        assert shares[0, :, 0, 0].tolist() == [255 / 256, 1 / 256, 0, 0]
        assert shares[0, :, 1, 1].tolist() == [0.5, 0, 0.5, 0]


def test_codes_lie_within_the_scale_and_carry_it_into_z_t():
    """With no noise and t near 0, the decoder's z_t is the scaled code."""
    net, seen = vit_net(scale=0.3), []
    net.interaction.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    x, given = inputs(net)
    net(x, **(given | {"t": torch.zeros(2), "noise": torch.zeros_like(given["noise"])}))
    code = net.label_encoder(net._cells(given["label"])[0])
    assert code.abs().max() < 1
    torch.testing.assert_close(seen[0], 0.3 * code, rtol=1e-4, atol=1e-6)


def test_without_diffusion_the_decoder_sees_zeros_and_no_label():
    net = vit_net(diffusion=False)
    x, given = inputs(net)
    other = given | {"label": (given["label"] + 1) % 3, "noise": torch.zeros_like(given["noise"])}
    assert torch.equal(net(x, **given).logits, net(x, **other).logits)
    assert torch.equal(net(x), net(x, sampling=LabelSampling(steps=7, seed=3)))


def test_label_and_time_reach_the_logits():
    net = vit_net(scale=1.0)
    x, given = inputs(net)
    logits = net(x, **given).logits
    for changed in ({"label": (given["label"] + 1) % 3}, {"t": given["t"] + 0.3}, {"noise": -given["noise"]}):
        assert (net(x, **(given | changed)).logits - logits).abs().max() > 1e-4


def test_what_touches_the_noised_label_runs_in_single_precision():
    net, kinds = vit_net(), {}
    for name in ("label_encoder.mix", "interaction.fuse.0", "time_embedding.mlp.2", "projector.0"):
        module = net.get_submodule(name)
        module.register_forward_hook(lambda _, __, out, name=name: kinds.update({name: out.dtype}))
    x, given = inputs(net)
    with torch.autocast("cpu", torch.bfloat16):
        net(x, **given)
    assert kinds == dict.fromkeys(kinds, torch.float32)
    assert len(kinds) == 4


# -------------------------------------------------------------------------------------------------- sampling


def test_sampling_repeats_and_depends_on_its_seed_alone():
    net = vit_net()
    x, _ = inputs(net)
    with torch.no_grad():
        first = net(x)
        torch.randn(7)
        assert torch.equal(net(x), first)
        torch.testing.assert_close(net(x[1:]), first[1:], rtol=1e-4, atol=1e-5)  # wherever an item stands
        assert not torch.equal(net(x, sampling=LabelSampling(seed=1)), first)
    state = torch.random.get_rng_state()
    net(x)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("steps", [1, 3])
def test_sampling_is_algorithm_2(steps):
    """Written out once more, on the network's parts."""
    net = vit_net(scale=0.5)
    x, _ = inputs(net)
    with torch.no_grad():
        features = [conv(level) for conv, level in zip(net.lateral, net.visual(x), strict=True)]
        visual = [b[1](b[0](level)) for b, level in zip(net.branches, features, strict=True)]
        m = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
        for t0, t1 in step_pairs(steps):
            g0, g1 = (
                1 / (1 + max(torch.tan(torch.tensor(torch.pi / 2 * (t + 2e-4) / 1.00025)).item() ** 2, 1e-5))
                for t in (t0, t1)
            )
            logits = net._decode(m, torch.full((2,), t0), features, visual)
            y = F.avg_pool2d(logits.softmax(1), 4).argmax(1)
            z = 0.5 * net.label_encoder(F.one_hot(y, 4).movedim(-1, 1).float())
            eps = (m - g0**0.5 * z) / (1 - g0) ** 0.5
            m = g1**0.5 * z + (1 - g1) ** 0.5 * eps
        expected = F.interpolate(logits, size=(64, 64), mode="bilinear")
        torch.testing.assert_close(net(x, sampling=LabelSampling(steps=steps)), expected, rtol=1e-3, atol=1e-4)


def test_random_starts_are_averaged_and_steps_accumulated():
    net = vit_net(scale=1.0)
    x, _ = inputs(net)
    with torch.no_grad():
        averaged = net(x, sampling=LabelSampling(starts=3))
        noise = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
        single = []
        for start in noise:
            original = torch.randn
            torch.randn = lambda *_, start=start, **__: start[None].clone()
            try:
                single.append(net(x, sampling=LabelSampling(starts=1)))
            finally:
                torch.randn = original
        torch.testing.assert_close(averaged, torch.stack(single).mean(0), rtol=1e-4, atol=1e-5)
        accumulated = net(x, sampling=LabelSampling(accumulate=True))
    assert torch.allclose(accumulated.exp().sum(1), torch.ones(2, 64, 64), atol=1e-4)
    assert not torch.allclose(accumulated.softmax(1), net(x).softmax(1), atol=1e-4)


@pytest.mark.parametrize("change", [{"intermediate_stride": "coarse"}, {"reencode": "soft"}, {"difference": 0.0}])
def test_choices_of_sampling_change_the_result(change):
    net = vit_net(scale=1.0)
    x, _ = inputs(net)
    with torch.no_grad():
        assert not torch.equal(net(x, sampling=replace(net.sampling, **change)), net(x))
        once = LabelSampling(steps=1)
        assert torch.equal(net(x, sampling=replace(once, **change)), net(x, sampling=once))  # nothing comes after


def test_a_blank_pass_sees_zeros():
    net, seen = vit_net(), []
    net.interaction.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    net(inputs(net)[0], sampling=LabelSampling(blank=True))
    assert len(seen) == 1
    assert not seen[0].any()


# --------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
@pytest.mark.parametrize(("aux", "heads"), [("joint", 1), ("per_level", 4), ("none", 0)])
def test_every_parameter_learns_whatever_is_chosen(norm, aux, heads):
    net = vit_net(norm=norm, aux=aux, level_fusion="softmax" if aux == "joint" else "sigmoid", scale=1.0).train()
    x, given = inputs(net)
    out = net(x, **given, predicted=True)
    assert len(out.aux) == heads
    loss = out.logits.square().mean() + out.embedding.square()[:, 0].mean() + out.predicted.square()[:, 1].mean()
    (loss + sum(a.square().mean() for a in out.aux)).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


def test_embeddings_of_the_label_never_reach_the_image_path_and_predicted_ones_do():
    net = vit_net()
    x, given = inputs(net)
    out = net(x, **given, predicted=True)
    visual = [p for n, p in net.named_parameters() if n.startswith(("visual", "lateral", "branches", "prediction"))]
    own = torch.autograd.grad(out.embedding[:, 0].sum(), visual, retain_graph=True, allow_unused=True)
    assert all(g is None for g in own)
    predicted = torch.autograd.grad(out.predicted[:, 0].sum(), visual, allow_unused=True)
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in predicted) > len(visual) / 2


def test_the_segmentation_loss_reaches_the_label_encoder():
    net = vit_net()
    x, given = inputs(net)
    net(x, **given).logits.square().mean().backward()
    assert net.label_encoder.table.weight.grad[:, :3].abs().sum() > 0
    assert net.label_encoder.table.weight.grad[:, 3].abs().sum() == 0  # no unknown voxel in this batch


def test_four_images_are_overfitted():
    """The tiny ViT learns four images of bars by heart; a single step from noise recalls them."""
    torch.manual_seed(0)
    net = LabelDiffusionNet(1, 3, VIT, DECODER | {"width": 32, "norm": "batch"}, {"steps": 1}).train()
    label = torch.zeros(4, 1, 64, 64, dtype=torch.int64)
    for i in range(4):
        label[i, :, :, 16 * i : 16 * i + 16] = 1
        label[i, :, 16 * i : 16 * i + 16] = 2
    x = label.float() + 0.3 * torch.randn(4, 1, 64, 64)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        out = net(x, label=label, t=torch.rand(4), noise=torch.randn(4, *net.latent_shape((64, 64))))
        loss = F.cross_entropy(out.logits, label[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (net.eval()(x).argmax(1) == label[:, 0]).float().mean()
    assert accuracy > 0.9, (accuracy, loss)


def test_unknown_parts_and_half_given_arguments_are_refused():
    with pytest.raises(ValueError, match="norm"):
        DecoderShape(16, 8, "layer", [4, 4])
    with pytest.raises(ValueError, match="multiple of 4"):
        DecoderShape(18, 8, "batch", [4, 4])
    for wrong in ({"reencode": "both"}, {"steps": 0}):
        with pytest.raises(ValueError, match=r"reencode|steps"):
            LabelSampling(**wrong)
    net = vit_net()
    x, given = inputs(net)
    with pytest.raises(ValueError, match="together"):
        net(x, label=given["label"])
