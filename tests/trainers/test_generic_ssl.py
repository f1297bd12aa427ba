"""What A&D promises beyond the contract: who learns from what, how pseudo-labels come about, and its own laws."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from nnssl_test_tools import same, weights

from nnssl.cli import train
from nnssl.diffusion.schedule import NoiseSchedule
from nnssl.errors import UserError
from nnssl.networks.diff_vnet import PlannedDiffVNet
from nnssl.networks.diff_vnet_paper import DiffVNet
from nnssl.trainers.base import full_resolution, to_device
from nnssl.trainers.generic_ssl import _agreement
from nnssl.trainers.generic_ssl_settings import GenericSSLSettings, network_architecture

NAME = "GenericSSLTrainer"
VNET = {"network": "vnet", "deep_supervision": False}
L_DENO, L_DIFF, L_U = "loss_supervised_denoising", "loss_supervised_difficulty", "loss_pseudo_label"


@pytest.fixture
def made(build):
    """Return a function that builds a trainer with mu at its full size from the first step."""

    def make(configuration="2d", options=None, start=True, **settings):
        return build(NAME, configuration, {"unsupervised_schedule": "constant", **settings}, options, start)

    return make


def steps(trainer, count: int) -> list[dict[str, float]]:
    return [trainer.train_step(next(trainer.dataloader_train)) for _ in range(count)]


def groups(trainer):
    return trainer.compute_losses(to_device(next(trainer.dataloader_train), trainer.device))


# ------------------------------------------------------------------------------------------------ who gets gradient

PLAN_PARTS = {
    L_DENO: {"diffusion_stem", "time_embedding", "films", "encoder", "xi"},
    L_DIFF: {"image_stem", "encoder", "psi"},
    L_U: {"image_stem", "encoder", "theta"},
}


def part_of(network, name: str) -> str:
    """Return the paper's name for the part a parameter belongs to."""
    if isinstance(network, DiffVNet):
        return "time_embedding" if ".sites." in name else name.split(".")[0]
    names = {"encoder.stages.0": "image_stem", "encoder.stem": "image_stem"}
    early = next((part for prefix, part in names.items() if name.startswith(prefix)), None)
    return early or {"decoder": "theta"}.get(name.split(".")[0], name.split(".")[0])


@pytest.mark.parametrize("network", ["plan", "vnet"])
def test_each_loss_reaches_the_parts_of_the_published_table(made, network):
    trainer = made(**(VNET if network == "vnet" else {}))
    for name, parameter in trainer.diff_vnet.named_parameters():
        if name.startswith("films"):  # they start at zero, behind which the embedding would get no gradient
            torch.nn.init.normal_(parameter, std=0.05)
    reached = {}
    for group in groups(trainer):
        for term, value in group.terms.items():
            named = dict(trainer.diff_vnet.named_parameters())
            grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
            moved = zip(named, grads, strict=True)
            reached[term] = {part_of(trainer.diff_vnet, n) for n, g in moved if g is not None and g.abs().sum() > 0}
    expected = {term: parts - ({"films"} if network == "vnet" else set()) for term, parts in PLAN_PARTS.items()}
    assert reached == expected


@pytest.mark.parametrize("joint", [True, False])
def test_three_losses_make_one_step_or_three(made, joint):
    trainer, taken = made(joint=joint), []
    trainer.optimizer.register_step_post_hook(lambda *_: taken.append(1))
    steps(trainer, 1)
    assert len(taken) == (1 if joint else 3)


