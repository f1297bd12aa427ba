"""What DiffRect promises beyond the contract: who learns from what, when L_Rect acts, and that every switch works."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from nnssl_test_tools import weights

from nnssl.cli import train
from nnssl.errors import UserError
from nnssl.networks.conv_unet import LiteratureUNet
from nnssl.networks.rectifier import Rectified, Sampling, latent_size, rectifier_levels
from nnssl.plans.preset import load_preset
from nnssl.trainers.base import to_device
from nnssl.trainers.diffrect_settings import DiffRectSettings, rectifier_shape, segmentation_architecture
from nnssl.trainers.settings import Settings
from nnssl.training.coloring import colorize

#: All weights at their full size from the first step.
AT_ONCE = {"unsupervised_schedule": "constant", "rect_schedule": "constant"}
LITERATURE = {"network": "literature", "deep_supervision": False}
CODE = {"norm": "batch", "conditioning": "additive", "inject": "skip", "clamp": True}
#: What the code adds to the losses.
CODE_LOSSES = {"complementary": True, "pl_dice": 1.0, "squared_dice": True, "pl_rule": "ssl4mis", "pl_threshold": 0.8}
NETWORK_TERMS = {"loss_supervised", "loss_weak_to_strong", "loss_complementary", "loss_rectification"}
RECTIFIER_TERMS = {
    "loss_rect_w2g",
    "loss_latent_l",
    "loss_rect_s2w",
    "loss_rect_s2g",
    "loss_latent_u",
    "loss_rect_complementary",
}


@pytest.fixture
def made(build):
    """Return a function that builds a trainer whose terms all have their full weight."""

    def make(configuration="2d", options=None, start=True, **settings):
        return build("DiffRectTrainer", configuration, {**AT_ONCE, **settings}, options, start)

    return make


def steps(trainer, count: int) -> list[dict[str, float]]:
    return [trainer.train_step(next(trainer.dataloader_train)) for _ in range(count)]


def at_step(trainer, step: int) -> dict[str, float]:
    """Run one step as the given one of the run."""
    trainer.global_step = step
    return steps(trainer, 1)[0]


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("supervised_view", ["strong", "weak"])
def test_no_gradient_crosses_between_network_and_rectifier(made, supervised_view):
    trainer = made(supervised_view=supervised_view, **CODE_LOSSES)
    batch = to_device(next(trainer.dataloader_train), trainer.device)
    reached: dict[str, set[str]] = {}
    for group in trainer.compute_losses(batch):
        for term, value in group.terms.items():
            for name in ("network", "rectifier"):
                parameters = list(trainer.trained_network(name).parameters())
                grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
                if any(grad is not None for grad in grads):
                    reached.setdefault(term, set()).add(name)
    expected = {term: {"network"} for term in NETWORK_TERMS} | {term: {"rectifier"} for term in RECTIFIER_TERMS}
    assert reached == expected


def test_with_weight_zero_and_no_rectification_the_network_is_the_supervised_control(made, build):
    method, control = made(unsupervised_weight=0, rect_start=1), build("SupervisedTrainer")
    scalars = steps(method, 2)
    steps(control, 2)
    assert "loss_rect_w2g" in scalars[0]  # the rectifier trains
    for ours, theirs in zip(weights(method.network), weights(control.network), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("merged", [False, True])
def test_the_network_steps_twice_an_iteration_or_once(made, merged):
    trainer, taken = made(merged=merged, rect_start=0.5), []
    for name, optimizer in trainer.stepper.optimizers.items():
        optimizer.register_step_post_hook(lambda *_, name=name: taken.append(name))
    at_step(trainer, 0)  # L_Rect has not begun
    assert taken == ["network", "rectifier"]
    taken.clear()
    at_step(trainer, 4)
    assert taken == ["rectifier", "network"] if merged else taken == ["network", "rectifier", "network"]


# -------------------------------------------------------------------------------------------- when and how much


@pytest.mark.parametrize(
    ("start", "iteration", "first"), [(0.5, 0, 4), (0.0, 3, 3), (0.25, 5, 5), (0.7, 2, 6), (0.85, 7, 7)]
)
def test_rectification_begins_at_the_later_of_fraction_and_iteration(made, capsys, start, iteration, first):
    trainer = made(rect_start=start, rect_start_iteration=iteration)
    assert "never starts" not in capsys.readouterr().out
    assert "loss_rectification" not in at_step(trainer, first - 1)
    assert "loss_rectification" in at_step(trainer, first)


@pytest.mark.parametrize("never", [{"rect_start": 0.95}, {"rect_start": 1}, {"rect_start_iteration": 8}])
def test_a_rectification_that_never_starts_is_warned_of(made, capsys, never):
    trainer = made(**never)
    assert "WARNING: L_Rect never starts within 8 iterations" in capsys.readouterr().out
    assert "loss_rectification" not in at_step(trainer, 7)


def test_weights_enter_the_terms_as_equation_13_has_them(made):
    base = steps(made(complementary=True), 1)[0]
    weighty = {"unsupervised_weight": 2.0, "rect_weight": 3.0, "lat_l_weight": 5.0, "lat_u_weight": 7.0}
    changed = steps(made(complementary=True, merged=True, **weighty), 1)[0]
    factors = {
        "loss_supervised": 1,
        "loss_weak_to_strong": 2,
        "loss_complementary": 2,
        "loss_rect_w2g": 1,
        "loss_latent_l": 5,
        "loss_rect_s2w": 2,
        "loss_rect_s2g": 1,
        "loss_rect_complementary": 2,
        "loss_latent_u": 2 * 7,
    }
    for term, factor in factors.items():
        assert changed[term] == pytest.approx(factor * base[term], rel=1e-4), term


def test_rectification_has_its_own_weight_and_schedule(made):
    trainer = made(rect_schedule="linear", rect_weight=3.0, rect_start=0.25)
    weights = []
    for trainer.global_step in range(8):
        weights.append(trainer._rect_weight())
    assert weights == [0.0, 0.0, *(pytest.approx(3 * i / 8) for i in range(2, 8))]


def test_nothing_is_rectified_before_the_rectifier_has_learned(made):
    only_unlabeled = {"w2g": False, "s2w_target": "weak", "strong_guidance": "weak"}
    trainer = made(rect_start=0, unsupervised_schedule="warmup50", **only_unlabeled)
    assert "loss_rectification" not in at_step(trainer, 0)
    assert "loss_rectification" in at_step(trainer, 4)


def entropy_and_dice(logits, target, counted) -> tuple[float, float]:
    """Return the mean cross-entropy and 1 - Dice (smoothing 1, foreground, over the batch) of counted voxels."""
    p = logits.softmax(1).movedim(1, 0).flatten(1)[:, counted.flatten()].double().numpy()
    y = np.eye(len(p))[target.flatten()[counted.flatten()]].T
    dice = (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)
    return -np.log((p * y).sum(0)).mean(), 1 - dice[1:].mean()


@pytest.mark.parametrize("target", ["rectified", "weak"])
def test_hard_labels_are_learned_where_they_count_by_the_loss_of_the_settings(made, target):
    """R's terms and L_Semi by hand, with unsure voxels and voxels outside the mask."""
    trainer, of_theta, of_r = made(pl_threshold=0.4, pl_dice=0.5, s2w_target=target, s2g=False), [], []
    batch = to_device(next(trainer.dataloader_train), trainer.device)
    unlabeled, n = batch["unlabeled"], len(batch["data"])
    unlabeled["valid"] = torch.rand(unlabeled["valid"].shape, generator=torch.Generator().manual_seed(0)) > 0.3
    trainer.network.register_forward_hook(lambda _, args, out: of_theta.append(out[0].detach()))
    trainer.rectifier.register_forward_hook(lambda _, args, out: of_r.append(out.logits.detach()))
    terms = {name: v.item() for g in trainer.compute_losses(batch) for name, v in g.terms.items()}
    (strong, weak, *_), (w2g, s2w, _), valid = of_theta, of_r, unlabeled["valid"]
    labels = {"weak": weak.softmax(1).max(1), "rectified": w2g.softmax(1).max(1)}
    sure = {name: (p >= 0.4)[n:, None] & valid for name, (p, _) in labels.items()}
    assert 0 < sure["weak"].sum() < valid.sum()  # the threshold decides something
    entropy, dice = entropy_and_dice(strong[n:], labels["weak"][1][n:], sure["weak"])
    assert terms["loss_weak_to_strong"] == pytest.approx(entropy + 0.5 * dice, rel=1e-4)
    entropy, dice = entropy_and_dice(s2w, labels[target][1][n:], sure[target])
    assert terms["loss_rect_s2w"] == pytest.approx(entropy + 0.5 * dice, rel=1e-4)
    truth = batch["target"][0]
    entropy, dice = entropy_and_dice(w2g[:n], truth.long(), trainer.label_space.valid(truth))
    assert terms["loss_rect_w2g"] == pytest.approx(entropy + dice, rel=1e-4)


