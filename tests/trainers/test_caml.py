"""CAML's trainer."""

import pytest
import torch
from nnssl_test_tools import same, weights

from nnssl.losses.consistency import mutual_consistency
from nnssl.losses.contrastive import correlation_consistency
from nnssl.trainers.caml import rows


def start(build, **settings):
    trainer = build("CAMLTrainer", settings={"unsupervised_schedule": "constant", **settings})
    trainer.peer.attention.intra.eval(), trainer.peer.attention.inter.eval()  # no dropout, so that passes repeat
    batch = next(trainer.dataloader_train)
    batch["unlabeled"]["valid"][:] = True
    return trainer, batch


def test_the_mutual_consistency_is_over_one_batch_of_both_kinds(build):
    trainer, batch = start(build, unlabeled_batch=3, unsupervised_weight=0.5)
    images = torch.cat([batch["data"], batch["unlabeled"]["strong"]])
    with torch.no_grad():
        probs = [trainer.trained_network(name)(images)[0].softmax(1) for name in ("network", "peer")]
    expected = 0.5 * mutual_consistency(probs, 0.1).item()
    assert trainer.train_step(batch)["loss_mutual"] == pytest.approx(expected, rel=1e-4)


def test_memory_holds_the_mean_projection_of_voxels_both_classify_correctly(build):
    trainer, _ = start(build, bank_capacity=1000)
    channels = trainer.network.feature_channels
    features = [torch.randn(2, channels, 8, 8) for _ in range(2)]
    truth = torch.randint(0, 3, (2, 1, 8, 8))
    correct = torch.rand(2, 1, 8, 8) < 0.5
    trainer._remember(features, truth, correct, ["one", "two"])
    state = trainer.memory.state_dict()
    assert set(state) == {"one", "two"}
    with torch.no_grad():
        for item, case in enumerate(state):
            for c, stored in state[case].items():
                own = (correct & (truth == c))[item, 0]
                v, a = (
                    trainer.heads[f"project_{who}"](f[item][:, own].T) for who, f in zip("va", features, strict=True)
                )
                assert stored.shape == v.shape
                assert torch.cdist(stored, (v + a) / 2).min(1).values.max() < 1e-4


def test_correlations_are_of_the_most_certain_voxels_where_both_agree(build):
    trainer, _ = start(build, voxels=4, memory=5)
    channels = trainer.network.feature_channels
    v, a = (torch.randn(1, channels, 6, 6) for _ in range(2))
    label, certainty = torch.randint(0, 3, (1, 1, 6, 6)), torch.rand(1, 1, 6, 6)
    agree = torch.rand(1, 1, 6, 6) < 0.7
    bank = {c: torch.randn(5, 32) for c in range(3)}
    trainer.memory.draw = lambda classes, p: bank
    picked = []
    for c in range(3):
        own = sorted(
            (i for i in range(36) if agree.flatten()[i] and label.flatten()[i] == c),
            key=lambda i: -certainty.flatten()[i],
        )
        picked += own[:4]
    heads = trainer.heads
    left = heads["predict_v"](heads["project_v"](rows(v)[picked]))
    right = heads["predict_a"](heads["project_a"](rows(a)[picked]))
    expected = correlation_consistency(left, right, bank, 0.1)
    assert trainer._correlate([v, a], label, agree, certainty).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("detach", [True, False])
def test_targets_carry_a_gradient_only_if_the_code_is_followed(build, detach):
    trainer, _ = start(build, detach_targets=detach)
    trainer.memory.draw = lambda classes, p: {0: torch.randn(5, 32)}
    v, a = (torch.randn(1, trainer.network.feature_channels, 4, 4, requires_grad=True) for _ in range(2))
    label = torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    loss = trainer._correlate([v, a], label, label == 0, torch.rand(1, 1, 4, 4))
    gradients = torch.autograd.grad(loss, [v, a], allow_unused=True)
    assert gradients[0].any()
    assert (gradients[1] is not None and bool(gradients[1].any())) == (not detach)


def test_all_parts_learn_and_weight_zero_lets_them_rest(build):
    for weight in (1.0, 0.0):
        trainer, batch = start(build, unsupervised_weight=weight)
        # a memory from the start: an untrained network may classify too little correctly
        trainer.memory.push(["lab9"], [torch.randn(90, 32)], [torch.arange(90) % 3])
        parts = [trainer.peer.decoder, trainer.peer.attention, trainer.heads]
        before = [weights(part) for part in parts]
        trainer.train_step(batch)
        rests = [same(b, weights(part)) for b, part in zip(before, parts, strict=True)]
        assert rests == [weight == 0] * 3
    assert set(trainer.branches(batch["data"])) == {"network", "peer"}


def test_without_correlations_heads_and_memory_rest_and_the_run_says_so(build, capsys):
    trainer, batch = start(build, correlation_weight=0)
    assert "correlation_weight=0" in capsys.readouterr().out
    before = weights(trainer.heads)
    assert "loss_correlation" not in trainer.train_step(batch)
    assert same(before, weights(trainer.heads))
    assert trainer.memory.available() == {}
    start(build, correlation_weight=0, unsupervised_weight=0)
    assert "correlation_weight=0" not in capsys.readouterr().out
