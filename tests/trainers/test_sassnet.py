"""SASSNet's trainer and its adversary."""

import math
from types import SimpleNamespace

import pytest
import torch
from nnssl_test_tools import same, weights
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch.nn import functional

from nnssl.trainers.sassnet import ShapeAdversary


@pytest.mark.parametrize("patch", [(32, 48), (4, 33, 18), (1, 16, 16)])
def test_the_adversary_reads_distances_and_image_of_any_patch(patch):
    adversary = ShapeAdversary(2, 1, patch, 4).eval()
    z, x = torch.rand(3, 2, *patch, requires_grad=True), torch.rand(3, 1, *patch, requires_grad=True)
    logits = adversary(z, x)
    assert logits.shape == (3, 2)
    logits.sum().backward()
    assert all(t.grad.flatten(1).any(1).all() for t in (z, x))


def test_the_first_layer_is_the_sum_of_two_convolutions():
    first = ShapeAdversary(2, 1, (16, 16), 4).layers[0]
    z, x = torch.rand(1, 2, 16, 16), torch.rand(1, 1, 16, 16)
    apart = functional.conv2d(z, first.weight[:, :2], first.bias, 2, 1) + functional.conv2d(
        x, first.weight[:, 2:], None, 2, 1
    )
    assert torch.allclose(first(torch.cat([z, x], 1)), apart, atol=1e-6)


def groups(build, **settings):
    """Return a trainer, its batch and the generator of its groups, none of which has stepped."""
    trainer = build("SASSNetTrainer", settings={"unsupervised_schedule": "constant", **settings})
    batch = next(trainer.dataloader_train)
    return trainer, batch, trainer.method_losses(batch, 1.0)


def test_the_network_is_pushed_towards_labeled_and_the_adversary_is_left_alone(build):
    trainer, batch, steps = groups(build)
    next(steps)
    group = next(steps)
    assert group.step == ("network", "distance")
    group.terms["loss_shape"].backward(retain_graph=True)
    assert all(p.grad is None and p.requires_grad for p in trainer.adversary.parameters())
    assert all(p.grad.any() for p in trainer.distance_head.parameters())
    with torch.no_grad():
        *_, z = trainer.both_tasks(batch["unlabeled"]["strong"])
        labeled = trainer.adversary.eval()(z, batch["unlabeled"]["strong"]).softmax(1)[:, 1]
    assert group.terms["loss_shape"].item() == pytest.approx(-labeled.log().mean().item(), rel=1e-4)


@pytest.mark.parametrize(("size", "uniform"), [(2, 1), (5, 3)])
def test_the_adversary_learns_which_crops_are_labeled_and_the_network_is_left_alone(build, monkeypatch, size, uniform):
    monkeypatch.setattr("nnssl.trainers.sassnet.DROPOUT", 0.0)
    trainer = build("SASSNetTrainer", settings={"unsupervised_schedule": "constant", "unlabeled_batch": 3}, start=False)
    trainer.configuration_manager.configuration["batch_size"] = size
    trainer.initialize()
    trainer.dataloader_train, _ = trainer.get_dataloaders()
    batch = next(trainer.dataloader_train)
    steps = trainer.method_losses(batch, 1.0)
    *_, group = steps
    assert group.step == ("adversary",)
    group.terms["loss_adversary"].backward()
    assert all(p.grad is None for p in [*trainer.network.parameters(), *trainer.distance_head.parameters()])
    total = 0.0
    with torch.no_grad():  # nnU-Net cuts the last labeled crops around foreground
        for x, column in ((batch["data"][:uniform], 1), (batch["unlabeled"]["strong"], 0)):
            *_, z = trainer.both_tasks(x)
            total -= trainer.adversary(z, x).log_softmax(1)[:, column].mean().item() / 2
    assert group.terms["loss_adversary"].item() == pytest.approx(total, rel=1e-4)


def test_the_adversary_gets_the_labeled_crops_that_nnunets_loader_does_not_force(build):
    for size in range(1, 13):
        trainer = build("SASSNetTrainer", start=False)
        trainer.configuration_manager.configuration["batch_size"] = size
        trainer.initialize()
        percent = trainer.oversample_foreground_percent
        loader = SimpleNamespace(batch_size=size, oversample_foreground_percent=percent)
        forced = [nnUNetDataLoader._oversample_last_XX_percent(loader, i) for i in range(size)]
        assert forced == [i >= trainer.uniform for i in range(size)]


def test_without_a_crop_that_is_cut_anywhere_the_run_says_so(build, capsys):
    trainer = build("SASSNetTrainer", start=False)
    trainer.oversample_foreground_percent = 1.0
    trainer.initialize()
    assert "sees no labeled one" in capsys.readouterr().out
    trainer.dataloader_train, _ = trainer.get_dataloaders()
    assert math.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss_adversary"])


def test_the_adversarys_adam_has_the_authors_decays(build):
    (group,) = build("SASSNetTrainer").partners["adversary"].optimizer.param_groups
    assert (group["lr"], group["betas"]) == (1e-4, (0.9, 0.99))


def test_each_optimizer_moves_its_own_network_at_its_own_rate(build):
    trainer, batch, _ = groups(build)
    before, rate = weights(trainer.adversary), trainer.learning_rate()
    scalars = trainer.train_step(batch)
    (group,) = trainer.partners["adversary"].optimizer.param_groups
    assert group["lr"] == 1e-4
    assert trainer.optimizer.param_groups[0]["lr"] == rate
    moved = [(a - b).abs().max().item() for a, b in zip(before, weights(trainer.adversary), strict=True)]
    assert max(moved) == pytest.approx(1e-4, rel=1e-2)  # the first step of Adam is the rate
    assert scalars["loss_adversary"] == pytest.approx(math.log(2), abs=0.5)


def test_weight_zero_lets_head_and_adversary_rest(build):
    trainer, batch, _ = groups(build, unsupervised_weight=0)
    before = weights(trainer.adversary) + weights(trainer.distance_head)
    assert set(trainer.train_step(batch)) == {"loss_supervised"}
    assert same(before, weights(trainer.adversary) + weights(trainer.distance_head))
