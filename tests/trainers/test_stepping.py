"""How loss groups become optimizer steps where several processes and a gradient scaler meet."""

from __future__ import annotations

import pytest
import torch

from nnssl.trainers import stepping
from nnssl.trainers.stepping import LossGroup, StepRunner


def test_ranks_average_gradients_before_the_scaler_looks_for_infinities(monkeypatch):
    """Otherwise one rank skips a step that the others take with its infinite gradient in their average."""
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], 0.1)
    order = []

    class Scaler:
        def scale(self, loss):
            return loss

        def unscale_(self, _):
            order.append("unscale")

        def step(self, chosen):
            chosen.step()

        def update(self):
            order.append("update")

    monkeypatch.setattr(stepping, "average_gradients", lambda _: order.append("average"))
    StepRunner({"network": optimizer}, Scaler(), True).run([LossGroup({"loss": parameter.sum()}, step=("network",))])
    assert order == ["average", "unscale", "update"]
    assert torch.allclose(parameter.detach(), torch.tensor([0.9]))


def test_gradients_are_averaged_over_ranks_and_what_no_rank_has_stays_absent(monkeypatch):
    """A parameter that waits for another loss's step must not be moved by its momentum meanwhile."""
    here, both, there, nowhere = (torch.nn.Parameter(torch.ones(2)) for _ in range(4))
    here.grad, both.grad = torch.tensor([2.0, 4.0]), torch.tensor([1.0, 1.0])
    other = torch.tensor([0.0, 0.0, 3.0, 5.0, 8.0, 6.0, 0.0, 0.0, *(0.0, 1.0, 1.0, 0.0)])  # gradients, who has one
    monkeypatch.setattr(stepping.dist, "all_reduce", lambda flat: flat.add_(other))
    monkeypatch.setattr(stepping.dist, "get_world_size", lambda: 2)
    stepping.average_gradients([here, both, there, nowhere])
    assert here.grad.tolist() == [1, 2]
    assert both.grad.tolist() == [2, 3]
    assert there.grad.tolist() == [4, 3]
    assert nowhere.grad is None


@pytest.mark.parametrize("alone", [True, False])
def test_an_optimizer_without_gradient_does_not_stop_the_scaler(alone):
    """A network may have nothing to learn from a batch; torch's scaler raises where no gradient was checked."""
    idle, learning = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    optimizers = {"idle": torch.optim.SGD([idle], 0.1), "learning": torch.optim.SGD([learning], 0.1)}
    runner = StepRunner(optimizers, torch.amp.GradScaler("cpu", init_scale=4.0), False)
    constant = LossGroup({"nothing": torch.zeros(())}, step=("idle",))
    runner.run([constant] if alone else [constant, LossGroup({"loss": learning.sum()}, step=("learning",))])
    assert idle.item() == 1
    assert learning.item() == pytest.approx(1.0 if alone else 0.9)


def test_backward_runs_outside_autocast():
    """A part that computes in single precision must get its gradient in single precision too."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 8))
    x = torch.randn(4, 8)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return (x @ weight).square().mean()  # small enough not to be clipped

    expected = torch.autograd.grad(loss(), weight)[0]
    runner = StepRunner({"network": torch.optim.SGD([weight], 0.0)}, None, False)
    with torch.autocast("cpu", torch.bfloat16):
        runner.run(LossGroup({"loss": loss()}) for _ in range(1))  # a step would clear the gradient
    assert torch.equal(weight.grad, expected)


def steps_by_hand(start: torch.Tensor, gradients: list[float], momentum: float = 0.9, lr: float = 0.1) -> float:
    """Return the weight after SGD steps with these gradients."""
    weight, velocity = float(start), 0.0
    for gradient in gradients:
        velocity = momentum * velocity + gradient
        weight -= lr * velocity
    return weight


def scalar_network(start: float = 1.0) -> tuple[torch.nn.Parameter, torch.optim.SGD]:
    weight = torch.nn.Parameter(torch.tensor(start))
    return weight, torch.optim.SGD([weight], 0.1, momentum=0.9)


def test_two_steps_of_one_network_in_an_iteration_do_not_add_up_their_gradients():
    weight, optimizer = scalar_network()
    groups = (LossGroup({"loss": factor * weight}, step=("network",)) for factor in (2.0, 3.0))
    StepRunner({"network": optimizer}, None, False).run(groups)
    assert weight.item() == pytest.approx(steps_by_hand(1.0, [2.0, 3.0]))


def test_groups_without_a_step_add_up_across_another_networks_step():
    first, other = scalar_network(), scalar_network()
    groups = [
        LossGroup({"loss_a": 2 * first[0]}),
        LossGroup({"loss_b": 5 * other[0]}, step=("other",)),
        LossGroup({"loss_c": 3 * first[0]}, step=("network",)),
    ]
    StepRunner({"network": first[1], "other": other[1]}, None, False).run(groups)
    assert first[0].item() == pytest.approx(steps_by_hand(1.0, [5.0]))
    assert other[0].item() == pytest.approx(steps_by_hand(1.0, [5.0]))


def test_gradients_that_wait_for_their_step_keep_the_scale_they_were_taken_with():
    """The scale doubles after each update here; one between two backward passes would count the first half."""
    first, other = scalar_network(), scalar_network()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    runner = StepRunner({"network": first[1], "other": other[1]}, scaler, False)
    for _ in range(2):
        runner.run(
            [
                LossGroup({"loss_a": 2 * first[0]}),
                LossGroup({"loss_b": 5 * other[0]}, step=("other",)),
                LossGroup({"loss_c": 3 * first[0]}, step=("network",)),
            ]
        )
    assert first[0].item() == pytest.approx(steps_by_hand(1.0, [5.0, 5.0]))
    assert other[0].item() == pytest.approx(steps_by_hand(1.0, [5.0, 5.0]))
    assert scaler.get_scale() == 4.0 * 2**2


def test_the_scale_follows_even_where_a_gradient_is_never_stepped_on():
    first, other = scalar_network(), scalar_network()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    runner = StepRunner({"network": first[1], "other": other[1]}, scaler, False)
    for _ in range(2):
        runner.run([LossGroup({"loss": 2 * first[0] + 7 * other[0]}, step=("network",))])
    assert first[0].item() == pytest.approx(steps_by_hand(1.0, [2.0, 2.0]))
    assert scaler.get_scale() == 4.0 * 2**2


def test_a_gradient_no_one_stepped_on_does_not_reach_the_next_iteration():
    weight, optimizer = scalar_network()
    runner = StepRunner({"network": optimizer}, None, False)
    runner.run([LossGroup({"loss": 7 * weight})])
    assert weight.item() == 1
    runner.run([LossGroup({"loss": 2 * weight}, step=("network",))])
    assert weight.item() == pytest.approx(steps_by_hand(1.0, [2.0]))