def test_the_codes_ramp_has_its_published_values():
    settings = DiffRectSettings(unsupervised_weight=0.1)
    for step, published in {
        0: 0.00067,
        1_000: 0.0009,
        3_000: 0.0017,
        7_500: 0.0060,
        15_000: 0.0287,
        22_500: 0.0732,
        30_000: 0.1,
    }.items():
        assert settings.unsupervised(step / 30_000) == pytest.approx(published, abs=6e-5)


@pytest.mark.parametrize("schedule", ["constant", "poly"])
def test_the_rectifier_has_an_optimizer_and_a_learning_rate_of_its_own(made, schedule):
    trainer = made(rectifier_lr_schedule=schedule, rectifier_optimizer="adam", rectifier_lr=0.003)
    at_step(trainer, 6)
    rates = {name: o.param_groups[0]["lr"] for name, o in trainer.stepper.optimizers.items()}
    left = (1 - 6 / 8) ** 0.9
    expected = {"network": 0.01 * left, "rectifier": 0.003 * (left if schedule == "poly" else 1)}
    assert rates == pytest.approx(expected)
    assert isinstance(trainer.stepper.optimizers["network"], torch.optim.SGD)
    assert isinstance(trainer.stepper.optimizers["rectifier"], torch.optim.Adam)


