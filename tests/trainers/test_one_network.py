"""The step that methods with one trained network share, and their teacher."""

import pytest
import torch

NAMES = ("MeanTeacherTrainer", "FixMatchTrainer", "URPCTrainer")


def groups_of(trainer, batch):
    torch.manual_seed(0)
    return list(trainer.compute_losses(batch))


@pytest.mark.parametrize("name", NAMES)
def test_terms_are_multiplied_by_the_weight_of_the_schedule(build, name):
    totals = []
    for weight, schedule, step in ((1.0, "constant", 0), (3.0, "constant", 0), (3.0, "linear", 2)):
        settings = {"unsupervised_weight": weight, "unsupervised_schedule": schedule}
        trainer = build(name, settings=settings)  # 8 steps in all
        batch = next(trainer.dataloader_train)
        batch["unlabeled"]["weak"] = batch["unlabeled"]["weak"].flip(-1)  # teacher and student disagree
        trainer.global_step = step
        supervised, unsupervised = groups_of(trainer, batch)
        assert (supervised.step, unsupervised.step) == ((), ("network",))
        totals.append(sum(unsupervised.terms.values()).item())
    assert totals[0] > 0
    assert totals[1] / totals[0] == pytest.approx(3.0, rel=1e-4)
    assert totals[2] / totals[0] == pytest.approx(0.75, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("without", ["cases", "weight"])
def test_without_unlabeled_cases_or_weight_the_labels_alone_are_learned(build, name, without):
    trainer = build(name, settings={"unsupervised_schedule": "warmup50"})
    batch = next(trainer.dataloader_train)
    if without == "cases":
        trainer.global_step = 6
        del batch["unlabeled"]
    (group,) = groups_of(trainer, batch)
    assert set(group.terms) == {"loss_supervised"}
    assert group.step == ("network",)


def test_the_teacher_teaches_without_gradient_and_its_decay_is_the_setting(build):
    trainer = build("ICTTrainer", settings={"ema_decay": 0.4})
    x = next(trainer.dataloader_train)["unlabeled"]["weak"].requires_grad_()
    probs = trainer.teach(x)
    assert not probs.requires_grad
    assert torch.allclose(probs.sum(1), torch.ones(2, 32, 32), atol=1e-5)
    assert trainer.teachers["teacher"][0] == "network"
    assert trainer.teachers["teacher"][1].decay == 0.4
