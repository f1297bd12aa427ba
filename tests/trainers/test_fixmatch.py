"""FixMatch's loss against its formula written voxel by voxel."""

import pytest
import torch

from nnssl.errors import UserError
from nnssl.trainers.fixmatch import FixMatchSettings
from nnssl.training.label_space import LabelSpace


def unlabeled_of(trainer):
    unlabeled = next(trainer.dataloader_train)["unlabeled"]
    unlabeled["valid"][:, :, :5] = False
    return unlabeled


def views(trainer, unlabeled):
    with torch.no_grad():
        return (trainer.predict_logits(unlabeled[name]).softmax(1) for name in ("weak", "strong"))


@pytest.mark.parametrize("average", ["all", "kept"])
def test_the_loss_is_the_formula(build, average):
    trainer = build("FixMatchTrainer", settings={"threshold": 0.4, "average": average})
    unlabeled = unlabeled_of(trainer)
    q, p = views(trainer, unlabeled)
    valid = unlabeled["valid"][:, 0]
    kept = valid & (q.amax(1) >= 0.4)
    assert 0 < kept.sum() < valid.sum()
    likelihood = p.gather(1, q.argmax(1, keepdim=True))[:, 0]
    expected = -likelihood[kept].log().sum() / (valid if average == "all" else kept).sum()
    group = trainer.unsupervised_losses(unlabeled)
    assert group.terms["loss_weak_to_strong"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert group.log["kept"].item() == pytest.approx((kept.sum() / valid.sum()).item())


def test_ssl4mis_makes_background_of_what_it_rejects(build):
    trainer = build("FixMatchTrainer", settings={"pl_rule": "ssl4mis", "threshold": 0.8})
    probs = torch.tensor([[0.1, 0.46, 0.44], [0.05, 0.05, 0.9]]).T.reshape(1, 3, 2, 1)
    label, kept = trainer.pseudo_label(probs)
    assert label.flatten().tolist() == [0, 2]  # the first voxel's best class reaches (.46 - .1) / .46 = 0.78
    assert kept.all()


def test_no_gradient_passes_through_the_label(build):
    trainer = build("FixMatchTrainer")
    unlabeled = unlabeled_of(trainer)
    seen = []
    forward = trainer.network.forward
    trainer.network.forward = lambda x: seen.append(torch.is_grad_enabled()) or forward(x)
    trainer.unsupervised_losses(unlabeled)
    assert seen == [False, True]


def test_what_cannot_be_is_refused(build):
    with pytest.raises(UserError, match="below 1"):
        FixMatchSettings.from_mapping({"pl_rule": "ssl4mis", "threshold": 1})
    trainer = build("FixMatchTrainer", settings={"pl_rule": "ssl4mis"}, start=False)
    trainer.label_space = LabelSpace(2, regions=True)
    with pytest.raises(UserError, match="exclusive classes"):
        trainer.build_method()