# ------------------------------------------------------------------------------------------ what R is given


def recorded_step(trainer) -> tuple[dict, list[dict]]:
    """Run one step; return its batch and what each call of the rectifier was given."""
    calls: list[dict] = []
    trainer.rectifier.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append({**dict(zip(("image", "label", "tau"), args, strict=True)), **kwargs}),
        with_kwargs=True,
    )
    batch = next(trainer.dataloader_train)
    trainer.train_step(copy.deepcopy(batch))
    return batch, calls


def classes_of(colored, colors) -> np.ndarray:
    """Return the class of every voxel of colored maps (b, voxels)."""
    return torch.cdist(colored.movedim(1, -1).flatten(1, -2), colors).argmin(-1).numpy()


def guidance_by_hand(maps, better, valid) -> list[float]:
    """Return 999 (1 - Dice) of each item, the mean over the classes that the better map holds."""
    rows = []
    for a, b, counts in zip(maps, better, valid.flatten(1).numpy(), strict=True):
        a, b = a[counts], b[counts]
        present = np.unique(b)
        rows.append(np.mean([2 * ((a == c) & (b == c)).sum() / ((a == c).sum() + (b == c).sum()) for c in present]))
    return [999 * (1 - row) for row in rows]


def test_the_rectifier_is_given_what_the_paper_says(made):
    trainer = made(guidance_per_item=True, s2g=False)
    batch, (w2g, s2w, rectify) = recorded_step(trainer)
    n, truth, unlabeled, colors = len(batch["data"]), batch["target"][0], batch["unlabeled"], trainer.colors
    assert torch.equal(w2g["image"], torch.cat([batch["weak"], unlabeled["weak"]]))
    assert torch.equal(s2w["image"], unlabeled["strong"])  # labeled items would enter none of its losses
    # W2G: better is the truth of l, and u's own label
    assert torch.equal(w2g["good"][:n], colorize(truth, colors))
    assert torch.equal(w2g["good"][n:], w2g["label"][n:])
    # S2W: better is the weak view's label
    assert torch.equal(s2w["good"], w2g["label"][n:])
    assert s2w["good_image"] is None
    assert not torch.equal(s2w["label"], w2g["label"][n:])
    # tau: of the weak label against the truth; items without a better map of their own take the mean
    y_w = classes_of(w2g["label"], colors)[:n]
    by_hand = guidance_by_hand(y_w, truth.flatten(1).numpy(), trainer.label_space.valid(truth))
    assert w2g["tau"][:n].tolist() == pytest.approx(by_hand, rel=1e-4)
    assert w2g["tau"][n:].tolist() == pytest.approx([w2g["tau"][:n].mean().item()] * len(w2g["tau"][n:]))
    # rectification of u: the label from before the step, guided by the labeled tau
    assert torch.equal(rectify["image"], unlabeled["weak"])
    assert torch.equal(rectify["label"], w2g["label"][n:])
    assert rectify["tau"].tolist() == pytest.approx([w2g["tau"][:n].mean().item()] * len(rectify["tau"]))
    assert rectify["sampling"] == Sampling(2, "ddim", False)