def test_separate_backward_passes_give_the_gradient_of_the_joint_loss(made):
    """Three groups accumulate what one backward pass of L_deno + L_diff + mu L_u gives."""
    parts, joint = made(), made()
    batch = to_device(next(parts.dataloader_train), parts.device)
    gradients = []
    for trainer, together in ((parts, False), (joint, True)):
        torch.manual_seed(0)
        losses = [group.terms for group in trainer.compute_losses(copy.deepcopy(batch))] if together else []
        if together:
            sum(sum(terms.values()) for terms in losses).backward()
        else:
            torch.manual_seed(0)
            for group in trainer.compute_losses(copy.deepcopy(batch)):
                sum(group.terms.values()).backward()
        gradients.append([p.grad for p in trainer.network.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------ laws of weight zero


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_at_weight_zero_what_predicts_is_the_supervised_control_bit_for_bit(build, configuration):
    method, control = build(NAME, configuration, {"unsupervised_weight": 0}), build("SupervisedTrainer", configuration)
    steps(method, 3), steps(control, 3)
    theirs, ours = control.network.state_dict(), method.network.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in theirs.items())
    assert set(method.branches(torch.zeros(1, 1, *method.configuration_manager.patch_size))) == {"network"}


def test_psi_without_weights_and_without_the_others_is_the_supervised_control(made, build):
    """L_diff of unit weights is nnU-Net's loss: encoder and psi, which starts as theta, follow the control."""
    method = made(drs=False, diffusion=False, unsupervised_schedule="warmup99", blend=1)
    control = build("SupervisedTrainer")
    steps(method, 3), steps(control, 3)
    theirs, ours = control.network.state_dict(), method.network.state_dict()
    for key, value in theirs.items():
        if not key.startswith("decoder.encoder"):
            assert torch.equal(value, ours[key.replace("decoder.", "psi.")]), key


def test_weights_of_one_are_nnunets_loss(made):
    trainer = made()
    trainer.difficulty.weights = lambda: torch.ones(3)
    batch = to_device(next(trainer.dataloader_train), trainer.device)
    weighted = trainer._difficulty_aware(batch, ()).terms[L_DIFF]
    plain = trainer.supervised_loss(trainer.network(batch["data"], decoder="psi"), batch["target"])
    torch.testing.assert_close(weighted, plain)


# ------------------------------------------------------------------------------------------------ the blend


def test_theta_is_pulled_before_each_step_as_the_closed_form_says(made):
    trainer = made(blend=0.9)
    with torch.no_grad():
        for xi in trainer.diff_vnet.decoders["xi"].parameters():
            xi.add_(0.5)
    expected = [0.9 * t + 0.1 * (x + p) / 2 for t, x, p in trainer.diff_vnet.matched_parameters()]
    trainer.before_step()
    for (theta, _, _), wanted in zip(trainer.diff_vnet.matched_parameters(), expected, strict=True):
        torch.testing.assert_close(theta, wanted)


def test_without_unlabeled_cases_or_with_blend_one_theta_is_left_alone(made):
    for trainer in (made(blend=1), made(blend=0.5)):
        with torch.no_grad():
            for psi in trainer.diff_vnet.decoders["psi"].parameters():
                psi.add_(1)
        if trainer.settings.blend < 1:
            trainer.unlabeled_ids = []
        before = weights(trainer.network)
        trainer.before_step()
        assert same(before, weights(trainer.network))


def test_without_diffusion_theta_is_pulled_to_psi_alone(made):
    trainer = made(diffusion=False, blend=0.0)
    with torch.no_grad():
        for psi in trainer.diff_vnet.decoders["psi"].parameters():
            psi.add_(1)
    trainer.before_step()
    assert all(torch.equal(theta, psi) for theta, _, psi in trainer.diff_vnet.matched_parameters())


@pytest.mark.parametrize("start", ["shared", "independent"])
def test_decoders_start_alike_or_not(made, start):
    trainer = made(decoder_init=start)
    alike = [torch.equal(t, x) and torch.equal(t, p) for t, x, p in trainer.diff_vnet.matched_parameters()]
    assert all(alike) == (start == "shared")


def test_decoders_share_pretrained_weights_too(made):
    """Weights that are loaded after the networks were built reach xi and psi before the first step."""
    trainer = made()
    with torch.no_grad():
        for theta, *_ in trainer.diff_vnet.matched_parameters():
            theta.add_(1)
    trainer.on_train_start()
    trainer.close_loaders()
    assert all(torch.equal(t, x) and torch.equal(t, p) for t, x, p in trainer.diff_vnet.matched_parameters())


# ------------------------------------------------------------------------------------------------ diffusion


def test_published_steps_of_the_sampler_and_what_they_leave_of_a_label():
    settings = GenericSSLSettings(sampling_steps=10, sampling_spacing="ends")
    assert settings.visited() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    left = NoiseSchedule.scaled_linear(1000).alpha_bar[settings.visited()].tolist()
    published = [0.9999, 0.87361, 0.59681, 0.31863, 0.13287, 0.04325, 0.01098, 0.00218, 0.00034, 0.00004]
    assert left == pytest.approx(published, abs=6e-6)
    assert GenericSSLSettings().visited() == [499, 999]
    assert GenericSSLSettings(sampling_steps=10).visited()[::9] == [99, 999]
    assert GenericSSLSettings(sampling_steps=1).visited() == [999]


def watched(trainer) -> list[dict]:
    """Collect the arguments of every pass of the network."""
    calls = []
    trainer.network.register_forward_pre_hook(lambda _, args, kw: calls.append({"x": args[0], **kw}), with_kwargs=True)
    return calls


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_step_runs_each_branch_once_and_the_sampler_its_steps(made, count):
    trainer = made(sampling_steps=count)
    calls = watched(trainer)
    steps(trainer, 1)
    passes = [call.get("decoder", "theta") for call in calls]
    assert passes == ["xi", "psi", *["xi"] * count, "both"]
    sampled = [call["t"].unique().tolist() for call in calls[2:-1]]
    assert sampled == [[t] for t in reversed(trainer.settings.visited())]
    start = calls[2]["noisy"]
    assert abs(start.mean().item()) < 0.1
    assert start.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("interval", "chains"), [(1, 6), (3, 2)])
