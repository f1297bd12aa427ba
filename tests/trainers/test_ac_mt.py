"""The ambiguity-consensus mean teacher: its mask and its thresholds."""

import math

import pytest
import torch

from nnssl.errors import UserError
from nnssl.trainers.ac_mt import ACMTSettings
from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.training.label_space import LabelSpace


@pytest.mark.parametrize(
    ("settings", "end", "unit"),
    [
        ({}, 0.95, 2),
        ({"ambiguity": "dropout", "dropout": 0.1}, 0.9, 2),
        ({"threshold_end": 0.8}, 0.8, 2),
        ({"uncertainty_limit": "classes"}, 0.95, 3),
    ],
)
def test_the_threshold_rises_as_the_paper_has_it(build, settings, end, unit):
    trainer = build("ACMTTrainer", settings=settings, start=False)
    limits = []
    for step in (0, 8):
        trainer.global_step = step
        limits.append(trainer.threshold() / math.log(unit))
    assert limits == pytest.approx([0.75 + (end - 0.75) * math.exp(-5), end])


@pytest.mark.parametrize("space", [LabelSpace(2), LabelSpace(3), LabelSpace(14), LabelSpace(3, regions=True)], ids=str)
@pytest.mark.parametrize("step", [0, 8])
def test_a_tie_of_two_classes_is_ambiguous_whatever_their_number(build, space, step):
    """So is one undecided region among certain ones."""
    trainer = build("ACMTTrainer", start=False)
    trainer.global_step, trainer.label_space = step, space
    unsure, sure = torch.zeros(2, space.num_heads, 1)
    unsure[: 1 if space.regions else 2], sure[0] = 0.5, 1.0
    assert space.entropy(unsure[None]).item() >= trainer.threshold()
    assert space.entropy(sure[None]).item() < trainer.threshold()


def test_an_epoch_without_ambiguous_voxels_is_warned_of(build, monkeypatch):
    trainer = build("ACMTTrainer", start=False)
    monkeypatch.setattr(SemiSupervisedTrainer, "on_epoch_end", lambda *args: None)
    said = []
    trainer.warn = said.append
    for means in ({"loss_supervised": 1.0}, {"ambiguous": 0.01}, {"ambiguous": 0.0}):
        trainer.on_epoch_end(means, {})
    assert len(said) == 1
    assert "no voxel was ambiguous" in said[0]


@pytest.mark.parametrize("ambiguity", ["entropy", "dropout"])
def test_the_loss_counts_ambiguous_voxels_only(build, monkeypatch, ambiguity):
    settings = {"ambiguity": ambiguity, "noise": 0, "dropout": 0.1, "threshold_start": 0.85}
    trainer = build("ACMTTrainer", settings={**settings, "uncertainty_limit": "classes"})
    for _ in range(2):
        trainer.train_step(next(trainer.dataloader_train))
    trainer.network.eval()  # the student's own dropout would draw anew below
    unlabeled = next(trainer.dataloader_train)["unlabeled"]
    unlabeled["valid"][..., :4] = False
    mean = (2 * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).softmax(1)
    monkeypatch.setattr("nnssl.trainers.ac_mt.mean_prediction", lambda *args: mean)
    with torch.no_grad():
        student = trainer.predict_logits(unlabeled["strong"]).softmax(1)
        distance = (student - trainer.teacher(unlabeled["weak"]).softmax(1)).square().mean(1)
    judged = student if ambiguity == "entropy" else mean
    mask = unlabeled["valid"][:, 0] & (-(judged * judged.log()).sum(1) >= trainer.threshold())
    assert 0 < mask.sum() < unlabeled["valid"].sum()
    group = trainer.unsupervised_losses(unlabeled)
    assert group.terms["loss_consistency"].item() == pytest.approx(distance[mask].mean().item(), rel=1e-4)
    assert group.log["ambiguous"].item() == pytest.approx((mask.sum() / unlabeled["valid"].sum()).item())


def test_the_passes_are_those_of_the_teacher_on_the_weak_view(build, monkeypatch):
    trainer = build("ACMTTrainer", settings={"ambiguity": "dropout", "dropout": 0.1, "passes": 3, "noise": 0.25})
    unlabeled = next(trainer.dataloader_train)["unlabeled"]
    given = []
    monkeypatch.setattr(
        "nnssl.trainers.ac_mt.mean_prediction", lambda *args: given.append(args) or torch.full((2, 3, 32, 32), 1 / 3)
    )
    trainer.unsupervised_losses(unlabeled)
    ((teach, network, x, passes, noise),) = given
    assert (teach, passes, noise) == (trainer.teach, 3, 0.25)
    assert network is trainer.teacher
    assert x is unlabeled["weak"]


def test_the_teachers_input_is_noisy(build):
    trainer = build("ACMTTrainer")
    x = next(trainer.dataloader_train)["unlabeled"]
    seen = []
    trainer.teach = lambda images: seen.append(images) or torch.full((2, 3, 32, 32), 1 / 3)
    trainer.unsupervised_losses(x)
    shift = (seen[0] - x["weak"]).abs()
    assert 0 < shift.max() <= 0.2 + 1e-5


def test_what_cannot_be_is_refused(build):
    with pytest.raises(UserError, match="must rise"):
        ACMTSettings.from_mapping({"threshold_start": 0.96})
    with pytest.raises(UserError, match="needs a network with dropout"):
        build("ACMTTrainer", settings={"ambiguity": "dropout"})
