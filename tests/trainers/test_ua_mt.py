"""The uncertainty-aware mean teacher: its mask, its limit and its dropout."""

import math

import pytest
import torch
from nnssl_test_tools import same, weights

from nnssl.errors import UserError
from nnssl.training.label_space import LabelSpace
from nnssl.training.mc_dropout import mean_prediction


def test_the_threshold_rises_from_three_quarters_of_the_largest_entropy(build):
    trainer = build("UAMTTrainer", start=False)
    limits = []
    for step in (0, 4, 8):
        trainer.global_step = step
        limits.append(trainer.threshold() / math.log(3))
    assert limits == pytest.approx([0.75 + 0.25 * math.exp(-5), 0.75 + 0.25 * math.exp(-1.25), 1.0])
    published = build("UAMTTrainer", settings={"uncertainty_limit": "published"}, start=False)
    published.global_step = 8
    assert published.threshold() == pytest.approx(math.log(2))


@pytest.mark.parametrize("limit", ["classes", "published"])
def test_the_loss_counts_certain_voxels_only(build, monkeypatch, limit):
    trainer = build("UAMTTrainer", settings={"uncertainty_limit": limit, "dropout": 0.1})
    for _ in range(2):
        trainer.train_step(next(trainer.dataloader_train))
    trainer.network.eval()  # the student's own dropout would draw anew below
    unlabeled = next(trainer.dataloader_train)["unlabeled"]
    unlabeled["valid"][..., :4] = False
    generator = torch.Generator().manual_seed(0)
    mean = (3 * torch.randn(2, 3, 32, 32, generator=generator)).softmax(1)
    monkeypatch.setattr("nnssl.trainers.ua_mt.mean_prediction", lambda *args: mean)
    entropy = -(mean * mean.log()).sum(1)
    mask = unlabeled["valid"][:, 0] & (entropy < trainer.threshold())
    assert 0 < mask.sum() < unlabeled["valid"].sum()
    with torch.no_grad():
        student = trainer.predict_logits(unlabeled["strong"]).softmax(1)
        distance = (student - trainer.teacher(unlabeled["weak"]).softmax(1)).square().sum(1)
    divisor = 3 if limit == "classes" else 2
    group = trainer.unsupervised_losses(unlabeled)
    assert group.terms["loss_consistency"].item() == pytest.approx(
        (distance[mask].sum() / mask.sum() / divisor).item(), rel=1e-4
    )


@pytest.mark.parametrize("space", [LabelSpace(3), LabelSpace(3, regions=True)], ids=str)
def test_what_counts_as_certain(build, space):
    """A tie of all three classes, or a single region that is undecided, does not even at the end of the run."""
    trainer = build("UAMTTrainer", start=False)
    trainer.global_step, trainer.label_space = 8, space
    probs = torch.tensor([[0.5], [1e-6], [1e-6]]) if space.regions else torch.full((3, 1), 1 / 3)
    assert space.entropy(probs[None]).item() >= trainer.threshold() * (1 - 1e-6)


def test_the_passes_are_those_of_the_teacher_on_the_weak_view(build, monkeypatch):
    trainer = build("UAMTTrainer", settings={"passes": 3, "noise": 0.25})
    unlabeled = next(trainer.dataloader_train)["unlabeled"]
    given = []
    monkeypatch.setattr(
        "nnssl.trainers.ua_mt.mean_prediction", lambda *args: given.append(args) or torch.full((2, 3, 32, 32), 1 / 3)
    )
    trainer.unsupervised_losses(unlabeled)
    ((teach, network, x, passes, noise),) = given
    assert (teach, passes, noise) == (trainer.teach, 3, 0.25)
    assert network is trainer.teacher
    assert x is unlabeled["weak"]


def test_dropout_draws_in_the_passes_and_not_in_the_target(build):
    trainer = build("UAMTTrainer", settings={"dropout": 0.5})
    x = next(trainer.dataloader_train)["unlabeled"]["weak"]
    trainer.teacher.eval()
    with torch.no_grad():
        assert torch.equal(trainer.teach(x), trainer.teach(x))
    one, two = (mean_prediction(trainer.teach, trainer.teacher, x, 1) for _ in range(2))
    assert not torch.equal(one, two)
    assert not any(m.training for m in trainer.teacher.modules())


def test_a_network_without_dropout_is_refused(build):
    with pytest.raises(UserError, match="needs a network with dropout"):
        build("UAMTTrainer", settings={"dropout": 0})
    build("UAMTTrainer", settings={"dropout": 0, "unsupervised_weight": 0})  # the control needs none


def test_weight_zero_is_the_control_of_the_same_dropout(build):
    method = build("UAMTTrainer", settings={"unsupervised_weight": 0})
    control = build("SupervisedTrainer", settings={"dropout": method.settings.dropout})
    for trainer in (method, control):
        trainer.train_step(next(trainer.dataloader_train))
        trainer.train_step(next(trainer.dataloader_train))
    assert same(weights(method.network), weights(control.network))
