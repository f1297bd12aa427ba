"""What a method hands to the base, and how the base turns it into optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

#: Gradients are clipped to this norm, one network at a time, as nnU-Net does.
MAX_GRADIENT_NORM = 12.0


@dataclass
class LossGroup:
    """Loss terms that share one backward pass.

    Args:
        terms: named, weighted scalars; their sum is minimized. Each is logged under its name.
        step: names of the optimizers that step after this group; empty = only accumulate gradients (the graph is
            freed before the method builds its next group).
        log: further scalars for the log, outside the objective (fractions, agreements).
    """

    terms: dict[str, Tensor]
    step: tuple[str, ...] = ()
    log: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Partner:
    """A network that takes part in training beside the one that predicts.

    Args:
        module: the network as called (compiled where that is on).
        optimizer: its optimizer.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer


def unwrap(module: nn.Module) -> nn.Module:
    """Return the network below ``torch.compile``."""
    return getattr(module, "_orig_mod", module)


def make_sgd(module: nn.Module, lr: float, momentum: float, nesterov: bool, weight_decay: float) -> torch.optim.SGD:
    """Build nnU-Net's SGD; parameters marked ``_no_weight_decay`` (Mamba's A_log and D) go without decay."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    free = [p for p in parameters if getattr(p, "_no_weight_decay", False)]
    decayed = [p for p in parameters if not getattr(p, "_no_weight_decay", False)]
    groups = [{"params": decayed}] + ([{"params": free, "weight_decay": 0.0}] if free else [])
    return torch.optim.SGD(groups, lr, momentum=momentum, nesterov=nesterov and momentum > 0, weight_decay=weight_decay)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return every parameter an optimizer moves."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over all ranks, in one collective.

    Explicit averaging replaces DistributedDataParallel because a method may run several forward and backward passes
    a step and may leave parameters without gradient; every rank makes the same single call whatever its batch held.
    """
    parameters = list(parameters)
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.reshape(-1) for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, chunk in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(chunk.view_as(p))


def broadcast_weights(module: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0."""
    for tensor in [*module.parameters(), *module.buffers()]:
        dist.broadcast(tensor.detach(), 0)


class StepRunner:
    """Drives a method's loss groups: backward, unscale, clip, step. Holds the only backward call of the package."""

    def __init__(self, optimizers: dict[str, torch.optim.Optimizer], scaler, distributed: bool) -> None:
        self.optimizers, self.scaler, self.distributed = optimizers, scaler, distributed

    def run(self, groups: Iterable[LossGroup]) -> dict[str, Tensor]:
        """Run one training step and return every named scalar, detached, without synchronizing the device."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        logged: dict[str, Tensor] = {}
        due = False
        for group in groups:
            total = sum(group.terms.values())
            if total.requires_grad:
                scaled = self.scaler.scale(total) if self.scaler is not None else total
                with torch.autocast(total.device.type, enabled=False):  # each part's backward in its own precision
                    scaled.backward()
            for name, value in (group.terms | group.log).items():
                logged[name] = value.detach()
            # The graph must be gone before the method builds its next group.
            group.terms.clear()
            del total
            for name in group.step:
                self._step(self.optimizers[name])
            if group.step:
                due = self.scaler is not None and not self._update_scale()
                torch.clear_autocast_cache()  # a method may run a network again after its step
        if due:
            self.scaler.update()
        return logged

    def _update_scale(self) -> bool:
        """Update the scale and return True, unless gradients that were scaled by it still wait for their step."""
        if any(p.grad is not None for optimizer in self.optimizers.values() for p in parameters_of(optimizer)):
            return False
        self.scaler.update()
        return True

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = parameters_of(optimizer)
        if self.distributed:  # before unscaling, so that every rank finds the same infinities and skips the same step
            average_gradients(parameters)
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        if self.scaler is not None:
            self.scaler.step(optimizer)
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # a method may step the same network again
