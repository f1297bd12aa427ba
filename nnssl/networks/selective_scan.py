"""Selective state-space scan in plain torch: the recurrence behind Mamba, on any device.

For every channel and state, with the first state zero (Gu & Dao 2023, arXiv 2312.00752, eqs 2-4)::

    h_t = exp(delta_t * A) * h_{t-1} + delta_t * u_t * B_t        y_t = <C_t, h_t> + D * u_t

Two implementations share one backward formula. Both multiply only by ``exp(delta * A) <= 1``; neither divides by, nor
takes the logarithm of, a cumulative product, which overflows within a few hundred steps.

* ``loop`` (CPU): time is the outermost axis, so a step is one in-place multiply-add on a contiguous slice. Work is cut
  into blocks of time steps and batch items that fit the cache. Only the states at block starts are kept; the backward
  pass recomputes the rest.
* ``chunked`` (CUDA and other accelerators): a two-level scan of about ``2 * sqrt(L)`` vectorised steps.

When ``mamba_ssm`` is importable and the tensors are on a CUDA device its kernel is used instead. The CUDA paths are not
verified on CUDA; ``chunked`` is tested on CPU against ``loop``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nnssl.errors import UserError

BACKENDS = ("auto", "torch", "mamba_ssm")
STRATEGIES = ("auto", "loop", "chunked")

# Elements of one work buffer. The loop wants its handful of buffers in the cache, the chunked scan wants wide kernels.
LOOP_BLOCK = 1 << 18
CHUNKED_BLOCK = 1 << 27
# Shortest block of the loop: each block start costs one stored state.
MIN_STEPS = 16


@functools.cache
def mamba_ssm_scan() -> Callable[..., Tensor] | None:
    """Return ``mamba_ssm``'s fused scan, or None when it does not import for whatever reason.

    A wheel without kernels, or one built for another torch, raises anything from ImportError to RuntimeError.
    """
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except Exception:
        return None
    return selective_scan_fn


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str = "auto",
    strategy: str = "auto",
) -> Tensor:
    """Run the selective scan with the argument conventions of ``mamba_ssm.selective_scan_fn``.

    Everything is computed in fp32 (fp64 when ``u`` is) with autocast off: ``exp(delta * A)`` near 1 loses the memory
    of the recurrence in bf16. Tensors laid out with time outermost in memory avoid copies.

    Args:
        u: input, (batch, d_in, L).
        delta: step sizes, (batch, d_in, L).
        A: negative decay rates, (d_in, N).
        B: input weights, (batch, N, L), or (batch, G, N, L) for G groups of d_in / G neighboring channels.
        C: output weights, of the shape of ``B``.
        D: weight of the direct path, (d_in,).
        z: gate, (batch, d_in, L); the output is multiplied by SiLU(z).
        delta_bias: added to ``delta``, (d_in,).
        delta_softplus: pass ``delta`` (plus bias) through softplus.
        backend: ``torch``, ``mamba_ssm`` (CUDA kernels) or ``auto`` (the kernel when it applies).
        strategy: for the torch backend, ``loop``, ``chunked`` or ``auto`` (by device).

    Returns:
        y, (batch, d_in, L), in the dtype of ``u``.

    Raises:
        UserError: unknown backend or strategy, or ``mamba_ssm`` asked for where it cannot run.
    """
    kernel = _choose_kernel(backend, u)
    _check_choice("scan strategy", strategy, STRATEGIES)
    with torch.autocast(u.device.type, enabled=False):
        dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
        args = [None if v is None else v.to(dtype) for v in (u, delta, A, B, C, D, z, delta_bias)]
        run = _torch_scan if kernel is None else _kernel_scan(kernel)
        return run(args, delta_softplus, strategy).to(u.dtype)


def _check_choice(rule: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"unknown {rule}", got=value, allowed=", ".join(allowed))


def _choose_kernel(backend: str, u: Tensor) -> Callable[..., Tensor] | None:
    _check_choice("scan backend", backend, BACKENDS)
    if backend == "torch" or (backend == "auto" and (not u.is_cuda or u.dtype == torch.float64)):
        return None
    kernel = mamba_ssm_scan()
    if backend == "mamba_ssm" and (kernel is None or not u.is_cuda):
        raise UserError(
            "scan backend mamba_ssm needs CUDA tensors and an importable mamba_ssm",
            got=f"{u.device.type} tensors, mamba_ssm {'not ' if kernel is None else ''}importable",
            remedy="use the backend auto or torch",
        )
    return kernel


def _kernel_scan(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(args: list[Any], delta_softplus: bool, strategy: str) -> Tensor:
        u, delta, A, B, C, D, z, delta_bias = args
        u, delta, B, C = (v.contiguous() for v in (u, delta, B, C))
        z = None if z is None else z.contiguous()
        return kernel(u, delta, A.contiguous(), B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus)

    return run


def _torch_scan(args: list[Any], delta_softplus: bool, strategy: str) -> Tensor:
    u, delta, A, B, C, D, z, delta_bias = args
    batch, d_in, length = u.shape
    B, C = (v.unsqueeze(1) if v.dim() == 3 else v for v in (B, C))
    groups = B.shape[1]
    u, delta = u.permute(2, 0, 1), delta.permute(2, 0, 1)  # time first
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    shape = (length, batch, groups, d_in // groups)
    rates = A.view(groups, d_in // groups, -1).transpose(1, 2)
    y = time_first_scan(
        delta.reshape(shape), (delta * u).reshape(shape), rates, B.permute(3, 0, 1, 2), C.permute(3, 0, 1, 2), strategy
    )
    y = y.view(length, batch, d_in)
    if D is not None:
        y = torch.addcmul(y, u, D)
    if z is not None:
        y = y * F.silu(z.permute(2, 0, 1))
    return y.permute(1, 2, 0)


@torch.compiler.disable
def time_first_scan(delta: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, strategy: str = "auto") -> Tensor:
    """Run ``h_t = exp(delta_t A) h_{t-1} + x_t B_t``, ``y_t = <C_t, h_t>`` with time as the outermost axis.

    Args:
        delta: step sizes, (L, batch, G, d).
        x: scaled inputs ``delta * u``, (L, batch, G, d).
        A: decay rates, (G, N, d).
        B: input weights, (L, batch, G, N).
        C: output weights, (L, batch, G, N).
        strategy: ``loop``, ``chunked`` or ``auto`` (loop on CPU, chunked elsewhere).

    Returns:
        y, (L, batch, G, d).
    """
    if strategy == "auto":
        strategy = "loop" if delta.device.type == "cpu" else "chunked"
    function = _LoopScan if strategy == "loop" else _ChunkedScan
    return function.apply(*(v.contiguous() for v in (delta, x, A, B, C)))


def _batch_blocks(batch: int, per_item: int, block: int) -> Iterator[slice]:
    """Cut the batch into runs of items that together have at most ``block`` elements (at least one item)."""
    items = max(1, min(batch, block // max(1, per_item)))
    for start in range(0, batch, items):
        yield slice(start, min(start + items, batch))


def _decays(delta: Tensor, log2_rates: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``exp(delta A)`` from ``A log2(e)``: torch's exp2 is three times as fast as its exp on CPU."""
    return torch.mul(delta.unsqueeze(3), log2_rates, out=out).exp2_()


