"""Diff-VNet: the planned network inside, published sizes, time conditioning, and who keeps whose statistics."""

import copy

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnssl.errors import UserError
from nnssl.networks.diff_vnet import PlannedDiffVNet
from nnssl.networks.diff_vnet_paper import DiffVNet
from nnssl.networks.planned import set_dropout

PLANNED, PAPER = "nnssl.networks.diff_vnet.PlannedDiffVNet", "nnssl.networks.diff_vnet_paper.DiffVNet"
K = 3


def image(ndim: int, channels: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, channels, *[16] * ndim, generator=torch.Generator().manual_seed(seed))


def small(ndim: int = 2, **kwargs) -> DiffVNet:
    torch.manual_seed(0)
    return DiffVNet(1, K, n_filters=2, ndim=ndim, **kwargs)


def steps(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def randomize_films(network: PlannedDiffVNet) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for film in network.films:
            film.linear.weight.copy_(torch.randn(film.linear.weight.shape, generator=generator) * 0.05)


@pytest.fixture
def planned(plan, build):
    """Return (stock network, Diff-VNet, number of axes) of one plan and seed."""
    base, kwargs, ndim = plan
    return build(base, kwargs), build(PLANNED, {"base": base, **kwargs}), ndim


# ------------------------------------------------------------------------------------------- on the plan's topology


def test_image_stem_encoder_and_theta_are_the_planned_network(planned):
    stock, ours, ndim = planned
    theirs, state = stock.state_dict(), ours.state_dict()
    assert set(theirs) < set(state)
    assert all(torch.equal(value, state[key]) for key, value in theirs.items())
    assert torch.equal(ours(image(ndim)), stock(image(ndim)))


def test_prediction_runs_what_the_planned_network_runs_and_nothing_else(planned):
    stock, ours, ndim = planned
    flops = []
    for network in (stock, ours):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(image(ndim))
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]
    ran = set()
    for name, module in ours.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.add(name.split(".")[0]))
    ours(image(ndim))
    assert ran - {""} == {"encoder", "decoder"}


def test_deep_supervision_is_switched_for_all_decoders_at_once(plan, build):
    base, kwargs, ndim = plan
    network, x, noisy = build(PLANNED, {"base": base, **kwargs}, deep_supervision=True), image(ndim), image(ndim, K)
    for enabled in (True, False):
        network.decoder.deep_supervision = enabled
        outputs = [network(x), network(x, decoder="psi"), network(x, decoder="xi", noisy=noisy, t=steps(1, 2))]
        assert all(isinstance(output, list) == enabled for output in outputs)
        theta, psi = network(x, decoder="both")
        assert isinstance(theta, list) == enabled
        assert psi.shape == (2, K, *[16] * ndim)


def test_both_decoders_at_once_give_what_they_give_alone_without_gradient_for_psi(planned):
    _, network, ndim = planned
    theta, psi = network(image(ndim), decoder="both")
    torch.testing.assert_close(theta, network(image(ndim)))
    torch.testing.assert_close(psi, network(image(ndim), decoder="psi"))
    assert theta.requires_grad
    assert not psi.requires_grad


def test_each_decoder_has_weights_of_its_own_until_they_share_their_start(planned):
    _, network, ndim = planned
    assert not torch.equal(*network(image(ndim), decoder="both"))
    network.share_start()
    assert torch.equal(*network(image(ndim), decoder="both"))
    stored = {p.data_ptr() for p in network.parameters()}
    assert len(stored) == len(list(network.parameters()))
    own = len([name for name, _ in network.decoder.named_parameters() if not name.startswith("encoder.")])
    assert len(list(network.matched_parameters())) == own


def test_time_reaches_the_output_of_xi_and_image_passes_never_see_it(planned):
    _, network, ndim = planned
    x, noisy = image(ndim), image(ndim, K)
    before = network(x)
    start = [network(x, decoder="xi", noisy=noisy, t=steps(t, t)) for t in (3, 900)]
    assert torch.equal(*start)  # FiLM starts as the identity
    randomize_films(network)
    early, late = (network(x, decoder="xi", noisy=noisy, t=steps(t, t)) for t in (3, 900))
    assert (early - late).norm() / early.norm() > 1e-3
    torch.testing.assert_close(
        network(x, decoder="xi", noisy=noisy, t=steps(3, 900)), torch.stack((early[0], late[1])), rtol=1e-3, atol=1e-4
    )
    assert torch.equal(network(x), before)