def test_the_sampler_runs_in_every_nth_iteration(made, interval, chains):
    trainer = made(sampling_interval=interval, sampling_steps=1)
    calls = watched(trainer)
    rows = steps(trainer, 6)
    assert sum(call.get("decoder") == "xi" for call in calls) == 6 + chains
    assert np.isfinite([row[L_U] for row in rows]).all()


def test_training_noises_labels_in_minus_one_to_one_at_drawn_steps(made):
    trainer = made(t_min=400)
    calls = watched(trainer)
    drawn = []
    for _ in range(6):
        calls.clear()
        batch = to_device(next(trainer.dataloader_train), trainer.device)
        trainer._denoising(batch, ())
        (call,) = calls
        drawn += call["t"].tolist()
        left = trainer.noise.at(call["t"], call["noisy"])
        x0 = 2 * trainer.label_space.one_hot(full_resolution(batch["target"])) - 1
        noise = (call["noisy"] - left.sqrt() * x0) / (1 - left).sqrt()
        assert noise.std().item() == pytest.approx(1, abs=0.1)
        assert abs(noise.mean().item()) < 0.1
    assert 400 <= min(drawn) <= max(drawn) < 1000
    assert len(set(drawn)) > 6


def test_x0_is_a_softmax_or_clamped_logits(made):
    """Softmax does not change when all logits of a voxel rise; the clamp loses the arg max, as users found."""
    kept = {}
    for x0_map in ("softmax", "clamp"):
        trainer = made(x0_map=x0_map, sampling_steps=1)
        logits = 6 * torch.nn.functional.one_hot(torch.randint(0, 3, (2, 8, 8)), 3).movedim(-1, 1).float()
        for shift in (0.0, 3.0):
            trainer.network = lambda x, value=logits + shift - 2, **_: value
            x0 = trainer._sample(torch.zeros(2, 1, 8, 8))
            assert x0.min() >= -1
            assert x0.max() <= 1
            saturated = (x0 == x0.amax(1, keepdim=True)).sum(1) > 1
            kept[x0_map, shift] = (1 - saturated.float().mean()).item()
    assert kept == {("softmax", 0.0): 1, ("softmax", 3.0): 1, ("clamp", 0.0): 1, ("clamp", 3.0): 0}


def test_sampling_in_bfloat16_leaves_gradients_whole(made):
    """Half copies of the weights made without gradient must not serve the pass that learns."""
    for settings, options in (({"sampling_bf16": True}, None), ({}, {"precision": "bf16"})):
        trainer = made(options=options, **settings)
        with trainer.precision():
            for group in groups(trainer):
                for term, value in group.terms.items():
                    named = dict(trainer.diff_vnet.named_parameters())
                    with torch.autocast("cpu", enabled=False):
                        grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
                    got = {part_of(trainer.diff_vnet, n) for n, g in zip(named, grads, strict=True) if g is not None}
                    assert got >= PLAN_PARTS[term] - {"time_embedding"}, term


# ------------------------------------------------------------------------------------------------ pseudo-labels


def probabilities(trainer, calls):
    """Return what psi gave on the unlabeled items."""
    with torch.no_grad():
        return trainer.label_space.probs(trainer.network(calls[-1]["x"], decoder="both")[1])


