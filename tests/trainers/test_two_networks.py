"""The step of two peers, and the weights of classes in it."""

import math

import pytest
import torch
from nnssl_test_tools import same, weights
from torch.nn import functional

from nnssl.errors import UserError
from nnssl.trainers.adsh import AdaptiveThresholds
from nnssl.trainers.cld import CLDSettings
from nnssl.trainers.crest import reversed_rank_rate
from nnssl.trainers.depl import Prior
from nnssl.trainers.dhc import distribution_weights
from nnssl.trainers.registry import trainer_class
from nnssl.trainers.simis import missing_share
from nnssl.trainers.two_networks import TEACHER
from nnssl.trainers.weighted_supervision import class_weighted_supervision

PEERS = ("AdshTrainer", "CLDTrainer", "CPSTrainer", "CReSTTrainer", "DHCTrainer", "DePLTrainer", "SimiSTrainer")
COUNTED = ("CReSTTrainer", "SimiSTrainer")


def scene(trainer, seed=0):
    """Return logits of both peers, their hard labels and a mask, of the size of a toy crop."""
    generator = torch.Generator().manual_seed(seed)
    logits = {name: 2 * torch.randn(2, 3, 8, 8, generator=generator) for name in TEACHER}
    valid = torch.rand(2, 1, 8, 8, generator=generator) < 0.8
    hard = {name: trainer.pseudo_label(name, z) for name, z in logits.items()}
    return logits, hard, valid


def crossed(trainer, logits, hard, valid):
    """Return what is logged and both cross terms."""
    log = trainer.observe(logits, hard, valid)
    return log, {name: trainer.cross_loss(name, logits, hard, valid).item() for name in TEACHER}


@pytest.mark.parametrize("name", PEERS)
def test_the_cross_terms_alone_move_both_networks(build, name):
    settings = {"weight_decay": 0, "unsupervised_schedule": "constant"}
    trainer = build(name, settings=settings)
    trainer.labeled_loss = lambda name, output, target: output[0].sum() * 0
    before = {n: weights(trainer.trained_network(n)) for n in TEACHER}
    trainer.train_step(next(trainer.dataloader_train))
    assert not any(same(before[n], weights(trainer.trained_network(n))) for n in TEACHER)


@pytest.mark.parametrize("name", PEERS)
def test_the_weight_multiplies_the_cross_terms_and_no_gradient_reaches_the_teacher(build, name):
    totals = []
    for weight in (1.0, 3.0):
        trainer = build(name, settings={"unsupervised_weight": weight, "unsupervised_schedule": "constant"})
        torch.manual_seed(0)
        *_, group = trainer.compute_losses(next(trainer.dataloader_train))
        assert group.step == ("network", "peer")
        group.terms["loss_cross_network"].backward()
        assert all(p.grad is None for p in trainer.peer.parameters())
        totals.append(sum(term.item() for term in group.terms.values()))
    assert totals[1] / totals[0] == pytest.approx(3.0, rel=1e-4)


@pytest.mark.parametrize("deep", [True, False])
def test_supervision_without_preferences_is_nnunets(build, deep):
    trainer = build("DHCTrainer", settings={"deep_supervision": deep})
    batch = next(trainer.dataloader_train)
    output = trainer.network(batch["data"])
    plain = trainer.supervised_loss(output, batch["target"]).item()
    even, uneven = torch.ones(3), torch.tensor([1.0, 2.0, 3.0])
    assert class_weighted_supervision(trainer, output, batch["target"], even).item() == pytest.approx(plain, rel=1e-5)
    assert class_weighted_supervision(trainer, output, batch["target"], uneven).item() != pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize(("name", "weighed"), [("DHCTrainer", True), ("CReSTTrainer", False), ("CReSTTrainer", True)])
def test_the_setting_decides_whether_labels_are_weighed(build, name, weighed):
    trainer = build(name, settings={"weigh_labels": weighed})
    trainer.class_weights = lambda name: torch.tensor([0.5, 2.0, 3.0])
    batch = next(trainer.dataloader_train)
    output = trainer.network(batch["data"])
    plain = trainer.supervised_loss(output, batch["target"]).item()
    loss = trainer.labeled_loss("network", output, batch["target"]).item()
    assert (loss == plain) != weighed