def test_xi_sees_image_and_noisy_label(planned):
    _, network, ndim = planned

    def xi(x, noisy):
        return network(x, decoder="xi", noisy=noisy, t=steps(5, 5))

    x, noisy = image(ndim), image(ndim, K)
    assert not torch.allclose(xi(x, noisy), xi(x + image(ndim, seed=3), noisy))
    assert not torch.allclose(xi(x, noisy), xi(x, noisy + image(ndim, K, seed=3)))


def test_every_site_of_the_embedding_learns(planned):
    _, network, ndim = planned
    for module in network.modules():
        if isinstance(module, nn.InstanceNorm2d | nn.InstanceNorm3d):
            nn.init.ones_(module.weight)  # nnU-Net starts residual blocks at zero
    network(image(ndim), decoder="xi", noisy=image(ndim, K), t=steps(3, 900)).square().mean().backward()
    assert all(film.linear.weight.grad.abs().sum() > 0 for film in network.films)


# ------------------------------------------------------------------------------------------------- the paper's V-Net

#: Linear layers of the authors' code that never run: the last stage of every block, both stems; one whole embedding.
DEAD = 513 * (64 + 128 + 256 + 512 + 256 + 128 + 64 + 32 + 2 * 32) + 129 * 512 + 513 * 512


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(("classes", "published"), [(2, 57.892), (14, 57.903)])
def test_published_parameter_counts(classes, published):
    with torch.device("meta"):
        network = DiffVNet(1, classes)
    assert round(DEAD / 1e6, 2) == 1.10
    assert round((count(network) + DEAD) / 1e6, 3) == published
    for part, size in (("encoder", 31.43), ("xi", 9.20), ("psi", 8.28), ("theta", 8.28)):
        dead = {"encoder": 513 * (64 + 128 + 256 + 512), "xi": 513 * (256 + 128 + 64 + 32)}.get(part, 0)
        assert round((count(getattr(network, part)) + dead) / 1e6, 2) == size, part
    stem = 513 * 32 + 129 * 512 + 513 * 512  # of the code's image stem, which carries an embedding it never uses
    inference = count(network.image_stem, network.encoder, network.theta) + stem + 513 * (64 + 128 + 256 + 512)
    assert round(inference / 1e6, 2) == 40.06
    sites = count(*(block.sites for block in network.encoder.blocks))
    assert round((count(network.image_stem, network.encoder, network.theta) - sites) / 1e6, 1) == 37.8  # executed


def test_the_embedding_enters_at_the_published_sites():
    network = small()
    assert sum(len(block.sites) for block in network.encoder.blocks) == 11
    assert [sum(len(b.sites) for b in d.blocks) for d in (network.xi, network.psi, network.theta)] == [9, 0, 0]


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_papers_network_builds_from_a_plan_and_its_time_reaches_the_output(ndim):
    torch.manual_seed(0)
    kwargs = {"n_filters": 2, "ndim": ndim}
    network = get_network_from_plans(PAPER, kwargs, [], 1, K, deep_supervision=True).eval()
    x, noisy = image(ndim), image(ndim, K)
    assert network(x).shape == (2, K, *[16] * ndim)
    early, late = (network(x, decoder="xi", noisy=noisy, t=steps(t, t)) for t in (3, 900))
    assert (early - late).norm() / early.norm() > 1e-3


def test_a_stage_is_convolution_relu_norm_dropout_in_this_order():
    stage = small().train().image_stem
    x = image(2)
    torch.manual_seed(4)
    expected = stage.dropout(stage.unit.norm(stage.unit.conv(x).clamp_min(0)))
    torch.manual_seed(4)
    assert torch.equal(stage(x), expected)
    assert stage.dropout.p == 0.1


def test_dropout_tells_the_passes_of_psi_and_theta_apart():
    network = small().train()
    network.share_start()
    assert not torch.equal(*network(image(2), decoder="both"))
    network = small(dropout=False).train()
    network.share_start()
    assert torch.equal(*network(image(2), decoder="both"))