def test_the_pseudo_label_is_the_arg_max_of_both_votes(made, monkeypatch):
    trainer, learned = made(), []
    module = "nnssl.trainers.generic_ssl.dice_and_cross_entropy"

    def loss(logits, pseudo, *args, **kwargs):
        learned.append(pseudo)
        return logits.sum() * 0 + 1

    monkeypatch.setattr(module, loss)
    vote = torch.zeros(2, 3, 32, 32)
    vote[:, 2, :16] = 2  # outvotes any probability
    trainer._vote = lambda x0: vote
    calls = watched(trainer)
    for _ in groups(trainer):
        pass
    (pseudo,) = learned
    assert (pseudo[:, 0, :16] == 2).all()
    assert torch.equal(pseudo[:, 0, 16:], probabilities(trainer, calls)[:, :, 16:].argmax(1))


def test_without_rs_x0_votes_as_it_is(made):
    x0 = torch.randn(1, 3, 6, 6).clamp(-1, 1)
    assert torch.equal(made(rs=False)._vote(x0), (x0 + 1) / 2)
    torch.manual_seed(0)
    soft = made(rs_input="x0")._vote(x0)
    torch.manual_seed(0)
    assert not torch.equal(made(rs_input="log")._vote(x0), soft)


@pytest.mark.parametrize("view", ["strong", "weak"])
def test_the_view_that_is_labeled_and_the_one_that_learns(made, view):
    trainer = made(pseudo_view=view, sampling_steps=1)
    batch = to_device(next(trainer.dataloader_train), trainer.device)
    batch["unlabeled"]["weak"] = batch["unlabeled"]["strong"] + 1
    calls = watched(trainer)
    for _ in trainer.compute_losses(batch):
        pass
    seen = [(c.get("decoder", "theta"), torch.equal(c["x"], batch["unlabeled"][view])) for c in calls[2:]]
    if view == "strong":
        assert seen == [("xi", True), ("both", True)]
    else:
        assert seen == [("xi", True), ("psi", True), ("theta", False)]


def test_voxels_outside_the_image_do_not_teach(made):
    trainer = made()
    batch = to_device(next(trainer.dataloader_train), trainer.device)
    batch["unlabeled"]["valid"][:] = False
    losses = {name: value for group in trainer.compute_losses(batch) for name, value in group.terms.items()}
    (grad, *_) = torch.autograd.grad(losses[L_U], [trainer.network.decoder.seg_layers[-1].weight])
    assert grad.abs().sum() == 0


def test_mu_scales_the_pseudo_label_loss_and_follows_its_ramp(made):
    small, large = made(unsupervised_weight=1.0), made(unsupervised_weight=5.0)
    assert steps(large, 1)[0][L_U] == pytest.approx(5 * steps(small, 1)[0][L_U], rel=1e-4)
    ramp = GenericSSLSettings(unsupervised_weight=10)
    published = {0: 0.067, 30: 0.17, 100: 1.1, 150: 2.9, 200: 5.7, 300: 10}
    assert {e: ramp.unsupervised(e / 300) for e in published} == pytest.approx(published, rel=0.03)
    short = GenericSSLSettings(unsupervised_weight=10, ramp_end=1 / 3)
    assert short.unsupervised(0.2) == pytest.approx(ramp.unsupervised(0.6))
    assert short.unsupervised(0.5) == short.unsupervised(1) == 10


def test_while_mu_is_zero_the_branches_train_and_theta_only_follows(made):
    trainer = made(unsupervised_schedule="warmup50")
    row = steps(trainer, 1)[0]
    assert L_U not in row
    assert L_DENO in row
    assert L_DIFF in row


# ------------------------------------------------------------------------------------------------ DRS


def test_weights_may_follow_the_dice_of_this_batchs_denoising(made):
    trainer = made(drs_branch="xi")
    outputs = []
    trainer.network.register_forward_hook(
        lambda _, args, kw, out: outputs.append(full_resolution(out)) if kw.get("decoder") == "xi" else None,
        with_kwargs=True,
    )
    batch = to_device(next(trainer.dataloader_train), trainer.device)
    trainer._denoising(batch, ())
    hard, truth = outputs[0].argmax(1), full_resolution(batch["target"])[:, 0]
    for k in range(3):
        a, b = hard == k, truth == k
        expected = 2 * (a & b).sum() / (a.sum() + b.sum())
        assert trainer.difficulty.dice[k].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-9)


