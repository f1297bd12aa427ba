"""Interpolation consistency."""

import pytest
import torch


def test_the_loss_is_the_formula(build, monkeypatch):
    trainer = build("ICTTrainer")
    trainer.train_step(next(trainer.dataloader_train))
    trainer.train_step(next(trainer.dataloader_train))  # teacher and student differ from the second step on
    unlabeled = next(trainer.dataloader_train)["unlabeled"]
    unlabeled["valid"][0, :, :7] = False
    monkeypatch.setattr("nnssl.trainers.ict.draw_mixup", lambda alpha: 0.3)
    u, keep = unlabeled["strong"], unlabeled["valid"][0] & unlabeled["valid"][1]
    with torch.no_grad():
        teacher = trainer.teacher(u).softmax(1)
        expected = []
        for j, k in ((0, 1), (1, 0)):
            student = trainer.predict_logits((0.3 * u[j] + 0.7 * u[k])[None]).softmax(1)[0]
            difference = (student - 0.3 * teacher[j] - 0.7 * teacher[k]) ** 2
            expected.append(difference[:, keep[0]].mean())
    got = trainer.unsupervised_losses(unlabeled).terms["loss_consistency"]
    assert got.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
    assert got.requires_grad


def test_an_unmixed_crop_asks_for_plain_consistency(build, monkeypatch):
    """With lambda = 1 the loss is the squared difference of student and teacher: 0 while they are the same."""
    trainer = build("ICTTrainer")
    unlabeled = next(trainer.dataloader_train)["unlabeled"]
    monkeypatch.setattr("nnssl.trainers.ict.draw_mixup", lambda alpha: 1.0)
    assert trainer.unsupervised_losses(unlabeled).terms["loss_consistency"].item() < 1e-10
    monkeypatch.setattr("nnssl.trainers.ict.draw_mixup", lambda alpha: 0.5)
    assert trainer.unsupervised_losses(unlabeled).terms["loss_consistency"].item() > 1e-8


def test_a_single_crop_is_warned_of(build, capsys):
    build("ICTTrainer", settings={"unlabeled_batch": 1})
    assert "no other to mix with" in capsys.readouterr().out
