"""URPC's trainer: which resolutions take part."""

import pytest
import torch

from nnssl.errors import UserError
from nnssl.losses.pyramid import pyramid_consistency
from nnssl.trainers.urpc import URPCSettings


def test_the_loss_is_over_trained_resolutions_at_full_size(build, capsys):
    trainer = build("URPCTrainer", settings={"head_dropout": 0, "head_noise": 0})
    assert trainer.scales == 2  # the toy plan has three heads, nnU-Net does not train the lowest
    assert "2 resolutions" in capsys.readouterr().out
    unlabeled = next(trainer.dataloader_train)["unlabeled"]
    with torch.no_grad():
        high, low, _ = trainer.network(unlabeled["strong"])
        assert low.shape[2:] == (16, 16)
        low = torch.nn.functional.interpolate(low, scale_factor=2, mode="bilinear")
        expected = pyramid_consistency([high.softmax(1), low.softmax(1)], unlabeled["valid"])
    got = trainer.unsupervised_losses(unlabeled).terms["loss_pyramid"]
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


def test_disturbances_change_the_unlabeled_pass(build):
    trainer = build("URPCTrainer")
    unlabeled = next(trainer.dataloader_train)["unlabeled"]
    one, two = (trainer.unsupervised_losses(unlabeled).terms["loss_pyramid"].item() for _ in range(2))
    assert one != two


def test_each_disturbance_reaches_the_network_under_its_name(build):
    trainer = build("URPCTrainer", settings={"head_dropout": 0.2, "head_noise": 0.4})
    unlabeled = next(trainer.dataloader_train)["unlabeled"]
    given, forward = [], trainer.network.forward
    trainer.network.forward = lambda x, **options: given.append(options) or forward(x, **options)
    trainer.unsupervised_losses(unlabeled)
    assert given == [{"pyramid": True, "dropout": 0.2, "noise": 0.4}]


def test_a_network_without_its_heads_is_refused():
    with pytest.raises(UserError, match="deep supervision"):
        URPCSettings.from_mapping({"deep_supervision": False})
