"""The small change of an image that moves a prediction most."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Keeps a direction finite where no voxel moves the prediction.
SMALLEST_NORM = 1e-8


def virtual_adversarial_perturbation(
    x: Tensor,
    distance: Callable[[Tensor], Tensor],
    xi: float = 10.0,
    epsilon: float = 10.0,
    iterations: int = 1,
) -> Tensor:
    """Return r (b, c, ...) of norm epsilon along which the prediction on x moves most, by power iterations.

    Miyato et al., "Virtual Adversarial Training", TPAMI 2019 (arXiv 1704.03976): from a random unit direction d,
    ``d <- g / |g|`` with g the gradient of ``distance(x + xi d)`` by d, then ``r = epsilon d``. Norms are Euclidean,
    over one item of the batch. No gradient reaches any weight. Autocast is off: the gradient is small, and half
    precision may round it to nothing.

    Args:
        x: images (b, c, ...).
        distance: of the prediction on other images of x's shape to that on x; a scalar with a gradient.
        xi: how far from x the gradient is taken, in units of x.
        epsilon: norm of r, in units of x.
        iterations: power iterations.

    Returns:
        r, detached; 0 for an item whose gradient is 0.
    """
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x = x.detach().float()
        direction = unit(torch.rand_like(x) - 0.5)
        for _ in range(iterations):
            direction.requires_grad_()
            (gradient,) = torch.autograd.grad(distance(x + xi * direction), direction)
            direction = unit(gradient)
    return epsilon * direction.detach()


def unit(x: Tensor) -> Tensor:
    """Return every item of a batch divided by its Euclidean norm; an item of zeros stays so."""
    norm = x.flatten(1).norm(dim=1).clamp_min(SMALLEST_NORM)
    return x / norm.view(-1, *[1] * (x.ndim - 1))
