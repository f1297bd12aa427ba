"""Monte Carlo dropout: a network's mean prediction over random dropout, and how unsure it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from nnssl.errors import UserError


def require_dropout(network: nn.Module) -> list[_DropoutNd]:
    """Return a network's dropout layers with a rate above 0.

    Raises:
        UserError: it has none, so that all passes would agree.
    """
    layers = [m for m in network.modules() if isinstance(m, _DropoutNd) and m.p > 0]
    if not layers:
        rule = "Monte Carlo dropout needs a network with dropout"
        raise UserError(rule, "a network without", "a rate above 0", "--set dropout=0.1")
    return layers


@contextlib.contextmanager
def dropout_active(network: nn.Module) -> Iterator[None]:
    """Let a network's dropout draw within the context, whatever its mode; the rest of the network stays as it is.

    Raises:
        UserError: the network has no dropout.
    """
    layers = require_dropout(network)
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training


@torch.no_grad()
def mean_prediction(
    probs: Callable[[Tensor], Tensor], network: nn.Module, x: Tensor, passes: int, noise: float = 0.0
) -> Tensor:
    """Return the mean probabilities (b, C, ...) of ``passes`` passes under dropout and input noise.

    Equation 2 of UA-MT (Yu et al. 2019, arXiv 1907.07034), whose uncertainty is the entropy of this mean.

    Args:
        probs: function from images to probabilities (b, C, ...), through ``network``.
        network: whose dropout draws.
        x: images (b, c, ...).
        passes: T.
        noise: standard deviation of the Gaussian noise on the input, cut off at twice that, in units of the image.
    """
    with dropout_active(network):
        total = sum(probs(noisy(x, noise)) for _ in range(passes))
    return torch.as_tensor(total) / passes


def noisy(x: Tensor, sigma: float) -> Tensor:
    """Return images with Gaussian noise of standard deviation ``sigma``, cut off at 2 sigma."""
    if sigma == 0:
        return x
    return x + (sigma * torch.randn_like(x)).clamp(-2 * sigma, 2 * sigma)
