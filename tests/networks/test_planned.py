"""The planned network with added parts: equal to the planned one without them, conditioned on time with them."""

import copy

import pytest
import torch
from dynamic_network_architectures.building_blocks.residual import BasicBlockD
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU

from nnssl.errors import UserError
from nnssl.networks.planned import PlannedUNet, choose_hfm_stage, set_dropout

PLANNED = "nnssl.networks.planned.PlannedUNet"


def image(ndim: int, channels: int = 1) -> torch.Tensor:
    return torch.randn(2, channels, *[16] * ndim, generator=torch.Generator().manual_seed(1))


def randomize_films(network: PlannedUNet) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for film in network.films:
            film.linear.weight.copy_(torch.randn(film.linear.weight.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_equals_planned_network_bit_for_bit(plan, build, deep_supervision):
    base, kwargs, ndim = plan
    stock = build(base, kwargs, deep_supervision=deep_supervision)
    state_after_stock = torch.get_rng_state()
    ours = build(PLANNED, {"base": base, **kwargs}, deep_supervision=deep_supervision)
    assert torch.equal(torch.get_rng_state(), state_after_stock)
    theirs = stock.state_dict()
    assert list(ours.state_dict()) == list(theirs)
    assert all(torch.equal(v, theirs[k]) for k, v in ours.state_dict().items())
    expected, got = stock(image(ndim)), ours(image(ndim))
    if deep_supervision:
        assert isinstance(got, list)
        assert len(got) == len(expected) == 2
    else:
        expected, got = [expected], [got]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_gradients_equal_planned_network(plan, build):
    base, kwargs, ndim = plan
    networks = [build(base, kwargs), build(PLANNED, {"base": base, **kwargs})]
    for network in networks:
        network(image(ndim))[:, 1].square().mean().backward()
    pairs = zip(*[n.parameters() for n in networks], strict=True)
    assert all((a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad) for a, b in pairs)


def test_added_parts_leave_the_planned_weights_alone(plan, build):
    base, kwargs, _ = plan
    plain = build(PLANNED, {"base": base, **kwargs}).state_dict()
    full = build(PLANNED, {"base": base, "conditioning": True, "hfm": {"stages": [1]}, **kwargs}).state_dict()
    assert set(plain) < set(full)
    assert all(torch.equal(v, full[k]) for k, v in plain.items())


def test_deep_supervision_toggle_reaches_the_output(plan, build):
    base, kwargs, ndim = plan
    network = build(PLANNED, {"base": base, **kwargs}, deep_supervision=True)
    network.decoder.deep_supervision = False
    assert isinstance(network(image(ndim)), torch.Tensor)


def test_features_are_the_input_of_the_last_segmentation_layer(plan, build):
    base, kwargs, ndim = plan
    network = build(PLANNED, {"base": base, **kwargs}, deep_supervision=True)
    output, features = network(image(ndim), features=True)
    assert features.shape == (2, network.feature_channels, *[16] * ndim)
    assert torch.equal(network.decoder.seg_layers[-1](features), output[0])


def test_conditioning_is_identity_at_first_and_depends_on_time_later(plan, build):
    base, kwargs, ndim = plan
    network = build(PLANNED, {"base": base, "conditioning": True, **kwargs})
    x, early, late = image(ndim), torch.tensor([3, 3]), torch.tensor([900, 900])
    assert torch.equal(network(x, t=early), network(x))
    randomize_films(network)
    outputs = [network(x, t=t) for t in (early, late)]
    change = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert change > 1e-2  # an additive embedding before InstanceNorm moves the output by 1e-6
    mixed = network(x, t=torch.tensor([3, 900]))
    torch.testing.assert_close(mixed, torch.stack((outputs[0][0], outputs[1][1])))


def test_every_norm_of_the_conv_blocks_is_a_film_site(plan, build):
    base, kwargs, ndim = plan
    network = build(PLANNED, {"base": base, "conditioning": True, **kwargs})
    randomize_films(network)
    for module in network.modules():  # the last norm of a residual block starts at zero and would hide the first
        if isinstance(module, torch.nn.modules.instancenorm._InstanceNorm) and module.affine:
            torch.nn.init.ones_(module.weight)
    network(image(ndim), t=torch.tensor([3, 7])).square().mean().backward()
    # plain: 1 + 2 + 2 encoder convs; residual: stem + two convs in each of 1 + 2 + 2 blocks; decoder: 1 + 2
    assert len(network.films) == (3 + 5 if "PlainConv" in base else 3 + 11)
    assert all(film.linear.weight.grad.abs().sum() > 0 for film in network.films)


def test_time_without_conditioning_is_refused(plan, build):
    base, kwargs, ndim = plan
    with pytest.raises(ValueError, match="without conditioning"):
        build(PLANNED, {"base": base, **kwargs})(image(ndim), t=torch.tensor([1, 1]))


def test_hfm_feeds_skip_and_next_stage(plan, build):
    base, kwargs, ndim = plan
    network = build(PLANNED, {"base": base, "hfm": {"stages": [1], "threshold": 0.6}, **kwargs})
    without = build(PLANNED, {"base": base, **kwargs})
    x = image(ndim)
    ours, plain = network._encode(x, None), without._encode(x, None)
    assert torch.equal(ours[0], plain[0])
    torch.testing.assert_close(ours[1], network.hfm["1"](plain[1]))
    torch.testing.assert_close(ours[2], network.encoder.stages[2](ours[1]))


def test_deep_copy_gives_the_same_output(plan, build):
    base, kwargs, ndim = plan
    network = build(PLANNED, {"base": base, "conditioning": True, "hfm": {"stages": [1]}, **kwargs})
    x, t = image(ndim), torch.tensor([1, 5])
    assert torch.equal(copy.deepcopy(network)(x, t=t), network(x, t=t))


def test_activation_checkpointing_gives_the_same_gradients(plan, build):
    base, kwargs, ndim = plan
    network = build(PLANNED, {"base": base, "conditioning": True, "hfm": {"stages": [1]}, **kwargs})
    x, t = image(ndim), torch.tensor([1, 5])
    gradients = []
    for checkpointed in (False, True):
        network.zero_grad()
        if checkpointed:
            output = torch.utils.checkpoint.checkpoint(network, x, t, use_reentrant=False)
        else:
            output = network(x, t)
        output.square().mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    "wrong",
    [
        {"base": "torch.nn.Linear"},
        {"base": "no.such.Class"},
        {"hfm": {"stages": [9]}},
        {"hfm": {"stages": [1], "treshold": 0.5}},
        {"hfm": {"stages": [1], "mask": "round"}},
        {"hfm": {"stages": [1], "mode": "inline"}},
        {"conditioning": True, "norm_op": None},
    ],
)
def test_wrong_architecture_is_refused(plan, build, wrong):
    base, kwargs, _ = plan
    with pytest.raises(UserError):
        build(PLANNED, {"base": base, **kwargs, **wrong})


def test_hfm_stage_of_published_patches():
    strides_3d = [[1, 1, 1]] + [[2, 2, 2]] * 5
    assert choose_hfm_stage((112, 112, 80), strides_3d) == 3  # 14 x 14 x 10
    assert choose_hfm_stage((96, 96, 96), strides_3d) == 3  # 12 x 12 x 12
    assert choose_hfm_stage((160, 160), [[1, 1]] + [[2, 2]] * 5) == 4  # 10 x 10
    assert choose_hfm_stage((6, 6), [[1, 1], [2, 2]]) == 1  # nothing large enough: the deepest


def test_dropout_changes_the_plan_and_not_the_weights(plan, build):
    """Every block has one of its own, the starting weights stay, a network in evaluation mode is unchanged."""
    base, kwargs, ndim = plan
    configuration = {
        "patch_size": [16] * ndim,
        "architecture": {"network_class_name": base, "arch_kwargs": kwargs, "_kw_requires_import": ["conv_op"]},
    }
    given = copy.deepcopy(kwargs)
    set_dropout(configuration, 0.3)
    once = copy.deepcopy(configuration)
    set_dropout(configuration, 0.3)
    assert configuration == once
    assert kwargs == given  # the plan's own arguments are not written to
    assert once["architecture"]["_kw_requires_import"] == ["conv_op", "dropout_op"]
    stock, ours = build(base, kwargs), build(base, once["architecture"]["arch_kwargs"])
    layers = [m for m in ours.modules() if isinstance(m, (torch.nn.Dropout2d, torch.nn.Dropout3d))]
    blocks = [m for m in ours.modules() if isinstance(m, ConvDropoutNormReLU)]
    # the second convolution of a residual block and the projection of its skip have none by nnU-Net's design
    residual = [m for m in ours.modules() if isinstance(m, BasicBlockD)]
    projections = [s for m in residual if isinstance(m.skip, torch.nn.Module) for s in m.skip.modules()]
    exempt = [*(m.conv2 for m in residual), *projections]
    having = [m for m in blocks if not any(m is e for e in exempt)]
    assert all(hasattr(m, "dropout") for m in having)
    assert len(layers) == len(having) > 0
    assert {type(m) for m in layers} == {torch.nn.Dropout2d if ndim == 2 else torch.nn.Dropout3d}
    assert {m.p for m in layers} == {0.3}
    # names differ: the norm is the third layer of its block instead of the second
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True))
    x = image(ndim)
    assert not torch.equal(ours(x), ours(x))
    assert torch.equal(ours.eval()(x), stock.eval()(x))
