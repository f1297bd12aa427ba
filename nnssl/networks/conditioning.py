"""Time conditioning that survives instance normalization.

An embedding that is added to the input of a conv -> InstanceNorm block is a per-channel constant, which the norm's mean
removes. FiLM (Perez et al. 2018, arXiv 1709.07871) acts after the norm and before the non-linearity::

    h = (1 + gamma(t)) * Norm(conv(x)) + beta(t)        (gamma, beta) = Linear(SiLU(embedding(t)))

The linear maps start at zero, so that a conditioned network starts as its unconditioned twin.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

SINUSOIDAL_DIM = 128
EMBEDDING_DIM = 512
MAX_PERIOD = 10_000.0


def sinusoidal_embedding(t: Tensor, dim: int = SINUSOIDAL_DIM, max_period: float = MAX_PERIOD) -> Tensor:
    """Return ``[sin(t w_i), cos(t w_i)]`` with ``w_i = exp(-ln(max_period) i / (dim/2 - 1))``, i = 0 .. dim/2 - 1.

    This spacing of the frequencies is that of the public code of GenericSSL and Diff-UNet.

    Args:
        t: time steps, (b,), integer or float.
        dim: even number of features, at least 4.
        max_period: ratio of the fastest to the slowest frequency.

    Returns:
        fp32, (b, dim).
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.to(torch.float32).unsqueeze(1) * torch.exp(index * (-math.log(max_period) / (half - 1)))
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class TimeEmbedding(nn.Module):
    """Map time steps (b,) to SiLU-activated embeddings (b, 512): sinusoids, Linear, SiLU, Linear, SiLU."""

    def __init__(self, sinusoidal_dim: int = SINUSOIDAL_DIM, dim: int = EMBEDDING_DIM) -> None:
        super().__init__()
        self.sinusoidal_dim = sinusoidal_dim
        self.mlp = nn.Sequential(nn.Linear(sinusoidal_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        with torch.autocast(t.device.type, enabled=False):
            return F.silu(self.mlp(sinusoidal_embedding(t, self.sinusoidal_dim)))


class FiLM(nn.Module):
    """Scale and shift of one norm's output, computed from the activated time embedding; zero at the start."""

    def __init__(self, channels: int, embedding_dim: int = EMBEDDING_DIM) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding_dim, 2 * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, norm: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
        """Return ``(1 + gamma) * norm(x) + beta``.

        Args:
            norm: the norm layer of the site.
            x: the norm's input, (b, C, ...).
            embedding: activated time embedding, (b, 512).
        """
        with torch.autocast(x.device.type, enabled=False):
            gamma, beta = self.linear(embedding).chunk(2, dim=1)
        if isinstance(norm, _InstanceNorm) and not norm.track_running_stats:
            return _modulated_instance_norm(norm, x, gamma, beta)
        shape = (*gamma.shape, *[1] * (x.dim() - 2))
        return torch.addcmul(beta.view(shape), norm(x), 1 + gamma.view(shape))


def _modulated_instance_norm(norm: _InstanceNorm, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Fold scale and shift into the norm's own affine step, which costs nothing on the feature maps.

    Instance norm is batch norm over (1, b * C, ...), where every sample may have weights of its own.
    """
    scale, shift = 1 + gamma, beta
    if norm.affine:
        scale, shift = scale * norm.weight, torch.addcmul(beta, scale, norm.bias)
    flat = x.reshape(1, -1, *x.shape[2:])
    out = F.batch_norm(flat, None, None, scale.reshape(-1), shift.reshape(-1), training=True, eps=norm.eps)
    return out.view(x.shape)