def test_difficulty_is_measured_on_the_branch_that_sees_no_label(made):
    trainer = made()
    batch = to_device(next(trainer.dataloader_train), trainer.device)
    before = trainer.difficulty.dice.clone()
    trainer._denoising(batch, ())
    assert torch.equal(trainer.difficulty.dice, before)
    trainer._difficulty_aware(batch, ())
    assert not torch.equal(trainer.difficulty.dice, before)


def test_voxels_to_ignore_do_not_count(made):
    trainer = made(drs_branch="xi")
    object.__setattr__(trainer.label_space, "ignore_label", 9)
    truth = torch.zeros(1, 1, 8, 8, dtype=torch.int16)
    truth[..., 4:] = 9
    logits = torch.zeros(1, 3, 8, 8)
    logits[:, 0, :, :4], logits[:, 1, :, 4:] = 1, 1
    trainer._measure(logits, truth)
    assert trainer.difficulty.dice[0].item() == pytest.approx(1)
    assert trainer.difficulty.dice[1].item() == pytest.approx(1e-8)  # absent where voxels count


# ------------------------------------------------------------------------------------------------ switches

BASELINE: list[dict[str, float]] = []
SWITCHES = {
    "no diffusion": {"diffusion": False},
    "no drs": {"drs": False},
    "no rs": {"rs": False},
    "svda": {"views": "svda"},
    "vnet": VNET,
    "vnet of the code": {**VNET, "batch_statistics": "all", "decoder_init": "independent"},
    "separate": {"joint": False},
    "independent": {"decoder_init": "independent"},
    "no blend": {"blend": 1},
    "weak": {"pseudo_view": "weak"},
    "t_min": {"t_min": 300},
    "steps": {"sampling_steps": 5},
    "ends": {"sampling_spacing": "ends"},
    "T": {"timesteps": 100},
    "clamp": {"x0_map": "clamp"},
    "log": {"rs_input": "log"},
    "tau": {"rs_tau": 0.3},
    "sigma": {"rs_sigma": 0},
    "dice": {"pl_dice": 1},
    "drs xi": {"drs_branch": "xi"},
    "drs code": {"drs_norm": "none"},
    "drs paper": {"drs_norm": "paper"},
    "drs background": {"drs_background": True},
    "drs alpha": {"drs_alpha": 0.5},
    "drs window": {"drs_window": 5},
    "drs sum": {"drs_memory": "sum"},
    "drs floor": {"drs_floor": 2},
    "bf16": {"sampling_bf16": True},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_trains_and_makes_a_difference(made, name):
    if not BASELINE:
        BASELINE.extend(steps(made(decoder_init="shared"), 2))
    rows = steps(made(**SWITCHES[name]), 2)
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert rows[1] != BASELINE[1]
    absent = {"no diffusion": {L_DENO, "agreement"}, "no drs": {"weight_max", "weight_min"}}.get(name, set())
    assert set(rows[0]) == set(BASELINE[0]) - absent


def test_no_class_weighs_less_than_the_floor(made):
    free, held = (steps(made(drs_floor=floor), 1)[0] for floor in (0, 2))
    assert free["weight_min"] < 2 == held["weight_min"]
    assert free["weight_max"] == held["weight_max"] > 2


def test_svda_trains_on_flat_volumes_and_keeps_labels_and_images_together(made):
    trainer = made("3d_fullres", views="svda")
    batch = next(trainer.dataloader_train)
    assert batch["data"].shape[2:] == tuple(trainer.configuration_manager.patch_size)
    assert batch["unlabeled"]["strong"].shape == batch["unlabeled"]["weak"].shape
    assert all(np.isfinite(v) for v in trainer.train_step(batch).values())


def test_labeled_batches_are_the_controls(made, build):
    ours, theirs = next(made().dataloader_train), next(build("SupervisedTrainer").dataloader_train)
    assert torch.equal(ours["data"], theirs["data"])
    assert all(torch.equal(a, b) for a, b in zip(ours["target"], theirs["target"], strict=True))


def test_networks_are_what_the_settings_say(made):
    assert isinstance(made().diff_vnet, PlannedDiffVNet)
    network = made(**VNET, batch_statistics="all").diff_vnet
    assert isinstance(network, DiffVNet)
    assert not network.frozen_statistics


def test_the_samplers_passes_leave_batch_statistics_alone(made):
    trainer = made(**VNET)
    images = torch.randn(2, 1, 32, 32)
    before = [b.clone() for b in trainer.network.buffers()]
    trainer._sample(images)
    assert same(before, list(trainer.network.buffers()))
    trainer.network(images)
    assert not same(before, list(trainer.network.buffers()))


def test_adapting_plans_twice_changes_nothing(toy):
    plans = json.loads((toy.preprocessed / "toy2d.json").read_text())
    planned = copy.deepcopy(plans["configurations"]["2d"]["architecture"])
    network_architecture(plans, "2d", GenericSSLSettings())
    once = copy.deepcopy(plans)
    network_architecture(plans, "2d", GenericSSLSettings())
    assert plans == once
    kwargs = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    assert {k: v for k, v in kwargs.items() if k not in ("base", "batch_statistics")} == planned["arch_kwargs"]
    assert kwargs["base"] == planned["network_class_name"]


def test_the_vnet_refuses_a_plan_whose_patch_it_cannot_halve(toy):
    plans = json.loads((toy.preprocessed / "toy2d.json").read_text())
    plans["configurations"]["2d"]["patch_size"] = [40, 32]
    chosen = GenericSSLSettings(network="vnet", deep_supervision=False)
    with pytest.raises(UserError, match=r"divisible by 16; got \[40, 32\].*--patch_size"):
        network_architecture(plans, "2d", chosen)


# ------------------------------------------------------------------------------------------------ records and refusals


def test_agreement_counts_the_foreground_of_either():
    a, b = torch.tensor([[[0, 1, 1, 2, 0, 2]]]), torch.tensor([[[0, 1, 2, 0, 1, 2]]])
    everywhere = torch.ones_like(a, dtype=torch.bool)
    assert _agreement(a, b, everywhere).item() == pytest.approx(2 / 5)
    assert _agreement(a, b, a > 1).item() == pytest.approx(1 / 2)
    assert _agreement(a * 0, b * 0, everywhere).item() == 0


def test_without_unlabeled_cases_no_untrained_branch_is_watched(made):
    trainer = made()
    trainer.unlabeled_ids = []
    assert set(trainer.branches(torch.zeros(1, 1, 32, 32))) == {"network"}


def test_all_branches_are_recorded(toy, results):
    argv = ["901", "2d", "-tr", NAME, "-p", "toy2d", "-device", "cpu", "--epochs", "2", "--iterations_per_epoch", "2"]
    assert train.main(argv) == 0
    fold = results / toy.raw.name / f"{NAME}__toy2d__2d" / "fold_all"
    records = [json.loads(line) for line in (fold / "progress.jsonl").read_text().splitlines()]
    for record in records:
        assert set(record["branches"]) == {"network", "diffusion", "difficulty", "both"}
        gain = record["branches"]["both"] - record["branches"]["difficulty"]
        assert record["differences"]["aggregation_gain"] == pytest.approx(gain, abs=1e-6)
        assert {"agreement", "mu", "weight_max", "weight_min"} <= set(record["figures"])
        assert "pseudo_label" in record["foreground"]
    assert all(a["figures"]["mu"] < b["figures"]["mu"] for a, b in pairwise(records))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"timesteps": 20}, ("timesteps=20", "21")),
        ({"timesteps": 30, "sampling_steps": 31}, ("sampling_steps", "30")),
        ({"t_min": 500}, ("t_min=500", "499")),
        ({"t_min": 1, "sampling_spacing": "ends"}, ("t_min", "sampled at 0")),
        ({"network": "vnet"}, ("deep supervision", "False")),
        ({"unsupervised_schedule": "soon"}, ("soon", "ramp")),
        ({"blend": 1.5}, ("blend", "0 to 1")),
        ({"svda_count": 7}, ("svda_count", "0 to 6")),
        ({"drs_norm": "sum"}, ("drs_norm", "max")),
        ({"x0_map": "tanh"}, ("x0_map", "clamp")),
    ],
)
def test_refusals_name_the_setting_and_what_is_allowed(values, words):
    with pytest.raises(UserError) as refused:
        GenericSSLSettings.from_mapping(values)
    assert all(word in str(refused.value) for word in words), str(refused.value)
