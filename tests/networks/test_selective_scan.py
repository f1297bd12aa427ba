"""The scan against a float64 loop, finite differences, and its own second implementation."""

import pytest
import torch
import torch.nn.functional as F

from nnssl.errors import UserError
from nnssl.networks import selective_scan as module
from nnssl.networks.selective_scan import linear_recurrence, selective_scan

STRATEGIES = ("loop", "chunked")
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 36, 37)


def inputs(batch=2, groups=3, d=4, n=5, length=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    wide = groups * d
    return {
        "u": normal(batch, wide, length),
        "delta": normal(batch, wide, length),
        "A": -torch.rand(wide, n, generator=generator, dtype=dtype) * 4 - 0.1,
        "B": normal(batch, groups, n, length),
        "C": normal(batch, groups, n, length),
        "D": normal(wide),
        "z": normal(batch, wide, length),
        "delta_bias": normal(wide),
    }


def reference(u, delta, A, B, C, D, z, delta_bias):
    """Write the recurrence out, one step at a time."""
    delta = F.softplus(delta + delta_bias[:, None])
    per_group = u.shape[1] // B.shape[1]
    B, C = (v.repeat_interleave(per_group, dim=1) for v in (B, C))
    h, ys = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype), []
    for t in range(u.shape[2]):
        h = torch.exp(delta[..., t, None] * A) * h + (delta[..., t] * u[..., t])[..., None] * B[..., t]
        ys.append((h * C[..., t]).sum(2) + D * u[..., t])
    return torch.stack(ys, 2) * F.silu(z)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Make toy lengths cross the borders of time and batch blocks (16 steps, one item a block)."""
    monkeypatch.setattr(module, "LOOP_BLOCK", 16 * 60)
    monkeypatch.setattr(module, "CHUNKED_BLOCK", 60)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("length", LENGTHS)
def test_values_and_gradients_equal_the_reference(length, strategy):
    given = {k: v.requires_grad_() for k, v in inputs(length=length).items()}
    expected = reference(**given)
    got = selective_scan(**given, delta_softplus=True, strategy=strategy)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=expected.dtype)
    theirs = torch.autograd.grad((expected * weight).sum(), list(given.values()))
    ours = torch.autograd.grad((got * weight).sum(), list(given.values()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradcheck(strategy):
    given = {k: v.requires_grad_() for k, v in inputs(batch=2, groups=2, d=2, n=2, length=17).items()}

    def scan(*values):
        return selective_scan(*values, delta_softplus=True, strategy=strategy)

    assert torch.autograd.gradcheck(scan, tuple(given.values()))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plain_arguments_without_groups_gate_or_direct_path(strategy):
    given = inputs(groups=1, length=11)
    plain = {k: given[k] for k in ("u", "A")} | {"delta": F.softplus(given["delta"])}
    flat = {k: given[k][:, 0] for k in ("B", "C")}
    full = given | {"D": torch.zeros(4).double(), "delta_bias": torch.zeros(4).double()}
    expected = reference(**full) / F.silu(full["z"])
    torch.testing.assert_close(selective_scan(**plain, **flat, strategy=strategy), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strong_decay_over_a_long_sequence_stays_finite_and_exact(strategy):
    """Cumulative products underflow here; formulas that divide by them give NaN."""
    given = inputs(batch=1, groups=1, d=2, n=3, length=700, dtype=torch.float32)
    given["A"] = given["A"] * 20
    got = selective_scan(**given, delta_softplus=True, strategy=strategy)
    exact = reference(**{k: v.double() for k, v in given.items()})
    assert torch.isfinite(got).all()
    assert (got - exact).abs().max() <= 2e-6 * exact.abs().max()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_output_before_a_change_is_untouched_by_it(strategy):
    given = inputs(length=20)
    changed = {**given, "u": given["u"].clone()}
    changed["u"][..., 13] += 1
    before, after = (selective_scan(**g, delta_softplus=True, strategy=strategy) for g in (given, changed))
    assert torch.equal(before[..., :13], after[..., :13])
    assert not torch.allclose(before[..., 14], after[..., 14])


def test_autocast_does_not_reach_the_scan():
    given = inputs(length=40, dtype=torch.float32)
    expected = selective_scan(**given, delta_softplus=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selective_scan(**given, delta_softplus=True), expected)


@pytest.mark.parametrize("strategy", ["loop", "chunked"])
def test_autocast_does_not_reach_the_backward_pass(strategy):
    def gradients(autocast):
        given = {k: v.clone().requires_grad_() for k, v in inputs(length=40, dtype=torch.float32).items()}
        y = selective_scan(**given, delta_softplus=True, strategy=strategy)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y.sum().backward()
        return {k: v.grad for k, v in given.items()}

    expected = gradients(autocast=False)
    assert all(torch.equal(grad, expected[k]) for k, grad in gradients(autocast=True).items())


def test_half_inputs_give_half_outputs_of_an_fp32_scan():
    given = {k: v.bfloat16() for k, v in inputs(length=12, dtype=torch.float32).items()}
    got = selective_scan(**given, delta_softplus=True)
    assert got.dtype == torch.bfloat16
    exact = reference(**{k: v.double() for k, v in given.items()})
    torch.testing.assert_close(got.double(), exact, rtol=8e-3, atol=1e-6)  # one rounding to bf16, at the end


@pytest.mark.parametrize("length", LENGTHS)
def test_linear_recurrence_against_its_definition(length):
    generator = torch.Generator().manual_seed(0)
    a, x = (torch.rand(length, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    kept, h, expected = (a.clone(), x.clone()), torch.zeros(3).double(), []
    for t in range(length):
        h = a[t] * h + x[t]
        expected.append(h)
    torch.testing.assert_close(linear_recurrence(a, x), torch.stack(expected), rtol=1e-13, atol=1e-13)
    assert torch.equal(a, kept[0])
    assert torch.equal(x, kept[1])


def test_agrees_with_mambapy():
    pscan = pytest.importorskip("mambapy.pscan").pscan
    given = inputs(groups=1, length=37)
    delta = F.softplus(given["delta"] + given["delta_bias"][:, None]).transpose(1, 2)
    decay = torch.exp(delta.unsqueeze(3) * given["A"])
    B, C = (given[k][:, 0].transpose(1, 2) for k in ("B", "C"))
    h = pscan(decay, (delta * given["u"].transpose(1, 2)).unsqueeze(3) * B.unsqueeze(2))
    y = (h @ C.unsqueeze(3)).squeeze(3).transpose(1, 2) + given["D"][:, None] * given["u"]
    got = selective_scan(**given, delta_softplus=True)
    torch.testing.assert_close(got, y * F.silu(given["z"]), rtol=1e-12, atol=1e-12)


def test_wrong_choices_are_refused():
    given = inputs()
    with pytest.raises(UserError, match="scan backend"):
        selective_scan(**given, backend="triton")
    with pytest.raises(UserError, match="scan strategy"):
        selective_scan(**given, strategy="fast")
    with pytest.raises(UserError, match="mamba_ssm"):  # CPU tensors, whether or not it is installed
        selective_scan(**given, backend="mamba_ssm")


def test_broken_mamba_ssm_counts_as_absent(monkeypatch):
    """A wheel without kernels fails at import with whatever its loader raises."""
    import builtins

    original = builtins.__import__

    def broken(name, *args, **kwargs):
        if name.startswith("mamba_ssm"):
            raise RuntimeError("undefined symbol")
        return original(name, *args, **kwargs)

    module.mamba_ssm_scan.cache_clear()
    monkeypatch.setattr(builtins, "__import__", broken)
    assert module.mamba_ssm_scan() is None
    module.mamba_ssm_scan.cache_clear()


def test_kernel_receives_contiguous_fp32_arguments(monkeypatch):
    """The CUDA kernel is strict; a stand-in checks what it would be given and that its result is returned."""
    given = inputs(length=6, dtype=torch.float32)
    strided = {k: v.transpose(-1, -2).contiguous().transpose(-1, -2) if v.dim() > 1 else v for k, v in given.items()}

    def kernel(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        assert all(v.is_contiguous() and v.dtype == torch.float32 for v in (u, delta, A, B, C, z))
        assert delta_softplus
        return reference(u, delta, A, B, C, D, z, delta_bias)

    monkeypatch.setattr(module, "_choose_kernel", lambda backend, u: kernel)
    got = selective_scan(**strided, delta_softplus=True)
    torch.testing.assert_close(got, reference(**given))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_and_kernel_agree():
    given = inputs(batch=2, groups=3, d=32, n=16, length=245, dtype=torch.float32)
    expected = selective_scan(**given, delta_softplus=True)
    on_gpu = {k: v.cuda() for k, v in given.items()}
    torch_result = selective_scan(**on_gpu, delta_softplus=True, backend="torch").cpu()
    torch.testing.assert_close(torch_result, expected, rtol=1e-4, atol=1e-4)
    if module.mamba_ssm_scan() is not None:
        kernel_result = selective_scan(**on_gpu, delta_softplus=True, backend="mamba_ssm").cpu()
        torch.testing.assert_close(kernel_result, expected, rtol=1e-3, atol=1e-3)