def test_damaged_weak_labels_are_mended_and_guided_by_their_own_distance(made):
    trainer = made(guidance_per_item=True, damage=1.0)
    batch, (w2g, _, rectify) = recorded_step(trainer)
    n, truth, colors = len(batch["data"]), batch["target"][0], trainer.colors
    labels = classes_of(w2g["label"], colors)
    by_hand = guidance_by_hand(labels[:n], truth.flatten(1).numpy(), trainer.label_space.valid(truth))
    assert w2g["tau"][:n].tolist() == pytest.approx(by_hand, rel=1e-4)
    assert torch.equal(w2g["good"][:n], colorize(truth, colors))
    # u keeps its label, and so does what is rectified
    assert torch.equal(w2g["good"][n:], w2g["label"][n:])
    assert torch.equal(rectify["label"], w2g["label"][n:])
    _, (whole, *_) = recorded_step(made(damage=0.0))
    assert not torch.equal(whole["label"][:n], w2g["label"][:n])
    assert torch.equal(whole["label"][n:], w2g["label"][n:])


def test_guidance_counts_the_classes_and_items_the_settings_name(made):
    """Item 0 is all background with one false voxel, item 1 is half wrong."""
    better = torch.zeros(2, 1, 8, 8, dtype=torch.long)
    better[1, :, 4:] = 1
    labels = better.clone()
    labels[0, 0, 0, 0], labels[1, :, 2:] = 1, 1
    valid = torch.ones_like(labels, dtype=torch.bool)
    taus = {}
    for per_item, present in ((False, True), (True, True), (True, False)):
        trainer = made(guidance_per_item=per_item, guidance_present=present)
        taus[per_item, present] = trainer._tau(labels, better, valid).tolist()
    background, foreground = 2 * (63 + 16) / (63 + 16 + 64 + 32), 2 * 32 / (1 + 48 + 32)
    assert taus[False, True] == pytest.approx([999 * (1 - (background + foreground) / 2)] * 2, rel=1e-4)
    alone = (2 * 63 / 127, (2 * 16 / 48 + 2 * 32 / 80) / 2)
    assert taus[True, True] == pytest.approx([999 * (1 - value) for value in alone], rel=1e-4)
    classes = trainer.label_space.num_heads
    counted = ((2 * 63 / 127 + 0 + classes - 2) / classes, (2 * alone[1] + classes - 2) / classes)
    assert taus[True, False] == pytest.approx([999 * (1 - value) for value in counted], rel=1e-4)


def test_the_rectifier_may_start_from_the_label_it_mends(made):
    trainer = made(label_residual=3.0)
    raw = []
    trainer.rectifier.register_forward_hook(lambda _, args, out: raw.append(out.logits))
    image, labels = torch.randn(2, 1, 32, 32), torch.randint(0, 3, (2, 1, 32, 32))
    with torch.no_grad():
        sampled = trainer._sampled(image, labels)
        trained = trainer._transport(image, labels, torch.zeros(2), labels)
    for out, plain in zip((sampled, trained), raw, strict=True):
        added = out.logits - plain
        assert torch.allclose(added.gather(1, labels), torch.tensor(3.0), atol=1e-5)
        assert torch.allclose(added.sum(1), torch.tensor(3.0), atol=1e-5)


def test_strong_labels_are_compared_with_the_rectified_or_the_weak_ones(made):
    taus = {}
    for reference in ("rectified", "weak"):
        trainer, answers = made(guidance_per_item=True, strong_guidance=reference, s2g=False), []
        trainer.rectifier.register_forward_hook(lambda _, args, out, seen=answers: seen.append(out.logits.argmax(1)))
        batch, (w2g, s2w, _) = recorded_step(trainer)
        n, colors = len(batch["data"]), trainer.colors
        peer = answers[0].flatten(1).numpy() if reference == "rectified" else classes_of(w2g["label"], colors)
        by_hand = guidance_by_hand(classes_of(s2w["label"], colors), peer[n:], batch["unlabeled"]["valid"])
        taus[reference] = s2w["tau"].tolist()
        assert taus[reference] == pytest.approx(by_hand, rel=1e-4)
    assert taus["rectified"] != pytest.approx(taus["weak"], rel=1e-3)


def test_the_better_map_of_strong_to_weak_may_lie_beside_the_weak_image(made):
    batch, (_, s2w, _) = recorded_step(made(s2w_image="weak", s2g=False))
    assert torch.equal(s2w["good_image"], batch["unlabeled"]["weak"])


