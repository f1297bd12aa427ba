"""Methods with heads of their own train under autocast, whose weights it must not copy in half precision."""

import numpy as np
import pytest
import torch
from nnssl_test_tools import same, weights
from torch import nn

TRAINERS = ("CAMLTrainer", "DTCTrainer", "INCLTrainer", "MLRPLTrainer", "SASSNetTrainer", "SSNetTrainer")


@pytest.mark.parametrize("name", TRAINERS)
def test_every_partner_learns_in_bfloat16(build, name):
    trainer = build(name, settings={"unsupervised_schedule": "constant"}, options={"precision": "bf16"})
    if "memory" in trainer.modules:  # from the start: an untrained network may classify too little correctly
        trainer.memory.push(["lab9"], [torch.randn(90, 32)], [torch.arange(90) % 3])
    before = {key: weights(trainer.trained_network(key)) for key in ("network", *trainer.partners)}
    for _ in range(3):
        scalars = trainer.train_step(next(trainer.dataloader_train))
    assert all(np.isfinite(v) for v in scalars.values()), scalars
    assert not [key for key, old in before.items() if same(old, weights(trainer.trained_network(key)))]


@pytest.mark.parametrize(("precision", "guarded"), [("bf16", True), ("auto", False)])
def test_every_convolution_trained_in_bfloat16_on_a_cpu_is_guarded(build, precision, guarded):
    trainer = build("CPSTrainer", options={"precision": precision})
    layers = [layer for network in trainer._networks() for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert layers
    assert {type(layer) is not nn.Conv2d for layer in layers} == {guarded}
