"""What a method hands to the base, and how the base turns it into optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from nnssl.trainers.settings import Settings

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


def parameter_groups(module: nn.Module, weight_decay: float, lr_factor: Callable[[str], float]) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups: one a learning-rate factor, with and without weight decay.

    Parameters marked ``_no_weight_decay`` (Mamba's A_log and D) go without decay. With one factor and no such
    parameter there is a single group, of all parameters in their order.

    Args:
        module: the network.
        weight_decay: of the other parameters.
        lr_factor: factor of the learning rate by a parameter's name.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    named = [(name, p) for name, p in unwrap(module).named_parameters() if p.requires_grad]
    for name, p in sorted(named, key=lambda item: getattr(item[1], "_no_weight_decay", False)):
        factor, free = lr_factor(name), getattr(p, "_no_weight_decay", False)
        group = groups.setdefault((factor, free), {"params": []} | ({"weight_decay": 0.0} if free else {}))
        group["params"].append(p)
        if factor != 1:
            group["lr_factor"] = factor
    return list(groups.values())


def make_optimizer(
    module: nn.Module,
    settings: Settings,
    lr_factor: Callable[[str], float] = lambda _: 1.0,
    kind: str | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer that ``kind``, or else the settings, name: nnU-Net's SGD, Adam (coupled decay) or AdamW."""
    groups, kind = parameter_groups(module, settings.weight_decay, lr_factor), kind or settings.optimizer
    lr, decay = settings.initial_lr, settings.weight_decay
    if kind == "adam":
        return torch.optim.Adam(groups, lr, weight_decay=decay)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr, weight_decay=decay)
    nesterov = settings.nesterov and settings.momentum > 0
    return torch.optim.SGD(groups, lr, momentum=settings.momentum, nesterov=nesterov, weight_decay=decay)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return every parameter an optimizer moves."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over all ranks, in one collective.

    Explicit averaging replaces DistributedDataParallel because a method may run several forward and backward passes
    a step and may leave parameters without gradient; every rank makes the same single call whatever its batch held.
    A parameter that no rank has a gradient for keeps none, so that neither momentum nor decay moves it.
    """
    parameters = list(parameters)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    held = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=gradients[0].device)
    flat = torch.cat([*(g.reshape(-1) for g in gradients), held])
    dist.all_reduce(flat)
    flat, held = flat[: -len(parameters)] / dist.get_world_size(), flat[-len(parameters) :]
    chunks = flat.split([p.numel() for p in parameters])
    for p, chunk, holders in zip(parameters, chunks, held.tolist(), strict=True):
        p.grad = chunk.view_as(p).clone() if holders > 0 else None


def broadcast_weights(module: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0."""
    for tensor in [*module.parameters(), *module.buffers()]:
        dist.broadcast(tensor.detach(), 0)


class StepRunner:
    """Drives a method's loss groups: backward, unscale, clip, step. Holds the only backward call of the package."""

    def __init__(
        self,
        optimizers: dict[str, torch.optim.Optimizer],
        scaler,
        distributed: bool,
        max_norm: float = MAX_GRADIENT_NORM,
    ) -> None:
        self.optimizers, self.scaler, self.distributed, self.max_norm = optimizers, scaler, distributed, max_norm

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
            if any([self._step(self.optimizers[name]) for name in group.step]):  # a list: every one of them steps
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

    def _step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Step an optimizer and return True; without any gradient leave it alone, since a scaler would refuse it."""
        parameters = parameters_of(optimizer)
        if self.distributed:  # before unscaling, so that every rank finds the same infinities and skips the same step
            average_gradients(parameters)
        if all(p.grad is None for p in parameters):
            return False
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, self.max_norm)
        if self.scaler is not None:
            self.scaler.step(optimizer)
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # a method may step the same network again
        return True