@pytest.mark.parametrize("whole", [{"latent_rows": "all"}, {"norm": "batch"}, {"s2g": True}])
def test_strong_to_weak_sees_labeled_items_where_they_count(made, whole):
    batch, (w2g, s2w, _) = recorded_step(trainer := made(**{"s2g": False, "guidance_per_item": True, **whole}))
    n, truth = len(batch["data"]), batch["target"][0]
    assert torch.equal(s2w["image"], torch.cat([batch["data"], batch["unlabeled"]["strong"]]))
    assert torch.equal(s2w["good"][n:], w2g["label"][n:])
    if "s2g" in whole:  # strong labels of l are compared with the truth, and lead to it
        strong = classes_of(s2w["label"], trainer.colors)[:n]
        by_hand = guidance_by_hand(strong, truth.flatten(1).numpy(), trainer.label_space.valid(truth))
        assert torch.equal(s2w["good"][:n], colorize(truth, trainer.colors))
        assert s2w["tau"][:n].tolist() == pytest.approx(by_hand, rel=1e-4)
    else:
        assert torch.equal(s2w["good"][:n], w2g["label"][:n])
        assert s2w["tau"][:n].tolist() == pytest.approx([s2w["tau"][n:].mean().item()] * n)


def test_rectification_may_be_guided_by_the_distance_of_the_two_views(made):
    trainer = made(guidance_per_item=True, rectify_guidance="own", s2g=False)
    batch, (w2g, s2w, rectify) = recorded_step(trainer)
    n, colors = len(batch["data"]), trainer.colors
    strong, weak = classes_of(s2w["label"], colors), classes_of(w2g["label"], colors)[n:]
    by_hand = guidance_by_hand(strong, weak, batch["unlabeled"]["valid"])
    assert rectify["tau"].tolist() == pytest.approx(by_hand, rel=1e-4)
    assert trainer.tau.value.item() == pytest.approx(np.mean(by_hand), rel=1e-4)  # what monitoring takes


@pytest.mark.parametrize(("chosen", "steps"), [("visited", {0, 9}), ("all", set(range(10)))])
def test_the_rectifier_trains_at_the_time_steps_a_sampling_visits_or_at_all(made, chosen, steps):
    trainer, drawn = made(time_steps=chosen), []
    trainer.rectifier.forward = lambda *args, t, **kwargs: drawn.extend(t.tolist())
    labels = torch.zeros(200, 1, 4, 4, dtype=torch.long)
    trainer._transport(torch.zeros(200, 1, 4, 4), labels, torch.zeros(200), labels)
    assert set(drawn) == steps