@pytest.mark.parametrize("name", [*COUNTED, "DHCTrainer"])
def test_the_cross_term_is_torchs_weighted_cross_entropy(build, name):
    trainer = build(name)
    fixed = {"network": torch.tensor([0.2, 1.0, 3.0]), "peer": torch.tensor([2.0, 1.0, 0.0])}
    trainer.class_weights = fixed.get
    logits, hard, valid = scene(trainer)
    _, terms = crossed(trainer, logits, hard, valid)
    for learner, teacher in TEACHER.items():
        label = hard[teacher].where(valid, torch.full_like(hard[teacher], -100))[:, 0]
        expected = functional.cross_entropy(logits[learner], label, fixed[learner])
        assert terms[learner] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", COUNTED)
def test_weights_start_from_the_labels_and_follow_each_networks_own_predictions(build, name):
    trainer = build(name, settings={"class_decay": 0.5})
    logits, hard, valid = scene(trainer)
    target = torch.zeros(2, 1, 8, 8, dtype=torch.int64)
    target[:, :, :2], target[:, :, 2] = 1, 2
    for network in TEACHER:
        trainer.observe_labels(network, logits[network], target)
    start = trainer.rule(torch.tensor([80.0, 32.0, 16.0]))
    assert torch.allclose(trainer.class_weights("peer"), start)
    trainer.observe(logits, hard, valid)
    for network in TEACHER:
        counts = torch.tensor([float((hard[network][valid] == k).sum()) for k in range(3)])
        assert torch.allclose(trainer.class_weights(network), 0.5 * start + 0.5 * trainer.rule(counts))


@pytest.mark.parametrize(("name", "state"), [("CReSTTrainer", "weights"), ("DHCTrainer", "distribution")])
def test_labels_are_counted_until_the_weights_have_started_and_never_again(build, name, state):
    trainer = build(name)
    one, both = torch.zeros(2, 1, 8, 8, dtype=torch.int64), torch.zeros(2, 1, 8, 8, dtype=torch.int64)
    both[:, :, :3] = 1
    counted, count = [], trainer.count
    trainer.count = lambda *args: counted.append(1) or count(*args)

    def counts_of(target):
        counted.clear()
        trainer.observe_labels("peer", torch.randn(2, 3, 8, 8), target)
        return len(counted)

    assert [counts_of(target) for target in (one, both, both, one)] == [1, 1, 0, 0]  # one class tells no proportions
    part = trainer.weights["peer"] if state == "weights" else trainer.distribution
    started = {key: value.clone() for key, value in part.state_dict().items()}
    part.load_state_dict(started | {"started": torch.tensor(False)})
    assert counts_of(both) == 1
    part.load_state_dict(started)
    assert counts_of(both) == 0


def test_the_methods_that_dhc_compares_weigh_their_cross_terms_alike():
    defaults = {name: trainer_class(name).settings_class().unsupervised_weight for name in PEERS if name[:3] != "CPS"}
    assert set(defaults.values()) == {0.1}, defaults


@pytest.mark.parametrize("name", [*PEERS, "DiffCLTrainer"])
def test_a_batch_without_a_valid_unlabeled_voxel_gives_finite_numbers(build, name):
    trainer = build(name)
    batch = next(trainer.dataloader_train)
    batch["unlabeled"]["valid"][:] = False
    scalars = trainer.train_step(batch)
    assert scalars["agreement"] == 0
    assert all(math.isfinite(value) for value in scalars.values()), scalars


# ------------------------------------------------------------------------------------------------- rules of weights
def test_crest_gives_a_class_the_frequency_of_its_mirror():
    rates = reversed_rank_rate(torch.tensor([10.0, 1000.0, 100.0, 1.0]), 1 / 3)
    assert rates.tolist() == pytest.approx([0.1 ** (1 / 3), 0.001 ** (1 / 3), 0.01 ** (1 / 3), 1.0])


def test_simis_gives_a_class_what_it_lacks():
    assert missing_share(torch.tensor([60.0, 30.0, 10.0])).tolist() == pytest.approx([0.0, 0.9, 1.5])


def test_dhcs_distribution_weights_are_relative_logarithms():
    assert distribution_weights(torch.tensor([1000.0, 100.0, 10.0])).tolist() == pytest.approx([0.0, 1.5, 3.0])
    assert distribution_weights(torch.tensor([5.0, 5.0])).tolist() == [1, 1]


