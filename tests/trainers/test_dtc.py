"""DTC's trainer."""

import pytest
import torch
from nnssl_test_tools import same, weights

from nnssl.training.signed_distance import distance_maps


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_the_terms_are_the_formula(build, configuration):
    settings = {"unsupervised_schedule": "constant", "unsupervised_weight": 0.5, "sharpness": 30, "unlabeled_batch": 3}
    trainer = build("DTCTrainer", configuration, settings)
    batch = next(trainer.dataloader_train)
    batch["unlabeled"]["valid"][:] = True
    with torch.no_grad():
        z, p = [], []
        for x in (batch["data"], batch["unlabeled"]["strong"]):
            output, features = trainer.network(x, features=True)
            z.append(trainer.distance_head.layer(features).tanh())
            p.append(output[0].softmax(1)[:, 1:])
        truth, _ = distance_maps(trainer.label_space, batch["target"][0])
        together = (torch.sigmoid(-30 * torch.cat(z)) - torch.cat(p)).square().mean()
    scalars = trainer.train_step(batch)
    assert scalars["loss_distance"] == pytest.approx(0.3 * (z[0] - truth).square().mean().item(), rel=1e-4)
    assert scalars["loss_dual_labeled"] + scalars["loss_dual_unlabeled"] == pytest.approx(
        0.5 * together.item(), rel=1e-4
    )


def test_both_tasks_learn_from_unlabeled_crops(build):
    trainer = build("DTCTrainer", settings={"unsupervised_schedule": "constant", "sharpness": 10})
    batch = next(trainer.dataloader_train)
    batch["unlabeled"]["valid"][:] = True
    *_, last = trainer.method_losses(batch, 1.0)
    parts = [*trainer.distance_head.parameters(), *trainer.network.decoder.seg_layers[-1].parameters()]
    gradients = torch.autograd.grad(last.terms["loss_dual_unlabeled"], parts)
    assert all(g.any() for g in gradients)


def test_the_head_rests_with_weight_zero_and_learns_in_a_warm_up(build):
    for settings, rests in (({"unsupervised_weight": 0}, True), ({"unsupervised_schedule": "warmup99"}, False)):
        trainer = build("DTCTrainer", settings=settings)
        before = weights(trainer.distance_head)
        trainer.train_step(next(trainer.dataloader_train))
        assert same(before, weights(trainer.distance_head)) == rests


def test_distances_without_a_weight_are_warned_of(build, capsys):
    build("DTCTrainer", settings={"distance_weight": 0})
    assert "distance_weight=0" in capsys.readouterr().out
    build("DTCTrainer", settings={"distance_weight": 0, "unsupervised_weight": 0})
    assert "distance_weight=0" not in capsys.readouterr().out