def test_ignored_voxels_keep_the_networks_label_in_the_better_map(made):
    trainer = made()
    batch = to_device(next(trainer.dataloader_train), trainer.device)
    step, _ = trainer._look(batch, batch["unlabeled"], 1.0)
    n, known = step.labeled, torch.rand(step.truth.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    truth = step.truth.where(known, torch.full_like(step.truth, 77))
    better = trainer._truth(step._replace(truth=truth, valid=torch.cat([known, step.valid[n:]])))
    assert torch.equal(better[known], step.truth.long()[known])
    assert torch.equal(better[~known], step.labels_weak[:n][~known])


@pytest.mark.parametrize(("guidance", "tau"), [("none", 0.0), ("fixed", 499.5)])
def test_guidance_may_be_constant(made, guidance, tau):
    _, calls = recorded_step(made(guidance=guidance))
    assert set(torch.cat([call["tau"] for call in calls]).tolist()) == {tau}


def test_the_network_learns_what_the_rectifier_makes_of_its_label(made):
    """A rectifier that always answers the same: L_Rect is the cross-entropy of that answer on the strong view."""
    trainer = made()
    batch = to_device(next(trainer.dataloader_train), trainer.device)
    step, _ = trainer._look(batch, batch["unlabeled"], 1.0)
    n, classes = step.labeled, trainer.label_space.num_heads
    answer = torch.randint(0, classes, (len(step.weak) - n, 32, 32), generator=torch.Generator().manual_seed(0))
    logits = torch.nn.functional.one_hot(answer, classes).movedim(-1, 1) * 9.0
    trainer.rectifier.forward = lambda *args, **kwargs: Rectified(logits, None, None)
    group = trainer._rectify(step, 3.0)
    picked = trainer.predict_logits(step.strong[n:]).log_softmax(1).gather(1, answer[:, None])
    assert group.terms["loss_rectification"].item() == pytest.approx(
        -3 * picked[step.valid[n:]].mean().item(), rel=1e-4
    )
    changed = (answer[:, None] != step.labels_weak[n:])[step.valid[n:]].float().mean()
    assert group.log["changed"].item() == pytest.approx(changed.item())
    assert group.step == ("network",)


@pytest.mark.parametrize("dropout", [False, True])
def test_the_rectifier_samples_without_dropout_unless_asked(made, dropout):
    trainer = made(sample_dropout=dropout, rectifier_dropout=True)
    batch = to_device(next(trainer.dataloader_train), trainer.device)
    step, _ = trainer._look(batch, batch["unlabeled"], 1.0)
    logits, seeds = [], []

    def reseed(*_) -> None:
        torch.manual_seed(seeds[-1])

    trainer.rectifier.register_forward_pre_hook(reseed)
    for seed in (1, 2):  # the same latent noise, other random numbers after it
        torch.manual_seed(0)
        seeds.append(seed)
        logits.append(trainer._sampled(step.weak, step.labels_weak).logits)
    assert torch.equal(*logits) is not dropout
    assert trainer.rectifier.training


def test_the_codes_hard_loss_is_cross_entropy_plus_squared_dice(made):
    trainer = made(squared_dice=True)
    logits = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    hard = torch.randint(0, 3, (2, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    valid = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(2)) > 0.3
    counted = valid[:, 0].numpy()
    p = np.stack([channel.numpy()[counted] for channel in logits.softmax(1).movedim(1, 0)]).astype(float)
    y = np.eye(3)[hard[:, 0].numpy()[counted]].T
    dice = 1 - np.mean((2 * (p * y).sum(1) + 1e-5) / ((p**2).sum(1) + (y**2).sum(1) + 1e-5))
    entropy = -np.log((p * y).sum(0)).mean()
    for weight in (0.0, 1.0, 2.5):
        got = trainer.hard_loss(logits, hard, valid, weight).item()
        assert got == pytest.approx(entropy + weight * dice, rel=1e-5)


# --------------------------------------------------------------------------------------------------- switches

BASELINE: list[dict[str, float]] = []

ABLATIONS = {
    "no w2g": {"w2g": False, "s2w_target": "weak", "strong_guidance": "weak"},
    "no s2w": {"s2w": False},
    "no diffusion": {"diffusion": False},
    "no guidance": {"guidance": "none"},
    "fixed guidance": {"guidance": "fixed"},
    "random guidance": {"guidance": "random"},
    "sum guidance": {"guidance": "both"},
    "jaccard guidance": {"guidance": "jaccard"},
    "overlap guidance": {"guidance_form": "overlap"},
    "item guidance": {"guidance_per_item": True},
    "weak strong guidance": {"strong_guidance": "weak"},
    "onehot": {"coloring": "onehot"},
    "distant colors": {"coloring": "distant"},
    "all rows": {"latent_rows": "all"},
    "gray": {"coloring": "gray"},
    "own guidance": {"rectify_guidance": "own", "guidance_ema": 0.5},
    "all time steps": {"time_steps": "all"},
    "noise": {"prediction": "noise"},
    "norm": {"latent_distance": "norm"},
    "condition in the latent loss": {"detach_condition": False},
    "latents of any size": {"normalize_latent": False},
    "dropout": {"rectifier_dropout": True},
    "no strong to truth": {"s2g": False},
    "one optimizer": {"rectifier_optimizer": "sgd", "rectifier_lr": 0.01},
    "damage": {"damage": 1.0},
    "residual": {"label_residual": 3.0},
    "s2w weak image": {"s2w_image": "weak"},
    "s2w weak target": {"s2w_target": "weak"},
    "linear": {"noise_schedule": "linear", "timesteps": 50},
    "skip": {"inject": "skip"},
    "label context": {"context": "label"},
    "concat": {"fusion": "concat"},
    "no skips": {"skips": False},
    "code losses": CODE_LOSSES,
    "paper views": {"views": "paper"},
    "supervised weak": {"supervised_view": "weak"},
    "rectify weak": {"rect_view": "weak"},
    "merged": {"merged": True},
    "batch norm": {"norm": "batch"},
    "additive": {"norm": "batch", "conditioning": "additive"},
    "literature": {**LITERATURE, **CODE},
    "literature with code losses": {**LITERATURE, **CODE, **CODE_LOSSES, "supervised_view": "weak", "views": "paper"},
    "rectifier off": {"rect_weight": 0},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_switch_trains_and_makes_a_difference(made, name):
    if not BASELINE:
        BASELINE.extend(steps(made(), 2))
    rows = steps(made(**ABLATIONS[name]), 2)
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert rows[1] != BASELINE[1]
    absent = {
        "no w2g": {"loss_rect_w2g", "loss_latent_l", "tau"},
        "no s2w": {"loss_rect_s2w", "loss_rect_s2g", "loss_latent_u"},
        "no strong to truth": {"loss_rect_s2g"},
        "no diffusion": {"loss_latent_l", "loss_latent_u"},
        "rectifier off": RECTIFIER_TERMS | {"loss_rectification", "tau", "changed"},
    }.get(name, set())
    added = {"loss_complementary", "loss_rect_complementary"} if "code losses" in name else set()
    assert set(rows[0]) == (set(BASELINE[0]) | added) - absent


@pytest.mark.parametrize("rows", ["all", "own"])
def test_latent_losses_count_all_items_or_their_own(made, rows):
    """L_Lat-L is about labeled items, L_Lat-U about unlabeled ones; the code counts all in both."""
    trainer, outputs = made(latent_rows=rows, s2g=False), []
    trainer.rectifier.register_forward_hook(lambda _, args, out: outputs.append(out))
    (terms,), n = steps(trainer, 1), trainer.batch_size
    w2g, s2w, _ = outputs
    assert len(s2w.latent) == (n if rows == "own" else 2 * n)
    for term, out, own in (("loss_latent_l", w2g, slice(n)), ("loss_latent_u", s2w, slice(-n, None))):
        error = (out.latent - out.target)[own] if rows == "own" else out.latent - out.target
        assert terms[term] == pytest.approx(error.pow(2).mean().item(), rel=1e-5)


@pytest.mark.parametrize("switch", [{"sampler": "ddpm"}, {"clamp": True}, {"sampling_steps": 3}])
def test_sampling_is_what_the_settings_say(made, switch):
    trainer, latents = made(time_steps="all", **switch), []
    plain = made(time_steps="all")
    for each in (trainer, plain):
        each.rectifier.register_forward_hook(lambda _, args, out: latents.append(out.latent))
        assert all(np.isfinite(value) for value in steps(each, 1)[0].values())
    assert torch.equal(latents[0], latents[3])  # the training passes are the same
    assert not torch.equal(latents[2], latents[5])
    assert (latents[2].abs().max() <= 1) == ("clamp" in switch)


def test_batch_norm_rectifies_the_whole_batch_but_learns_from_unlabeled_items(made):
    """Statistics are taken over all items, as in the code; the labeled ones must not enter L_Rect."""
    trainer, seen = made(norm="batch"), []
    trainer.rectifier.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    batch = to_device(next(trainer.dataloader_train), trainer.device)
    step, _ = trainer._look(batch, batch["unlabeled"], 1.0)
    trainer._rectify(step, 1.0)
    assert seen == [len(step.weak)]
    poisoned = step._replace(strong=torch.cat([step.strong[: step.labeled] + 100, step.strong[step.labeled :]]))
    torch.manual_seed(0)
    clean = trainer._rectify(step, 1.0).terms["loss_rectification"].item()
    torch.manual_seed(0)
    assert trainer._rectify(poisoned, 1.0).terms["loss_rectification"].item() == pytest.approx(clean, rel=1e-4)


def test_published_views_train_on_flat_volumes(made):
    for row in steps(made("3d_fullres", views="paper"), 2):
        assert all(np.isfinite(value) for value in row.values())


def test_bfloat16_trains(made):
    for row in steps(made(options={"precision": "bf16"}, **CODE_LOSSES), 2):
        assert all(np.isfinite(value) for value in row.values())


def test_the_literatures_network_reaches_the_rectifiers_shape(made):
    trainer = made(**LITERATURE)
    assert isinstance(trainer.network, LiteratureUNet)
    assert trainer.rectifier.shape.strides == ((2, 2),) * 4
    assert trainer.latent_shape == (64, 2, 2)
    patch = trainer.configuration_manager.patch_size
    planned = made(start=False).configuration_manager.configuration["architecture"]
    shape = rectifier_shape(trainer.settings, planned, patch, 1, 3, 3)
    kwargs = planned["arch_kwargs"]
    assert (shape.strides, shape.kernels) == rectifier_levels(kwargs["strides"], kwargs["kernel_sizes"])
    assert all(
        n == p // np.prod([s[i] for s in shape.strides])
        for i, (n, p) in enumerate(zip(latent_size(shape), patch, strict=True))
    )


@pytest.mark.parametrize(("chosen", "base", "width"), [(None, 32, 16), (None, 4, 4), (8, 32, 8), (None, None, 16)])
def test_the_rectifier_is_half_as_wide_as_the_plan_or_as_set(chosen, base, width):
    """Without a plan's features, as beside the literature's network, it has the code's width."""
    planned = {"strides": [[1, 1], [2, 2]], "kernel_sizes": [[3, 3]] * 2, "features_per_stage": [base]}
    architecture = {"arch_kwargs": planned if base else {"ndim": 2}}
    settings = DiffRectSettings(rectifier_width=chosen)
    assert rectifier_shape(settings, architecture, (32, 32), 1, 3, 3).width == width


def test_adapting_plans_twice_changes_nothing(toy):
    plans = json.loads((toy.preprocessed / "toy2d.json").read_text())
    untouched = copy.deepcopy(plans)
    segmentation_architecture(plans, "2d", DiffRectSettings())
    assert plans == untouched
    for _ in range(2):
        segmentation_architecture(plans, "2d", DiffRectSettings(**LITERATURE))
        assert plans["configurations"]["2d"]["architecture"]["arch_kwargs"] == {"ndim": 2}


# ------------------------------------------------------------------------------------------- records and refusals


def test_the_rectification_gain_is_recorded(toy, results):
    settings = ["--set", "rectifier_width=4", "pl_threshold=0", "rect_start=0"]
    argv = ["901", "2d", "-tr", "DiffRectTrainer", "-p", "toy2d", "-device", "cpu", "--epochs", "1"]
    assert train.main([*argv, "--iterations_per_epoch", "2", *settings]) == 0
    fold = results / toy.raw.name / "DiffRectTrainer__toy2d__2d" / "fold_all"
    (record,) = [json.loads(line) for line in (fold / "progress.jsonl").read_text().splitlines()]
    branches = record["branches"]
    assert set(branches) == {"network", "rectified"}
    gain = branches["rectified"] - branches["network"]
    assert record["differences"] == {"rectification_gain": pytest.approx(gain, abs=1e-6)}
    (log,) = fold.glob("training_log*.txt")
    assert f"rectification_gain {gain:+.3f}" in log.read_text()


def test_the_faithful_preset_names_every_setting_of_the_method():
    """So that a change of a default does not change it."""
    own = set(DiffRectSettings().to_dict()) - set(Settings().to_dict())
    assert own <= set(load_preset("diffrect_faithful")["train"]["set"])


def test_without_unlabeled_cases_no_untrained_rectifier_is_watched(made):
    trainer = made()
    trainer.unlabeled_ids = []
    assert set(trainer.branches(torch.zeros(1, 1, 32, 32))) == {"network"}


def test_without_a_rectifier_there_is_no_second_branch(made):
    trainer = made(rect_weight=0)
    assert set(trainer.branches(torch.zeros(1, 1, 32, 32))) == {"network"}
    assert not trainer.partners


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"conditioning": "additive"}, ("instance normalization", "film")),
        ({"noise_schedule": "linear"}, ("more than 20", "timesteps=10")),
        ({"sampling_steps": 11}, ("sampling_steps", "timesteps", "11")),
        ({"network": "literature"}, ("deep supervision", "False")),
        ({"rect_schedule": "soon"}, ("soon", "ramp")),
        ({"unsupervised_schedule": "soon"}, ("soon", "ramp")),
        ({"guidance": "hausdorff"}, ("guidance", "jaccard", "none")),
        ({"coloring": "rainbow"}, ("coloring", "published")),
        ({"rectifier_width": 2}, ("rectifier_width", "4 to inf")),
        ({"pl_threshold": 1.0}, ("pl_threshold", "0.999")),
        ({"rect_start": 1.5}, ("rect_start", "0 to 1")),
        ({"timesteps": 1}, ("timesteps", "2 to inf")),
        ({"w2g": False, "s2w": False, "s2w_target": "weak", "strong_guidance": "weak"}, ("rectifier", "rect_weight=0")),
        (
            {"w2g": False, "unsupervised_weight": 0, "s2w_target": "weak", "strong_guidance": "weak"},
            ("learn from somewhere", "unsupervised_weight=0"),
        ),
        ({"w2g": False}, ("without w2g", "s2w_target=weak")),
        ({"w2g": False, "s2w_target": "weak"}, ("without w2g", "strong_guidance=weak")),
    ],
)
def test_refusals_name_the_setting_and_what_is_allowed(values, words):
    with pytest.raises(UserError) as refused:
        DiffRectSettings.from_mapping(values)
    assert all(word in str(refused.value) for word in words), str(refused.value)
