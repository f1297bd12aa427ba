"""Debiased self-training: who learns from what, and the worst case."""

import pytest
import torch
from nnssl_test_tools import same, weights
from torch.nn import functional

from nnssl.trainers.dst import MAIN, PSEUDO, WORST, wrong_on


def decoders(trainer):
    return [trainer.network.decoder, *trainer.network.auxiliary]


def gradients(module):
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def test_the_worst_case_is_the_logarithm_of_the_rest():
    generator = torch.Generator().manual_seed(0)
    logits, label = torch.randn(2, 3, 5, generator=generator), torch.randint(0, 3, (2, 1, 5), generator=generator)
    valid = torch.rand(2, 1, 5, generator=generator) < 0.7
    p = logits.double().softmax(1).gather(1, label)
    assert wrong_on(logits, label, valid).item() == pytest.approx(-(1 - p).log()[valid].mean().item(), rel=1e-5)
    assert wrong_on(logits, label, valid & False) == 0
    sure = torch.tensor([[[40.0], [0.0], [0.0]]], requires_grad=True)
    loss = wrong_on(sure, torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(40 - 0.6931, rel=1e-4)
    assert torch.isfinite(sure.grad).all()


def test_each_decoder_learns_from_its_own_terms(build):
    trainer = build("DSTTrainer", settings={"unsupervised_schedule": "constant"})
    batch = next(trainer.dataloader_train)
    learners = {
        "loss_supervised": [MAIN],
        "loss_worst_labeled": [WORST],
        "loss_pseudo_label": [PSEUDO],
        "loss_worst_unlabeled": [WORST],
    }
    seen = set()
    for group in trainer.compute_losses(batch):
        for name, term in list(group.terms.items()):
            trainer.network.zero_grad(set_to_none=True)
            term.backward(retain_graph=True)
            assert [i for i, decoder in enumerate(decoders(trainer)) if gradients(decoder.seg_layers)] == learners[name]
            seen.add(name)
        group.terms.clear()
    assert seen == set(learners)


def test_the_encoder_gets_the_worst_cases_gradient_reversed(build):
    trainer = build("DSTTrainer", settings={"reversal": 0.4})
    trainer.global_step = 4  # half of the run
    x = next(trainer.dataloader_train)["unlabeled"]["strong"]
    results = []
    for forward in (lambda: trainer.decode(x, WORST)[0], lambda: trainer.network(x, every=True)[WORST]):
        trainer.network.zero_grad(set_to_none=True)
        output = forward()
        sum(z.square().sum() for z in output).backward()
        results.append((output, gradients(trainer.network.encoder), gradients(decoders(trainer)[WORST])))
    (ours, encoder, decoder), (plain, straight, expected) = results
    assert same(ours, plain)
    assert same(decoder, expected)
    ours, straight = (torch.cat([g.flatten() for g in gs]) for gs in (encoder, straight))
    assert torch.allclose(ours, -0.2 * straight, atol=1e-5 * straight.abs().max().item())


def test_the_terms_are_the_formula(build):
    settings = {"unsupervised_weight": 0.5, "unsupervised_schedule": "constant", "eta": 3.0, "threshold": 0.45}
    trainer = build("DSTTrainer", settings=settings)
    batch = next(trainer.dataloader_train)
    batch["unlabeled"]["valid"][..., :4] = False
    valid, truth = batch["unlabeled"]["valid"][:, 0], batch["target"][0][:, 0].long()
    with torch.no_grad():
        labeled = trainer.network(batch["data"], every=True)
        q = trainer.predict_logits(batch["unlabeled"]["weak"]).softmax(1)
        strong = [z[0] for z in trainer.network(batch["unlabeled"]["strong"], every=True)]
        expected = {
            "loss_supervised": trainer.supervised_loss(labeled[MAIN], batch["target"]),
            "loss_worst_labeled": 0.5 * 3.0 * functional.cross_entropy(labeled[WORST][0], truth),
        }
    label, kept = q.argmax(1), (q.amax(1) >= 0.45) & valid
    assert 0 < kept.sum() < valid.sum()
    cost = functional.cross_entropy(strong[PSEUDO], label, reduction="none")
    expected["loss_pseudo_label"] = 0.5 * cost[kept].sum() / valid.sum()
    rest = 1 - strong[WORST].softmax(1).gather(1, label[:, None])[:, 0]
    expected["loss_worst_unlabeled"] = -0.5 * rest.log()[valid].mean()
    scalars = trainer.train_step(batch)
    for name, value in expected.items():
        assert scalars[name] == pytest.approx(value.item(), rel=1e-4), name
    assert scalars["kept"] == pytest.approx((kept.sum() / valid.sum()).item())


def test_the_worst_case_rests_where_none_of_it_would_reach_the_encoder(build, capsys):
    trainer = build("DSTTrainer", settings={"reversal": 0, "unsupervised_schedule": "constant", "weight_decay": 0})
    assert "reversal=0" in capsys.readouterr().out
    before = [weights(decoder) for decoder in decoders(trainer)]
    scalars = trainer.train_step(next(trainer.dataloader_train))
    assert not [name for name in scalars if "worst" in name]
    moved = [not same(old, weights(decoder)) for old, decoder in zip(before, decoders(trainer), strict=True)]
    assert moved == [True, True, False]
    build("DSTTrainer", settings={"reversal": 0, "unsupervised_weight": 0})
    assert "reversal=0" not in capsys.readouterr().out
