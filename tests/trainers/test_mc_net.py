"""MC-Net's trainer."""

import pytest
import torch
from nnssl_test_tools import same, weights

from nnssl.losses.consistency import mutual_consistency


@pytest.mark.parametrize("decoders", [2, 3])
def test_the_terms_are_the_formula(build, decoders):
    settings = {"decoders": decoders, "unsupervised_schedule": "constant", "unlabeled_batch": 3}
    trainer = build("MCNetTrainer", settings=settings)
    batch = next(trainer.dataloader_train)
    batch["unlabeled"]["valid"][:] = True
    with torch.no_grad():
        labeled, unlabeled = (
            [output[0].softmax(1) for output in trainer.network(x, every=True)]
            for x in (batch["data"], batch["unlabeled"]["strong"])
        )
    scalars = trainer.train_step(batch)
    assert len([name for name in scalars if name.startswith("loss_supervised_")]) == decoders
    together = mutual_consistency([torch.cat(pair) for pair in zip(labeled, unlabeled, strict=True)], 0.1)
    assert scalars["loss_mutual_labeled"] + scalars["loss_mutual_unlabeled"] == pytest.approx(together.item(), rel=1e-4)


def test_padding_of_unlabeled_crops_does_not_count(build):
    trainer = build("MCNetTrainer", settings={"unsupervised_schedule": "constant"})
    batch = next(trainer.dataloader_train)
    valid = batch["unlabeled"]["valid"]
    valid[:] = True
    valid[..., :20] = False
    with torch.no_grad():
        probs = [output[0].softmax(1) for output in trainer.network(batch["unlabeled"]["strong"], every=True)]
        expected = mutual_consistency([p[..., 20:] for p in probs], 0.1) / 2
    *_, group = trainer.compute_losses(batch)
    assert group.terms["loss_mutual_unlabeled"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_every_decoder_learns_and_is_watched(build):
    trainer = build("MCNetTrainer", settings={"decoders": 3})
    parts = [trainer.network.decoder, *trainer.network.auxiliary]
    before = [weights(part.seg_layers) for part in parts]
    batch = next(trainer.dataloader_train)
    trainer.train_step(batch)
    assert not any(same(b, weights(part.seg_layers)) for b, part in zip(before, parts, strict=True))
    assert set(trainer.branches(batch["data"])) == {"decoder_1", "decoder_2", "decoder_3"}


def test_settings_reach_the_consistency(build, monkeypatch):
    """Published targets carry a gradient and are sharpened class by class."""
    given = []
    monkeypatch.setattr(
        "nnssl.trainers.mc_net.mutual_consistency", lambda probs, *rest: given.append(rest) or probs[0].sum()
    )
    published = {"sharpening": "binary", "detach_targets": False, "temperature": 0.3}
    for settings in ({}, published):
        trainer = build("MCNetTrainer", settings=settings)
        trainer.train_step(next(trainer.dataloader_train))
    assert [(rest[0], *rest[2:]) for rest in given[::2]] == [(0.1, False, True), (0.3, True, False)]