def test_dhc_biases_the_first_network_by_difficulty_and_the_second_by_distribution(build):
    trainer = build("DHCTrainer", settings={"beta": 0.5})
    logits, hard, valid = scene(trainer)
    target = hard["peer"].clone()  # the first network is wrong wherever both differ
    target[0, 0, 0, 0] = 1
    for network in TEACHER:
        trainer.observe_labels(network, logits[network], target)
    missing, state = [], trainer.difficulty
    for k in range(3):
        predicted, labeled = hard["network"] == k, target == k
        missing.append(1 - 2 * (predicted & labeled).sum() / (predicted.sum() + labeled.sum()))
    assert torch.allclose(state.reversed_dice, torch.stack(missing), atol=1e-6)
    assert trainer.class_weights("network").max().item() == pytest.approx(3.0)
    start = trainer.class_weights("peer").clone()
    trainer.observe(logits, hard, valid)
    counts = torch.tensor([float((hard["peer"][valid] == k).sum()) for k in range(3)])
    assert torch.allclose(trainer.class_weights("peer"), 0.5 * start + 0.5 * distribution_weights(counts))


# ----------------------------------------------------------------------------------------------------------- CLD
def test_cld_weighs_by_rarity_and_drops_by_the_learners_own_class(build):
    trainer = build("CLDTrainer")
    logits, hard, valid = scene(trainer)
    for network in TEACHER:
        trainer.observe_labels(network, logits[network], torch.zeros(2, 1, 8, 8, dtype=torch.int64))
    assert trainer.class_weights("network").tolist() == [1, 1, 1]  # no labeled voxel of two classes yet: finite
    trainer.counts.value = torch.tensor([800, 100, 0])
    rarity = torch.tensor([1.0, 2.0, 2.0])
    assert torch.allclose(trainer.class_weights("network"), rarity)
    trainer.banks["network"].value = torch.tensor([1.0, 0.5, 0.5])  # class 0 is known: its voxels go
    trainer.banks["peer"].value = torch.tensor([0.5, 1.0, 1.0])
    log, terms = crossed(trainer, logits, hard, valid)
    for learner, teacher in TEACHER.items():
        kept = ((hard[learner] > 0) == (learner == "network")) & valid
        loss = functional.cross_entropy(logits[learner], hard[teacher][:, 0], reduction="none")
        expected = (loss * rarity[hard[teacher][:, 0]] * kept[:, 0]).sum() / valid.sum()
        assert terms[learner] == pytest.approx(expected.item(), rel=1e-5)
    own = ((hard["network"] > 0) & valid).sum() / valid.sum()
    assert log["kept"].item() == pytest.approx(own.item())


def test_cld_must_do_something():
    with pytest.raises(UserError, match="CPSTrainer"):
        CLDSettings.from_mapping({"rarity": 0, "gamma": 0})


# ---------------------------------------------------------------------------------------------------------- DePL
def test_depls_prior_is_the_mean_prediction_of_voxels_that_count():
    probs = torch.tensor([[[0.9, 0.5, 0.1], [0.1, 0.5, 0.9]]])
    valid = torch.tensor([[[True, True, False]]])
    prior = Prior(2, 0.75)
    prior.update(probs, ~valid & False)
    assert prior.value.tolist() == [0.5, 0.5]
    prior.update(probs, valid)
    assert prior.value.tolist() == pytest.approx([0.75 * 0.5 + 0.25 * 0.7, 0.75 * 0.5 + 0.25 * 0.3])
    assert torch.isfinite(Prior(2, 0.0).log(probs)).all()


@pytest.mark.parametrize("margin", [True, False])
def test_depl_takes_the_bias_off_labels_and_puts_it_on_learners(build, margin):
    trainer = build("DePLTrainer", settings={"tau": 0.8, "threshold": 0.7, "margin": margin, "prior_decay": 0.5})
    prior = torch.tensor([0.9, 0.08, 0.02])
    for state in trainer.priors.values():
        state.value = prior
    logits, hard, valid = scene(trainer)
    shift = 0.8 * prior.log().view(1, 3, 1, 1)
    log, terms = crossed(trainer, logits, hard, valid)
    for learner, teacher in TEACHER.items():
        debiased = (logits[teacher] - shift).softmax(1)
        assert torch.equal(hard[teacher], debiased.argmax(1, keepdim=True))
        kept = (debiased.amax(1) >= 0.7) & valid[:, 0]
        assert 0 < kept.sum() < valid.sum()
        new = 0.5 * prior + 0.5 * logits[teacher].softmax(1).movedim(1, -1)[valid[:, 0]].mean(0)
        assert torch.allclose(trainer.priors[teacher].value, new)
        z = logits[learner] + (0.8 * new.log().view(1, 3, 1, 1) if margin else 0)
        loss = functional.cross_entropy(z, hard[teacher][:, 0], reduction="none")
        assert terms[learner] == pytest.approx(((loss * kept).sum() / valid.sum()).item(), rel=1e-5)
    assert (hard["network"] == 0).sum() < (logits["network"].argmax(1) == 0).sum()
    assert 0 < log["kept"] < 1


