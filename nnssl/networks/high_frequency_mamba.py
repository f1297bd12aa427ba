"""High-frequency Mamba module of Diff-CL (arXiv 2503.09408, eq 10), for 2D and 3D feature maps.

The block is the tri-orientated Mamba block of SegMamba (arXiv 2401.13560) with an ideal high-pass filter behind its
gated spatial convolution::

    u   = GSC(f)                        gated spatial convolution
    F_h = Re iFFT(M_HF * FFT(u))        high-pass over the spatial axes
    F_m = ToM(LN(F_h)) + F_h            state-space mixing in three orders
    F_o = MLP(LN(F_m)) + F_m

As printed, F_o has no path for the low frequencies of f; ``mode="residual"`` (the default) returns ``f + F_o``,
``mode="gated"`` ``f + g F_o`` with a learned gate g that starts at zero, ``mode="replace"`` ``F_o``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl.errors import UserError
from nnssl.networks.selective_scan import selective_scan

MASKS = ("radial", "box", "ratio")
MODES = ("gated", "residual", "replace")
DIRECTIONS = 3
STATE_SIZE = 16
CONV_WIDTH = 4
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def high_pass_mask(shape: Sequence[int], threshold: float, kind: str = "radial") -> Tensor:
    """Return the ideal high-pass mask on the grid of ``torch.fft.rfftn``.

    Frequencies are in units of the Nyquist frequency, ``2 * fftfreq``: 1 is the highest frequency of one axis.
    A threshold of 0 keeps everything; any other removes the constant term.

    Args:
        shape: spatial shape of the feature map, voxels.
        threshold: the paper's HF, at least 0.
        kind: ``radial`` keeps where the Euclidean norm over the axes is at least the threshold; ``box`` where the
            maximum is; ``ratio`` removes a centered box that holds that fraction of the spectrum (half-width
            ``threshold ** (1 / axes)``).

    Returns:
        fp32, ``shape[:-1] + (shape[-1] // 2 + 1,)``, ones and zeros.
    """
    half = shape[-1] // 2 + 1
    axes = [torch.fft.fftfreq(n, dtype=torch.float64).mul(2).abs() for n in shape]
    axes[-1] = axes[-1][:half]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    radius = grid.square().sum(0).sqrt() if kind == "radial" else grid.amax(0)
    cutoff = threshold ** (1 / len(shape)) if kind == "ratio" else threshold
    # Frequencies such as 2 * 3 / 10 must not fall below a cut-off of 0.6 by rounding.
    return (radius >= cutoff - 1e-9).to(torch.float32)


class HighPass(nn.Module):
    """Ideal high-pass filter over the spatial axes, per sample and channel, in fp32.

    Masks are kept per (shape, device): the patch of inference may differ from that of training.
    """

    def __init__(self, threshold: float = 0.5, kind: str = "radial") -> None:
        super().__init__()
        if kind not in MASKS:
            raise UserError("unknown high-pass mask", got=kind, allowed=", ".join(MASKS))
        if not threshold >= 0:
            raise UserError("the high-pass threshold must be at least 0", got=threshold)
        self.threshold, self.kind = float(threshold), kind
        self._masks: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def mask(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        key = (shape, device)
        if key not in self._masks:
            with torch.inference_mode(False):  # a mask made while predicting must serve a later training step
                self._masks[key] = high_pass_mask(shape, self.threshold, self.kind).to(device)
        return self._masks[key]

    def forward(self, x: Tensor) -> Tensor:
        shape, axes = tuple(x.shape[2:]), tuple(range(2, x.dim()))
        with torch.autocast(x.device.type, enabled=False):
            x = x if x.dtype == torch.float64 else x.float()
            spectrum = torch.fft.rfftn(x, dim=axes) * self.mask(shape, x.device)
            return torch.fft.irfftn(spectrum, s=shape, dim=axes)


class GatedSpatialConv(nn.Module):
    """Gated spatial convolution of SegMamba's released code: ``f + conv1(conv3(conv3(f)) + conv1(f))``.

    Each convolution is followed by InstanceNorm (no affine) and ReLU. (The SegMamba paper multiplies the two branches;
    its code adds them.)
    """

    def __init__(self, channels: int, ndim: int) -> None:
        super().__init__()
        self.spatial = nn.Sequential(*_conv_norm_relu(channels, ndim, 3), *_conv_norm_relu(channels, ndim, 3))
        self.gate = nn.Sequential(*_conv_norm_relu(channels, ndim, 1))
        self.fuse = nn.Sequential(*_conv_norm_relu(channels, ndim, 1))

    def forward(self, f: Tensor) -> Tensor:
        return f + self.fuse(self.spatial(f) + self.gate(f))


def _conv_norm_relu(channels: int, ndim: int, kernel: int) -> list[nn.Module]:
    conv = _CONV[ndim](channels, channels, kernel, padding=kernel // 2)
    return [conv, _NORM[ndim](channels), nn.ReLU(inplace=True)]


def slice_order(tokens: Tensor, first: int) -> Tensor:
    """Reorder row-major tokens (L, ...) so that the first spatial axis, of length ``first``, runs fastest.

    ``slice_order(slice_order(v, D), L // D)`` is ``v`` again.
    """
    shape = tokens.shape
    return tokens.view(first, -1, *shape[1:]).transpose(0, 1).reshape(shape)


class ThreeDirectionMamba(nn.Module):
    """Tri-orientated Mamba (ToM) on tokens (L, b, C) in row-major order, time first.

    The directions are forward, reversed, and inter-slice (first spatial axis fastest). Each has its own causal
    depthwise convolution, projections, decay rates and direct path; the input and output projections are shared. The
    three run stacked as channel groups of one scan. SegMamba applies the step-size initialization to the forward
    direction only; here all three have it.
    """

    def __init__(self, channels: int, scan_backend: str = "auto") -> None:
        super().__init__()
        self.scan_backend = scan_backend
        self.inner, self.rank = 2 * channels, math.ceil(channels / 16)
        d, r, n = self.inner, self.rank, STATE_SIZE
        self.in_proj = nn.Linear(channels, 2 * d, bias=False)
        self.out_proj = nn.Linear(d, channels, bias=False)
        self.conv_weight = nn.Parameter(_uniform(CONV_WIDTH**-0.5, DIRECTIONS, d, CONV_WIDTH))
        self.conv_bias = nn.Parameter(_uniform(CONV_WIDTH**-0.5, DIRECTIONS, d))
        self.x_proj = nn.Parameter(_uniform(d**-0.5, DIRECTIONS, r + 2 * n, d))
        self.dt_weight = nn.Parameter(_uniform(r**-0.5, DIRECTIONS, d, r))
        self.dt_bias = nn.Parameter(_inverse_softplus_steps(DIRECTIONS, d))
        self.A_log = nn.Parameter(torch.arange(1, n + 1, dtype=torch.float32).log().repeat(DIRECTIONS, d, 1))
        self.D = nn.Parameter(torch.ones(DIRECTIONS, d))
        for parameter in (self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, tokens: Tensor, first: int) -> Tensor:
        """Mix tokens (L, b, C); ``first`` is the length of the first spatial axis."""
        x, z = self.in_proj(tokens).chunk(2, dim=-1)
        x = torch.stack((x, x.flip(0), slice_order(x, first)), dim=2)
        y = self._scan(self._causal_conv(x))
        y = y[:, :, 0] + y[:, :, 1].flip(0) + slice_order(y[:, :, 2], len(tokens) // first)
        # Each direction is gated by SiLU(z) in its own order, so one gate in row-major order does for the sum.
        return self.out_proj(y * F.silu(z))

    def _causal_conv(self, x: Tensor) -> Tensor:
        length, batch = x.shape[:2]
        flat = x.permute(1, 2, 3, 0).reshape(batch, -1, length)
        weight, bias = self.conv_weight.view(-1, 1, CONV_WIDTH), self.conv_bias.view(-1)
        out = F.conv1d(flat, weight, bias, padding=CONV_WIDTH - 1, groups=flat.shape[1])[..., :length]
        return F.silu(out.permute(2, 0, 1).reshape(x.shape))

    def _scan(self, x: Tensor) -> Tensor:
        """Return the scan's output for convolved inputs (L, b, 3, d)."""
        length, batch = x.shape[:2]
        rows = x.permute(2, 0, 1, 3).reshape(DIRECTIONS, length * batch, self.inner)
        projected = torch.bmm(rows, self.x_proj.transpose(1, 2))
        low_rank, B, C = projected.split((self.rank, STATE_SIZE, STATE_SIZE), dim=2)
        delta = torch.bmm(low_rank, self.dt_weight.transpose(1, 2))
        delta = delta.view(DIRECTIONS, length, batch, self.inner).permute(1, 2, 0, 3).reshape(length, batch, -1)
        B, C = (v.reshape(DIRECTIONS, length, batch, STATE_SIZE).permute(2, 0, 3, 1) for v in (B, C))
        y = selective_scan(
            x.flatten(2).permute(1, 2, 0),
            delta.permute(1, 2, 0),
            -torch.exp(self.A_log).flatten(0, 1),
            B,
            C,
            D=self.D.flatten(),
            delta_bias=self.dt_bias.flatten(),
            delta_softplus=True,
            backend=self.scan_backend,
        )
        return y.permute(2, 0, 1).view(x.shape)


def _uniform(bound: float, *shape: int) -> Tensor:
    return torch.empty(*shape).uniform_(-bound, bound)


def _inverse_softplus_steps(*shape: int) -> Tensor:
    """Return biases whose softplus is log-uniform in [1e-3, 0.1], the step sizes Mamba starts from."""
    dt = torch.empty(*shape).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp().clamp(min=DT_FLOOR)
    return dt + torch.log(-torch.expm1(-dt))


class HighFrequencyMamba(nn.Module):
    """The module of eq 10 on feature maps (b, C, *spatial).

    ``A_log`` and ``D`` carry the mark ``_no_weight_decay``. nnU-Net's weight initialization touches convolutions only,
    so the state-space initialization survives it.

    Args:
        channels: C.
        ndim: number of spatial axes, 2 or 3.
        threshold: the paper's HF, see `high_pass_mask`.
        mask: ``radial``, ``box`` or ``ratio``.
        mode: ``residual`` returns f + F_o; ``replace`` F_o alone, as eq 10 prints; ``gated`` f + g F_o with a learned g
            per channel that starts at zero, so that the network starts as its plain twin.
        scan_backend: see `nnssl.networks.selective_scan.selective_scan`; the weights do not depend on it.
    """

    def __init__(
        self,
        channels: int,
        ndim: int,
        threshold: float = 0.5,
        mask: str = "radial",
        mode: str = "residual",
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise UserError("unknown mode of the high-frequency Mamba module", got=mode, allowed=", ".join(MODES))
        self.mode = mode
        self.gsc = GatedSpatialConv(channels, ndim)
        self.high_pass = HighPass(threshold, mask)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.mamba = ThreeDirectionMamba(channels, scan_backend)
        conv = _CONV[ndim]
        self.mlp = nn.Sequential(conv(channels, 2 * channels, 1), nn.GELU(), conv(2 * channels, channels, 1))
        self.gate = nn.Parameter(torch.zeros(channels, *[1] * ndim)) if mode == "gated" else None

    def forward(self, f: Tensor) -> Tensor:
        high = self.high_pass(self.gsc(f))
        tokens = high.flatten(2).permute(2, 0, 1)
        mixed = self.mamba(self.norm1(tokens), first=f.shape[2]) + tokens
        out = self.mlp(_to_map(self.norm2(mixed), f)) + _to_map(mixed, f)
        if self.gate is not None:
            out = self.gate * out
        return out.to(f.dtype) if self.mode == "replace" else f + out.to(f.dtype)


def _to_map(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens.permute(1, 2, 0).reshape(like.shape)


def build_hfm_modules(hfm: dict[str, Any] | None, channels: Sequence[int], ndim: int) -> nn.ModuleDict:
    """Build the modules a network's ``hfm`` argument describes, keyed by encoder stage; none for None.

    Args:
        hfm: {"stages": [int], and any of "threshold", "mask", "mode", "scan_backend"}.
        channels: channels of each encoder stage's output.
        ndim: spatial axes.

    Raises:
        UserError: a stage the encoder does not have, or an unknown key.
    """
    if hfm is None:
        return nn.ModuleDict()
    options = dict(hfm)
    stages = options.pop("stages", None)
    if not stages or any(s not in range(len(channels)) for s in stages):
        raise UserError("hfm stages must be encoder stages", got=stages, allowed=f"0 to {len(channels) - 1}")
    allowed = ("threshold", "mask", "mode", "scan_backend")
    if unknown := set(options) - set(allowed):
        raise UserError("unknown hfm key", got=", ".join(sorted(unknown)), allowed=", ".join(("stages", *allowed)))
    return nn.ModuleDict({str(s): HighFrequencyMamba(channels[s], ndim, **options) for s in sorted(set(stages))})


def no_weight_decay_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters that must not decay: decay rates and direct paths of every scan in ``modules``.

    Unlike the mark on the parameters, this also holds for deep copies, which lose attributes of parameters.
    """
    scans = [m for module in modules for m in module.modules() if isinstance(m, ThreeDirectionMamba)]
    return [p for scan in scans for p in (scan.A_log, scan.D)]
