"""The optimizers the settings name, and that the default is what it has always been."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from nnssl_test_tools import same, weights

from nnssl.trainers.settings import Settings
from nnssl.trainers.stepping import LossGroup, StepRunner, make_optimizer


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    net[0].bias._no_weight_decay = True
    return net


def steps(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return weights(net)


def test_the_default_is_nnunets_sgd_with_its_groups():
    net = network()
    free = [net[0].bias]
    decayed = [net[0].weight, net[2].weight, net[2].bias]
    theirs = torch.optim.SGD(
        [{"params": decayed}, {"params": free, "weight_decay": 0.0}], 0.01, 0.99, nesterov=True, weight_decay=3e-5
    )
    ours = make_optimizer(net, Settings())
    assert type(ours) is torch.optim.SGD
    assert ours.state_dict() == theirs.state_dict()
    assert [[id(p) for p in g["params"]] for g in ours.param_groups] == [list(map(id, decayed)), list(map(id, free))]
    twin = copy.deepcopy(net)
    reference = torch.optim.SGD(
        [{"params": [twin[0].weight, twin[2].weight, twin[2].bias]}, {"params": [twin[0].bias], "weight_decay": 0.0}],
        0.01, 0.99, nesterov=True, weight_decay=3e-5,
    )  # fmt: skip
    assert same(steps(net, ours), steps(twin, reference))


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_has_the_settings_rate_and_decay(name, kind):
    net = network()
    optimizer = make_optimizer(net, Settings(optimizer=name, initial_lr=5e-4, weight_decay=1e-2))
    assert type(optimizer) is kind
    assert {(g["lr"], g["betas"], g["weight_decay"]) for g in optimizer.param_groups} == {
        (5e-4, (0.9, 0.999), 1e-2),
        (5e-4, (0.9, 0.999), 0.0),
    }


def test_factors_split_the_groups_and_every_parameter_is_in_one():
    net = network()
    optimizer = make_optimizer(net, Settings(), lambda name: 0.1 if name.startswith("0.") else 1.0)
    found = {id(p): g.get("lr_factor", 1.0) for g in optimizer.param_groups for p in g["params"]}
    assert found == {id(p): 0.1 if n.startswith("0.") else 1.0 for n, p in net.named_parameters()}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 4


def test_warm_up_rises_to_the_course_and_factors_reach_the_step(build):
    trainer = build("SupervisedTrainer", settings={"warmup": 4})
    rates = []
    for step in range(6):
        trainer.global_step = step
        rates.append(trainer.learning_rate())
    course = [0.01 * (1 - step / 8) ** 0.9 for step in range(6)]
    assert rates == pytest.approx([c * w for c, w in zip(course, [0.25, 0.5, 0.75, 1, 1, 1], strict=True)])
    trainer.global_step = 0
    trainer.optimizer.param_groups[0]["lr_factor"] = 0.5
    trainer.train_step(next(trainer.dataloader_train))
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.25 * 0.5)
    assert trainer.stepper.max_norm == 12.0


@pytest.mark.parametrize("norm", [0.5, 2.0])
def test_gradients_are_clipped_to_the_settings_norm(norm):
    weight = torch.nn.Parameter(torch.zeros(4))
    runner = StepRunner({"network": torch.optim.SGD([weight], 1.0)}, None, False, norm)
    runner.run([LossGroup({"loss": (100 * weight).sum()}, step=("network",))])
    assert weight.detach().norm().item() == pytest.approx(norm, rel=1e-4)
    assert replace(Settings(), gradient_clip=norm).gradient_clip == norm