# ---------------------------------------------------------------------------------------------------------- Adsh
def confidences(seed=0):
    """Return labels and confidences of 5000 voxels, one class twice as frequent and more confident."""
    generator = torch.Generator().manual_seed(seed)
    label = (torch.rand(1, 1, 5000, generator=generator) < 1 / 3).long()
    confidence = torch.rand(1, 1, 5000, generator=generator)
    return label, torch.where(label == 0, confidence.sqrt(), confidence)


def test_adsh_keeps_the_same_share_of_every_class():
    label, confidence = confidences()
    state = AdaptiveThresholds(3, 0.9, window=2)
    everywhere = torch.ones_like(label, dtype=torch.bool)
    halves = everywhere.clone()
    halves[..., 2500:] = False
    state.update(label, confidence, halves)
    assert torch.equal(state.value, torch.full((3,), 0.9))  # the window is not over
    state.update(label, confidence, ~halves)
    share = [(confidence[label == k] >= state.value[k]).float().mean().item() for k in range(2)]
    assert share[0] == pytest.approx((confidence[label == 0] >= 0.9).float().mean().item(), abs=2e-3)
    assert share[1] == pytest.approx(share[0], abs=2e-3)
    assert state.value[1] < 0.85  # the class of lower confidence has the lower threshold
    assert state.value[2].item() == pytest.approx(0.9)  # never predicted
    assert state.histogram.sum() == state.batches == 0


def test_adsh_keeps_thresholds_while_no_voxel_of_the_major_class_is_confident():
    state = AdaptiveThresholds(3, 0.95, window=1)
    state.value = torch.tensor([0.5, 0.7, 0.6])
    label = torch.tensor([[[0, 0, 0, 1, 1]]])
    confidence = torch.tensor([[[0.9, 0.9, 0.9, 0.98, 0.98]]])
    state.update(label, confidence, torch.ones_like(label, dtype=torch.bool))
    assert state.value.tolist() == pytest.approx([0.95, 0.7, 0.6])  # the major class has tau_1 all the same


def test_adshs_thresholds_resume_exactly_within_a_window():
    label, confidence = confidences()
    state, other = AdaptiveThresholds(2, 0.9, window=2), AdaptiveThresholds(2, 0.9, window=2)
    state.update(label, confidence, label >= 0)
    other.load_state_dict({name: value.clone() for name, value in state.state_dict().items()})
    for each in (state, other):
        each.update(*confidences(1), label >= 0)
    assert torch.equal(state.value, other.value)
    assert not torch.equal(state.value, torch.full((2,), 0.9))


@pytest.mark.parametrize("rejected", ["ignore", "zero_logits"])
def test_adsh_rejects_voxels_below_the_teachers_threshold(build, rejected):
    trainer = build("AdshTrainer", settings={"rejected": rejected, "window": 50})
    limits = torch.tensor([0.9, 0.5, 0.7])
    for state in trainer.thresholds.values():
        state.value = limits
    logits, hard, valid = scene(trainer)
    _, terms = crossed(trainer, logits, hard, valid)
    for learner, teacher in TEACHER.items():
        probs, label = logits[teacher].softmax(1), hard[teacher][:, 0]
        if rejected == "ignore":
            counted = (probs.amax(1) >= limits[label]) & valid[:, 0]
            loss = functional.cross_entropy(logits[learner], label, reduction="none")
        else:
            counted = valid[:, 0]
            given = probs > limits.view(1, 3, 1, 1)
            loss = functional.cross_entropy(logits[learner] * given, label, reduction="none")
        assert 0 < counted.sum() < label.numel()
        assert terms[learner] == pytest.approx(((loss * counted).sum() / valid.sum()).item(), rel=1e-5)