def _outer(x: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    return torch.mul(x.unsqueeze(3), weights.unsqueeze(4), out=out)


def _over_states(weights: Tensor, states: Tensor) -> Tensor:
    """Contract (..., N) weights with (..., N, d) states over N."""
    n, d = states.shape[-2:]
    return torch.bmm(weights.reshape(-1, 1, n), states.reshape(-1, n, d)).view(*states.shape[:-2], d)


def _over_channels(states: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Contract (..., N, d) states with (..., d) vectors over d (a batched matrix-vector product is slower)."""
    return torch.mul(states, x.unsqueeze(-2), out=out).sum(-1)


def _without_autocast(
    backward: Callable[[Any, Tensor], tuple[Tensor, ...]],
) -> Callable[[Any, Tensor], tuple[Tensor, ...]]:
    """Turn autocast off in a backward pass: called within it, products would run in half precision."""

    @functools.wraps(backward)
    def in_full_precision(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(grad_y.device.type, enabled=False):
            return backward(ctx, grad_y)

    return in_full_precision


class _LoopScan(torch.autograd.Function):
    """Sequential scan over cache-sized blocks of time steps and batch items."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        length, batch = delta.shape[:2]
        y, starts = torch.empty_like(x), []
        for items in _batch_blocks(batch, A.numel() * MIN_STEPS, LOOP_BLOCK):
            buffers = _LoopBuffers(A, items.stop - items.start, length)
            start = A.new_zeros(buffers.blocks, *buffers.h.shape[1:])
            for index, span in buffers.spans():
                h = buffers.states(delta[span, items], x[span, items], B[span, items], start[index])
                y[span, items] = _over_states(C[span, items], h)
                if index + 1 < buffers.blocks:
                    start[index + 1].copy_(h[-1])
            starts.append(start)
        ctx.save_for_backward(delta, x, A, B, C, *starts)
        return y

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        delta, x, A, B, C, *starts = ctx.saved_tensors
        grads = [torch.empty_like(v) for v in (delta, x, B, C)]
        grad_A, grad_y = torch.zeros_like(A), grad_y.contiguous()
        for block, items in enumerate(_batch_blocks(delta.shape[1], A.numel() * MIN_STEPS, LOOP_BLOCK)):
            buffers = _LoopBuffers(A, items.stop - items.start, delta.shape[0], backward=True)
            for index, span in reversed(list(buffers.spans())):
                parts = [v[span, items] for v in (delta, x, B, C, grad_y)]
                results = buffers.gradients(parts, starts[block][index], A, grad_A)
                for grad, result in zip(grads, results, strict=True):
                    grad[span, items] = result
        return grads[0], grads[1], grad_A, grads[2], grads[3]


class _LoopBuffers:
    """Reused work space of one batch block; views of single time steps are made once."""

    def __init__(self, A: Tensor, items: int, length: int, backward: bool = False) -> None:
        self.length, self.log2_rates = length, A * math.log2(math.e)
        self.steps = min(length, max(MIN_STEPS, LOOP_BLOCK // (items * A.numel())))
        self.blocks = math.ceil(length / self.steps)
        slots = (self.steps, items, *A.shape)
        self.h, self.a = A.new_empty(slots), A.new_empty(slots)
        self.h_steps, self.a_steps = self.h.unbind(0), self.a.unbind(0)
        if backward:
            self.g, self.products = A.new_empty(slots), A.new_empty(slots)
            self.g_steps = self.g.unbind(0)
            self.g_carry = A.new_zeros(slots[1:])

    def spans(self) -> Iterator[tuple[int, slice]]:
        for index in range(self.blocks):
            yield index, slice(index * self.steps, min((index + 1) * self.steps, self.length))

    def states(self, delta: Tensor, x: Tensor, B: Tensor, start: Tensor) -> Tensor:
        """Return the states after each of the n steps of a block, leaving the decays in ``a``."""
        n = delta.shape[0]
        _decays(delta, self.log2_rates, out=self.a[:n])
        h = _outer(x, B, out=self.h[:n])
        previous = start
        for decay, state in zip(self.a_steps[:n], self.h_steps[:n], strict=True):
            previous = state.addcmul_(decay, previous)
        return h

    def gradients(
        self, parts: list[Tensor], start: Tensor, A: Tensor, grad_A: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of (delta, x, B, C) on a block and add that of A; later blocks come first.

        ``parts`` holds the block's (delta, x, B, C, grad_y).

        With ``g_t = C_t dL/dy_t + a_{t+1} g_{t+1}`` the gradient of the state, ``dx_t = <B_t, g_t>``, and the gradient
        of the exponent ``delta_t A`` is ``g_t a_t h_{t-1}``.
        """
        delta, x, B, C, grad_y = parts
        n = delta.shape[0]
        h = self.states(delta, x, B, start)
        a, g, products = self.a[:n], _outer(grad_y, C, out=self.g[:n]), self.products[:n]
        following = self.g_steps[n - 1].add_(self.g_carry)
        for t in range(n - 2, -1, -1):
            following = self.g_steps[t].addcmul_(self.a_steps[t + 1], following)
        torch.mul(self.a_steps[0], self.g_steps[0], out=self.g_carry)
        grad_x = _over_states(B, g)
        grad_B = _over_channels(g, x, out=products)
        grad_C = _over_channels(h, grad_y, out=products)
        exponent = a.mul_(g)
        exponent[0].mul_(start)
        exponent[1:].mul_(h[:-1])
        grad_delta = torch.mul(exponent, A, out=products).sum(3)
        grad_A += exponent.mul_(delta.unsqueeze(3)).sum((0, 1))
        return grad_delta, grad_x, grad_B, grad_C


class _ChunkedScan(torch.autograd.Function):
    """Two-level scan: few, wide steps. The backward pass recomputes the states."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        ctx.save_for_backward(delta, x, A, B, C)
        y = torch.empty_like(x)
        for items in _batch_blocks(delta.shape[1], A.numel() * delta.shape[0], CHUNKED_BLOCK):
            a = _decays(delta[:, items], A * math.log2(math.e))
            h = linear_recurrence(a, x[:, items].unsqueeze(3) * B[:, items].unsqueeze(4))
            y[:, items] = _over_states(C[:, items], h)
        return y

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        delta, x, A, B, C = ctx.saved_tensors
        grads = [torch.empty_like(v) for v in (delta, x, B, C)]
        grad_A = torch.zeros_like(A)
        for items in _batch_blocks(delta.shape[1], A.numel() * delta.shape[0], CHUNKED_BLOCK):
            parts = [v[:, items] for v in (delta, x, B, C, grad_y)]
            *results, part_A = _chunked_gradients(parts, A)
            grad_A += part_A
            for grad, result in zip(grads, results, strict=True):
                grad[:, items] = result
        return grads[0], grads[1], grad_A, grads[2], grads[3]


def _chunked_gradients(parts: list[Tensor], A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of (delta, x, B, C, A) for parts (delta, x, B, C, grad_y)."""
    delta, x, B, C, grad_y = parts
    a = _decays(delta, A * math.log2(math.e))
    h = linear_recurrence(a, x.unsqueeze(3) * B.unsqueeze(4))
    grad_C = _over_channels(h, grad_y)
    zero = torch.zeros_like(a[:1])
    shifted = torch.cat((a[1:], zero)).flip(0)
    g = linear_recurrence(shifted, (grad_y.unsqueeze(3) * C.unsqueeze(4)).flip(0)).flip(0)
    exponent = a.mul_(g).mul_(torch.cat((zero, h[:-1])))
    return (
        (exponent * A).sum(3),
        _over_states(B, g),
        _over_channels(g, x),
        grad_C,
        exponent.mul_(delta.unsqueeze(3)).sum((0, 1)),
    )


def linear_recurrence(a: Tensor, x: Tensor) -> Tensor:
    """Return ``h_t = a_t h_{t-1} + x_t`` (``h_{-1} = 0``) along axis 0 in about ``2 sqrt(L)`` vectorised steps.

    Time is cut into chunks; all chunks advance together from a zero state while the products of their decays are kept,
    then the chunk ends are chained, then each chunk receives the state it really starts from. Division-free; every
    factor is a product of decays. Not differentiable by itself.

    Args:
        a: decays in (0, 1], (L, ...).
        x: inputs, same shape.
    """
    length = a.shape[0]
    size = max(1, math.isqrt(length - 1) + 1) if length else 1
    chunks = -(-length // size)
    h, p = _to_chunks(x, chunks, size, fill=0.0), _to_chunks(a, chunks, size, fill=1.0)
    for j in range(1, size):
        h[j].addcmul_(p[j], h[j - 1])
        p[j].mul_(p[j - 1])
    carry = torch.zeros_like(h[0])
    for c in range(1, chunks):
        torch.addcmul(h[-1, c - 1], p[-1, c - 1], carry[c - 1], out=carry[c])
    h.addcmul_(p, carry)
    return h.transpose(0, 1).reshape(chunks * size, *a.shape[1:])[:length]


def _to_chunks(v: Tensor, chunks: int, size: int, fill: float) -> Tensor:
    """Pad time to ``chunks * size`` and return (position in chunk, chunk, ...), contiguous and never aliasing."""
    out = v.new_full((chunks * size, *v.shape[1:]), fill)
    out[: v.shape[0]] = v
    return out.view(chunks, size, *v.shape[1:]).transpose(0, 1).contiguous()
