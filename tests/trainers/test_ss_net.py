"""SS-Net's trainer."""

import pytest
import torch
from nnssl_test_tools import same, weights

from nnssl.losses.consistency import dice_distance
from nnssl.losses.prototype import weighted_cosine_distance


def start(build, **settings):
    trainer = build("SSNetTrainer", settings={"unsupervised_schedule": "constant", **settings})
    batch = next(trainer.dataloader_train)
    batch["unlabeled"]["valid"][:] = True
    return trainer, batch


def test_smoothness_is_the_distance_under_a_change_of_the_given_norm(build, monkeypatch):
    given = []

    def change(x, distance, xi, epsilon):
        given.append((xi, epsilon))
        return torch.full_like(x, 0.1)

    monkeypatch.setattr("nnssl.trainers.ss_net.virtual_adversarial_perturbation", change)
    trainer, batch = start(build, xi=2.0, epsilon=3.0, unlabeled_batch=3, separation_weight=0.0)
    expected = []
    with torch.no_grad():
        for x in (batch["data"], batch["unlabeled"]["strong"]):
            clean, changed = (trainer.network(images)[0].softmax(1) for images in (x, x + 0.1))
            expected.append(dice_distance(changed, clean).item() * len(x) / 5)
    scalars = trainer.train_step(batch)
    assert scalars["loss_smooth_labeled"] == pytest.approx(expected[0], rel=1e-3)
    assert scalars["loss_smooth_unlabeled"] == pytest.approx(expected[1], rel=1e-3)
    assert given == [(2.0, 3.0)] * 2


def test_prototypes_are_what_the_selector_ranks_highest_among_correct_foreground(build):
    trainer, _ = start(build, prototypes=3)
    label = torch.zeros(2, 1, 32, 32, dtype=torch.int16)
    label[:, :, :8], label[:, :, 8:10] = 1, 2
    correct = (label == 1) & (torch.arange(32) % 2 == 0)
    features = torch.randn(2, trainer.network.feature_channels, 32, 32)
    trainer._remember(features, label, correct)
    assert trainer.memory.available() == {1: 3}
    with torch.no_grad():
        projected = trainer.heads.projector(features.movedim(1, -1)[correct[:, 0]])
        ranks = trainer.heads.embedding_selectors[0](projected)
    expected = projected[ranks.topk(3).indices]
    stored = trainer.memory.draw([1], 3)[1]
    assert torch.cdist(expected, stored).min(1).values.max() < 1e-5
    trainer._remember(features, label, torch.zeros_like(correct))  # nothing is correct: the prototypes stay
    assert trainer.memory.available() == {1: 3}


def test_separation_is_the_sum_over_classes_with_prototypes(build):
    trainer, _ = start(build)
    features = torch.randn(1, trainer.network.feature_channels, 8, 8)
    label = torch.zeros(1, 1, 8, 8, dtype=torch.int64)
    label[:, :, :3], label[:, :, 3:5] = 1, 2
    everywhere = torch.ones_like(label, dtype=torch.bool)
    assert trainer._separation(features, label, everywhere).item() == 0  # no prototype yet
    trainer._remember(features, label, label > 0)
    prototypes, heads, total = trainer.memory.draw([1, 2], 32), trainer.heads, 0.0
    for c, voxels in ((1, features[0, :, :3]), (2, features[0, :, 3:5])):
        e = heads.predictor(heads.projector(voxels.flatten(1).T))
        m = torch.nn.functional.normalize(prototypes[c], dim=1)
        w, v = heads.embedding_selectors[c - 1](e), heads.prototype_selectors[c - 1](m)
        total += weighted_cosine_distance(e, m, w, v).item() / 3
    assert trainer._separation(features, label, everywhere).item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("weighted", [True, False])
def test_selectors_of_prototypes_learn_unless_the_code_is_followed(build, weighted):
    trainer, _ = start(build, prototype_weights=weighted)
    features = torch.randn(1, trainer.network.feature_channels, 8, 8, requires_grad=True)
    label = torch.ones(1, 1, 8, 8, dtype=torch.int64)
    trainer._remember(features, label, label > 0)
    loss = trainer._separation(features, label, label > 0)
    parts = [features, *trainer.heads.prototype_selectors[0].parameters()]
    gradients = torch.autograd.grad(loss, parts, allow_unused=True)
    assert gradients[0].any()
    assert all((g is not None and bool(g.any())) == weighted for g in gradients[2:-1:2])


def test_weight_zero_lets_the_heads_rest(build):
    trainer, batch = start(build, unsupervised_weight=0)
    before = weights(trainer.heads)
    assert set(trainer.train_step(batch)) == {"loss_supervised"}
    assert same(before, weights(trainer.heads))
    assert trainer.memory.available() == {}


def test_without_separation_heads_and_prototypes_rest_and_the_run_says_so(build, capsys):
    trainer, batch = start(build, separation_weight=0)
    assert "separation_weight=0" in capsys.readouterr().out
    before = weights(trainer.heads)
    assert set(trainer.train_step(batch)) == {"loss_supervised", "loss_smooth_labeled", "loss_smooth_unlabeled"}
    assert same(before, weights(trainer.heads))
    assert trainer.memory.available() == {}
    start(build, separation_weight=0, unsupervised_weight=0)
    assert "separation_weight=0" not in capsys.readouterr().out
