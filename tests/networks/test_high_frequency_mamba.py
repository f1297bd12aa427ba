"""Laws of the high-pass filter and of the three-direction scan, and the published parameter counts."""

import copy

import numpy as np
import pytest
import torch
from dynamic_network_architectures.initialization.weight_init import InitWeights_He

from nnssl.errors import UserError
from nnssl.networks.high_frequency_mamba import (
    HighFrequencyMamba,
    HighPass,
    ThreeDirectionMamba,
    high_pass_mask,
    no_weight_decay_parameters,
    slice_order,
)

GRIDS = [(8, 8), (7, 5), (8, 7), (1, 9), (6, 4, 8), (7, 7, 5), (6, 5, 4), (5, 4, 6)]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("kind", ["radial", "box", "ratio"])
@pytest.mark.parametrize("shape", GRIDS)
def test_high_pass_laws(shape, kind):
    filter_ = HighPass(0.6, kind)
    x, y = random(2, 3, *shape), random(2, 3, *shape, seed=1)
    out = filter_(x)
    assert out.dtype == torch.float64
    assert out.shape == x.shape
    assert filter_(torch.full_like(x, 3.0)).abs().max() < 1e-12
    torch.testing.assert_close(filter_(2 * x - 3 * y), 2 * out - 3 * filter_(y), rtol=0, atol=1e-12)
    torch.testing.assert_close(filter_(out), out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", GRIDS)
def test_high_pass_equals_shifted_full_transform(shape):
    """Centered mask on the full, shifted spectrum: its result is real and ours."""
    x = random(1, 1, *shape)
    axes = [np.fft.fftshift(2 * np.fft.fftfreq(n)) for n in shape]
    radius = np.sqrt(sum(g**2 for g in np.meshgrid(*axes, indexing="ij")))
    spectrum = np.fft.fftshift(np.fft.fftn(x[0, 0].numpy())) * (radius >= 0.7 - 1e-9)
    expected = np.fft.ifftn(np.fft.ifftshift(spectrum))
    assert np.abs(expected.imag).max() < 1e-12
    np.testing.assert_allclose(HighPass(0.7)(x)[0, 0].numpy(), expected.real, atol=1e-12)


@pytest.mark.parametrize("kind", ["radial", "box", "ratio"])
def test_threshold_zero_keeps_everything(kind):
    x = random(1, 2, 7, 6) + 5
    torch.testing.assert_close(HighPass(0.0, kind)(x), x, rtol=0, atol=1e-12)


def full_fraction(shape, threshold, kind):
    """Fraction of the full spectrum that is kept (the half grid counts its inner columns twice)."""
    mask = high_pass_mask(shape, threshold, kind)
    weight = torch.full((mask.shape[-1],), 2.0)
    weight[0] = 1
    if shape[-1] % 2 == 0:
        weight[-1] = 1
    return (mask * weight).sum().item() / np.prod(shape)


@pytest.mark.parametrize(
    ("kind", "kept"),
    [("radial", (0.93, 0.89, 0.82, 0.73)), ("box", (0.88, 0.79, 0.71, 0.57)), ("ratio", (0.57, 0.44, 0.22, 0.22))],
)
def test_kept_fraction_on_the_la_grid(kind, kept):
    fractions = [full_fraction((14, 14, 10), t, kind) for t in (0.5, 0.6, 0.7, 0.8)]
    np.testing.assert_allclose(fractions, kept, atol=0.0125)


def test_masks_follow_the_input_shape():
    filter_ = HighPass(0.5)
    for shape in ((8, 8), (12, 10), (8, 8)):
        assert filter_(random(1, 1, *shape)).shape[2:] == shape
    assert len(filter_._masks) == 2


def test_a_mask_made_while_predicting_serves_training():
    filter_, x = HighPass(0.5), random(1, 1, 8, 8)
    with torch.inference_mode():
        filter_(x)
    filter_(x.requires_grad_()).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_unknown_options_are_refused():
    with pytest.raises(UserError):
        HighPass(0.5, "round")
    with pytest.raises(UserError):
        HighPass(-0.1)
    with pytest.raises(UserError):
        HighFrequencyMamba(4, 2, mode="inline")


def test_slice_order_makes_the_first_axis_fastest_and_inverts():
    volume = torch.arange(3 * 4 * 5).view(3, 4, 5)
    tokens = volume.flatten()
    reordered = slice_order(tokens, 3)
    assert torch.equal(reordered, volume.permute(1, 2, 0).flatten())
    assert torch.equal(slice_order(reordered, len(tokens) // 3), tokens)


def mamba(channels=4):
    torch.manual_seed(0)
    return ThreeDirectionMamba(channels).double()


def only_direction(module, index):
    """Silence the other two directions: a convolution of zeros gives a scan of zeros."""
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for other in {0, 1, 2} - {index}:
            twin.conv_weight[other] = 0
            twin.conv_bias[other] = 0
    return twin


def with_weights_of(module, source, target):
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for name in ("conv_weight", "conv_bias", "x_proj", "dt_weight", "dt_bias", "A_log", "D"):
            getattr(twin, name)[target] = getattr(module, name)[source]
    return twin


def test_backward_direction_is_flip_forward_flip():
    module = with_weights_of(mamba(), source=0, target=1)
    tokens = random(12, 2, 4)
    forward, backward = only_direction(module, 0), only_direction(module, 1)
    torch.testing.assert_close(backward(tokens, 3), forward(tokens.flip(0), 3).flip(0), rtol=0, atol=1e-12)


def test_inter_slice_direction_is_forward_on_the_transposed_grid():
    module = with_weights_of(mamba(), source=0, target=2)
    tokens = random(12, 2, 4)
    forward, slices = only_direction(module, 0), only_direction(module, 2)
    expected = slice_order(forward(slice_order(tokens, 3), 3), 4)
    torch.testing.assert_close(slices(tokens, 3), expected, rtol=0, atol=1e-12)


def test_directions_add_up():
    module, tokens = mamba(), random(12, 2, 4)
    total = sum(only_direction(module, i)(tokens, 3) for i in range(3))
    torch.testing.assert_close(module(tokens, 3), total, rtol=0, atol=1e-12)


def test_forward_direction_is_causal_and_backward_anticausal():
    module, tokens = mamba(), random(12, 1, 4)
    changed = tokens.clone()
    changed[7] += 1
    for index, unchanged in ((0, slice(0, 7)), (1, slice(8, 12))):
        direction = only_direction(module, index)
        before, after = direction(tokens, 3), direction(changed, 3)
        assert torch.equal(before[unchanged], after[unchanged])
        assert not torch.allclose(before[7], after[7])


def test_three_directions_against_the_written_out_recurrence():
    """Sum over directions of SiLU(z)-gated scans, each z permuted with its x, in float64."""
    module, tokens, first = mamba(), random(6, 1, 4), 2
    x, z = module.in_proj(tokens)[:, 0].chunk(2, dim=-1)
    orders = [torch.arange(6), torch.arange(6).flip(0), torch.arange(6).view(2, 3).T.flatten()]
    total = torch.zeros_like(x)
    for g, order in enumerate(orders):
        y = written_out_direction(module, g, x[order]) * torch.nn.functional.silu(z[order])
        total[order] += y
    torch.testing.assert_close(module(tokens, first)[:, 0], module.out_proj(total), rtol=0, atol=1e-12)


def written_out_direction(module, g, x):
    silu, softplus = torch.nn.functional.silu, torch.nn.functional.softplus
    padded = torch.cat((x.new_zeros(3, x.shape[1]), x))
    conv = sum(module.conv_weight[g, :, k] * padded[k : k + len(x)] for k in range(4)) + module.conv_bias[g]
    u = silu(conv)
    low, B, C = (u @ module.x_proj[g].T).split((module.rank, 16, 16), dim=1)
    delta = softplus(low @ module.dt_weight[g].T + module.dt_bias[g])
    A, h, y = -module.A_log[g].exp(), torch.zeros(x.shape[1], 16, dtype=x.dtype), []
    for t in range(len(x)):
        h = torch.exp(delta[t, :, None] * A) * h + (delta[t] * u[t])[:, None] * B[t]
        y.append(h @ C[t] + module.D[g] * u[t])
    return torch.stack(y)


@pytest.mark.parametrize(
    ("channels", "scan", "gsc", "mlp"),
    [
        (16, 7_008, 14_400, 1_072),
        (64, 48_768, 229_632, 16_576),
        (128, 152_832, 918_016, 65_920),
        (256, 526_848, 3_671_040, 262_912),
        (320, 796_800, 5_735_680, 410_560),
    ],
)
def test_parameter_counts(channels, scan, gsc, mlp):
    with torch.device("meta"):
        module = HighFrequencyMamba(channels, 3)

    def count(part):
        return sum(p.numel() for p in part.parameters())

    assert (count(module.mamba), count(module.gsc), count(module.mlp)) == (scan, gsc, mlp)
    assert count(module) == scan + gsc + mlp + 4 * channels  # two affine layer norms


@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (4, 6, 5)])
@pytest.mark.parametrize("mode", ["residual", "gated", "replace"])
def test_output_is_finite_under_autocast_with_gradients_everywhere(shape, mode):
    torch.manual_seed(0)
    module = HighFrequencyMamba(8, len(shape), mode=mode)
    module.apply(InitWeights_He(1e-2))
    f = random(2, 8, *shape, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(f)
    assert out.shape == f.shape
    assert torch.isfinite(out).all()
    out.square().sum().backward()
    assert torch.isfinite(f.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    torch.testing.assert_close(out, module(f), rtol=0.1, atol=0.15)


def test_residual_mode_adds_the_input():
    torch.manual_seed(0)
    module, f = HighFrequencyMamba(4, 2), random(1, 4, 8, 8, dtype=torch.float32)
    with_input = module(f)
    module.mode = "replace"
    torch.testing.assert_close(with_input, f + module(f))


def test_state_space_initialization_survives_convolution_initialization():
    torch.manual_seed(0)
    module = HighFrequencyMamba(16, 3)
    before = {k: v.clone() for k, v in module.mamba.state_dict().items()}
    module.apply(InitWeights_He(1e-2))
    assert all(torch.equal(v, before[k]) for k, v in module.mamba.state_dict().items())
    steps = torch.nn.functional.softplus(module.mamba.dt_bias)
    assert steps.min() > 0.9e-3
    assert steps.max() < 0.11
    torch.testing.assert_close(module.mamba.A_log.exp()[1, 5], torch.arange(1.0, 17))


def test_decay_rates_and_direct_paths_are_marked_against_weight_decay():
    module = HighFrequencyMamba(4, 2)
    marked = {n for n, p in module.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"mamba.A_log", "mamba.D"}
    twin = copy.deepcopy(module)
    assert [id(p) for p in no_weight_decay_parameters([twin])] == [id(twin.mamba.A_log), id(twin.mamba.D)]


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_gated_module_starts_as_the_identity_and_its_gate_learns(ndim):
    module, f = HighFrequencyMamba(8, ndim, mode="gated"), torch.randn(2, 8, *[8] * ndim)
    assert torch.equal(module(f), f)
    module(f).square().sum().backward()
    assert module.gate.grad.abs().min() > 0
    module.gate.data.fill_(1.0)
    residual = HighFrequencyMamba(8, ndim, mode="residual")
    residual.load_state_dict({k: v for k, v in module.state_dict().items() if k != "gate"})
    assert torch.allclose(module(f), residual(f))