def test_planned_dropout_tells_them_apart_too(plan, build):
    base, kwargs, ndim = plan
    configuration = {
        "patch_size": [16] * ndim,
        "architecture": {"network_class_name": base, "arch_kwargs": kwargs, "_kw_requires_import": []},
    }
    set_dropout(configuration, 0.5)
    for arguments, alike in ((kwargs, True), (configuration["architecture"]["arch_kwargs"], False)):
        network = build(PLANNED, {"base": base, **arguments}).train()
        network.share_start()
        drawn = []
        network.encoder.stages[0].register_forward_hook(lambda module, given, features, drawn=drawn: drawn.append(1))
        theta, psi = network(image(ndim), decoder="both")
        assert torch.equal(theta, psi) == alike
        assert len(drawn) == (1 if alike else 2)  # psi's pass draws features of its own


def statistics(network: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in network.state_dict().items() if "running" in k or "tracked" in k}


def moved(network: nn.Module, run) -> set[str]:
    """Return which parts' running statistics a pass moves."""
    before = statistics(network)
    run(network)
    return {k.split(".")[0] for k, v in statistics(network).items() if not torch.equal(v, before[k])}


PASSES = {
    "theta": (lambda n: n(image(2)), {"image_stem", "encoder", "theta"}),
    "psi": (lambda n: n(image(2), decoder="psi"), {"image_stem", "encoder", "psi"}),
    "xi": (lambda n: n(image(2), decoder="xi", noisy=image(2, K), t=steps(1, 2)), {"diffusion_stem", "encoder", "xi"}),
}


@pytest.mark.parametrize("name", PASSES)
def test_batch_statistics_are_those_of_image_passes_with_gradient(name):
    run, parts = PASSES[name]

    def without_gradient(network):
        with torch.no_grad():
            run(network)

    assert moved(small().train(), run) == (parts if name != "xi" else set())
    assert moved(small().train(), without_gradient) == set()
    coded = small(batch_statistics="all").train()
    assert moved(coded, run) == moved(coded, without_gradient) == parts


def test_psi_beside_theta_moves_no_statistics():
    network = small().train()
    assert moved(network, lambda n: n(image(2), decoder="both")) == {"image_stem", "encoder", "theta"}
    assert all(m.track_running_stats for m in network.modules() if isinstance(m, nn.BatchNorm2d))


def test_diffusion_passes_see_the_batchs_own_statistics_in_evaluation_too():
    network, run = small(dropout=False), PASSES["xi"][0]
    torch.testing.assert_close(run(network.train()), run(network.eval()))
    assert not any(m.training for m in network.modules())


def test_a_plan_with_batch_norm_keeps_its_statistics_too(build):
    kwargs = {
        "n_stages": 2,
        "features_per_stage": [4, 8],
        "conv_op": "torch.nn.modules.conv.Conv2d",
        "kernel_sizes": [[3, 3]] * 2,
        "strides": [[1, 1], [2, 2]],
        "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.batchnorm.BatchNorm2d",
        "norm_op_kwargs": {},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    base = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    network = build(PLANNED, {"base": base, **kwargs})
    assert moved(network, PASSES["xi"][0]) == set()
    assert moved(network, PASSES["theta"][0]) == {"encoder", "decoder"}


def test_misuse_is_refused(plan, build):
    base, kwargs, ndim = plan
    network, x = build(PLANNED, {"base": base, **kwargs}), image(ndim)
    for wrong in ({"decoder": "phi"}, {"decoder": "xi"}, {"noisy": image(ndim, K)}, {"t": steps(1, 1)}):
        with pytest.raises(ValueError, match="decoder must be one of"):
            network(x, **wrong)
    with pytest.raises(UserError, match="divisible by 16"):
        small()(torch.zeros(1, 1, 24, 24))
    with pytest.raises(UserError):
        DiffVNet(1, 2, ndim=4)
    with pytest.raises(UserError):
        PlannedDiffVNet(1, 2, base="torch.nn.Linear", **copy.deepcopy(kwargs))
