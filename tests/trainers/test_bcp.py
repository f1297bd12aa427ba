"""Bidirectional copy-paste: what is shown where, what is learned where, and when."""

import pytest
import torch
from nnssl_test_tools import same, weights

from nnssl.training.mixing import paste


def seen_by(trainer):
    """Record what the network is given."""
    seen = []
    forward = trainer.network.forward
    trainer.network.forward = lambda x: seen.append(x.detach().clone()) or forward(x)
    return seen


def half_box():
    box = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    box[..., 8:24, 4:20] = True
    return box


def test_both_directions_show_and_count_what_the_paper_says(build, monkeypatch):
    trainer = build("BCPTrainer", settings={"deep_supervision": False, "largest_component": False})
    batch = next(trainer.dataloader_train)
    box, seen = half_box(), seen_by(trainer)
    monkeypatch.setattr("nnssl.trainers.bcp.random_box", lambda size, share, device: box)
    targets = []
    noisy_loss = trainer.noisy_loss
    trainer.noisy_loss = lambda output, target: targets.append(target.clone()) or noisy_loss(output, target)
    groups = list(trainer.compute_losses(batch))
    labeled, unlabeled = batch["data"], batch["unlabeled"]["strong"]
    assert torch.equal(seen[0], paste(unlabeled[:1], labeled[:1], box))
    assert torch.equal(seen[1], paste(labeled[1:], unlabeled[1:], box))
    assert [g.step for g in groups] == [(), ("network",)]
    ignored = trainer.pseudo_manager.ignore_label
    for target, truth, pasted in zip(targets, batch["target"].split(1), (box, ~box), strict=True):
        assert torch.equal(target == ignored, pasted)
        assert torch.equal(target[~pasted], truth[~pasted])
    with torch.no_grad():
        hard = trainer.teacher(batch["unlabeled"]["weak"]).argmax(1)
        counted = batch["unlabeled"]["valid"][0, 0] & box[0, 0]
        logits = trainer.network(seen[0])
        expected = 0.5 * torch.nn.functional.cross_entropy(logits[0, :, counted].T, hard[0][counted])
        counted = batch["unlabeled"]["valid"][1, 0] & ~box[0, 0]
        logits = trainer.network(seen[1])
        out = 0.5 * torch.nn.functional.cross_entropy(logits[0, :, counted].T, hard[1][counted])
    assert groups[0].terms["loss_pseudo_in"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert groups[1].terms["loss_pseudo_out"].item() == pytest.approx(out.item(), rel=1e-4)


def test_alpha_follows_its_schedule(build, monkeypatch):
    box = half_box()
    monkeypatch.setattr("nnssl.trainers.bcp.random_box", lambda size, share, device: box)
    terms = []
    for settings in ({}, {"unsupervised_schedule": "linear"}, {"unsupervised_weight": 1.5}):
        trainer = build("BCPTrainer", settings=settings)
        trainer.global_step = 2  # of 8
        terms.append({k: v for g in trainer.compute_losses(next(trainer.dataloader_train)) for k, v in g.terms.items()})
    for name, value in terms[0].items():
        factors = (0.25, 3.0) if "pseudo" in name else (1.0, 1.0)
        assert [t[name].item() / value.item() for t in terms[1:]] == pytest.approx(factors, rel=1e-4)


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_labeled_voxels_of_regions_weigh_what_they_do_in_the_control(build, deep_supervision):
    """With nothing ignored both losses are one; a data set with an ignore label has nnU-Net's sum in both."""
    generator = torch.Generator().manual_seed(0)
    logits, masks = torch.randn(2, 2, 32, 32, generator=generator), torch.rand(2, 2, 32, 32, generator=generator) > 0.5
    for labels in (
        {"background": 0, "whole": [1, 2], "ball": 2},
        {"background": 0, "whole": [1, 2], "ball": 2, "ignore": 3},
    ):
        trainer = build("BCPTrainer", settings={"deep_supervision": deep_supervision}, start=False)
        trainer.dataset_json |= {"labels": labels, "regions_class_order": [1, 2]}
        trainer = type(trainer)(trainer.plans_manager.plans, "2d", "all", trainer.dataset_json, torch.device("cpu"))
        trainer.initialize()
        noisy = torch.cat([masks, torch.zeros(2, 1, 32, 32, dtype=torch.bool)], 1)
        own = noisy if "ignore" in labels else masks
        levels = len(trainer._get_deep_supervision_scales()) if deep_supervision else 0
        results = [
            loss([logits] * levels or logits, [target] * levels or target).item()
            for loss, target in ((trainer.supervised_loss, own), (trainer.pseudo_loss, noisy))
        ]
        assert results[1] == pytest.approx(results[0], rel=1e-4)


def test_the_first_part_of_the_run_pastes_labeled_crops(build, monkeypatch):
    trainer = build("BCPTrainer", settings={"pretrain": 0.5})  # 8 steps in all
    batch = next(trainer.dataloader_train)
    box, seen = half_box(), seen_by(trainer)
    monkeypatch.setattr("nnssl.trainers.bcp.random_box", lambda size, share, device: box)
    names = []
    for step in (0, 3, 4):
        trainer.global_step = step
        names.append([name for group in trainer.compute_losses(batch) for name in group.terms])
    assert names[0] == names[1] == ["loss_supervised"]
    assert names[2] == ["loss_supervised_in", "loss_pseudo_in", "loss_supervised_out", "loss_pseudo_out"]
    assert torch.equal(seen[0], paste(batch["data"].flip(0), batch["data"], box))


def test_pretraining_pastes_targets_at_every_resolution(build, monkeypatch):
    """A box of one crop only: its label must be found where its image is, also in the lower resolutions."""
    trainer = build("BCPTrainer", settings={"pretrain": 0.9})
    batch = next(trainer.dataloader_train)
    assert isinstance(batch["target"], list)
    batch["target"] = [torch.stack([torch.ones_like(t[0]), torch.full_like(t[1], 2)]) for t in batch["target"]]
    batch["data"] = batch["target"][0].float()
    seen = seen_by(trainer)
    given = []
    trainer.loss = lambda output, target: given.extend(target) or output[0].sum()
    list(trainer.compute_losses(batch))
    assert torch.equal(seen[0], given[0].float())
    assert 0 < (given[0][0] == 2).float().mean() < 1
    for target in given[1:]:
        share = [(t == 2).float().mean((1, 2, 3)) for t in (target, given[0])]
        assert torch.allclose(*share, atol=0.15)


def test_the_largest_component_alone_is_learned(build):
    trainer = build("BCPTrainer")
    unlabeled = next(trainer.dataloader_train)["unlabeled"]
    logits = torch.zeros(2, 3, 32, 32)
    logits[:, 1, 2:4, 2:4] = logits[:, 1, 10:20, 10:20] = 5
    trainer.teacher.forward = lambda x: logits
    assert trainer._pseudo_label(unlabeled).sum() == 2 * 100


def test_the_unlabeled_crops_decide_what_is_learned(build):
    """Two trainers that differ in the unlabeled images alone end with other weights."""
    first, second = build("BCPTrainer"), build("BCPTrainer")
    batch = next(first.dataloader_train)
    other = {**batch, "unlabeled": {**batch["unlabeled"], "strong": batch["unlabeled"]["strong"].flip(-1)}}
    first.train_step(batch), second.train_step(other)
    assert not same(weights(first.network), weights(second.network))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_other_batch_sizes_train(build, batch_size):
    trainer = build("BCPTrainer", settings={"unlabeled_batch": batch_size})
    scalars = trainer.train_step(next(trainer.dataloader_train))
    assert scalars["loss_pseudo_in"] > 0
    assert scalars["loss_pseudo_out"] > 0


def test_surplus_unlabeled_items_are_warned_of_and_not_labeled(build, capsys):
    trainer = build("BCPTrainer", settings={"unlabeled_batch": 3})
    assert "2 labeled items and 3 unlabeled ones a step" in capsys.readouterr().out
    taught = []
    teach = trainer.teach
    trainer.teach = lambda x: taught.append(len(x)) or teach(x)
    list(trainer.compute_losses(next(trainer.dataloader_train)))
    assert taught == [2]
    build("BCPTrainer", settings={"unlabeled_batch": 2})
    assert "a step:" not in capsys.readouterr().out
