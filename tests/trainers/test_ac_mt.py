"""The ambiguity-consensus mean teacher: its mask and its thresholds."""

import math

import pytest
import torch

from nnssl.errors import UserError
from nnssl.trainers.ac_mt import ACMTSettings


@pytest.mark.parametrize(
    ("settings", "end"),
    [({}, 0.95), ({"ambiguity": "dropout", "dropout": 0.1}, 0.9), ({"threshold_end": 0.8}, 0.8)],
)
def test_the_threshold_rises_as_the_paper_has_it(build, settings, end):
    trainer = build("ACMTTrainer", settings=settings, start=False)
    limits = []
    for step in (0, 8):
        trainer.global_step = step
        limits.append(trainer.threshold() / math.log(3))
    assert limits == pytest.approx([0.75 + (end - 0.75) * math.exp(-5), end])


@pytest.mark.parametrize("ambiguity", ["entropy", "dropout"])
def test_the_loss_counts_ambiguous_voxels_only(build, monkeypatch, ambiguity):
    settings = {"ambiguity": ambiguity, "noise": 0, "dropout": 0.1, "threshold_start": 0.85}
    trainer = build("ACMTTrainer", settings=settings)
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
