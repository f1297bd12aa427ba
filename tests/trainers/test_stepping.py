"""How loss groups become optimizer steps where several processes and a gradient scaler meet."""

from __future__ import annotations

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
        runner.run(LossGroup({"loss": loss()}, step=("network",)) for _ in range(1))
    assert torch.equal(weight.grad, expected)
