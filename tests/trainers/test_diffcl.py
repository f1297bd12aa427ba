"""What Diff-CL promises beyond the contract: who gets gradient from which term, time conditioning, the bank."""

from __future__ import annotations

import copy

import pytest
import torch

from nnssl.trainers.base import full_resolution
from nnssl.trainers.diffcl import Outputs
from nnssl.trainers.diffcl_settings import DiffCLSettings, segmentation_architecture


@pytest.fixture
def trainer(build):
    made = build("DiffCLTrainer", settings={"mu_schedule": "constant", "eta": 1.0})
    for _ in range(2):  # the bank fills, FiLM leaves zero
        made.train_step(next(made.dataloader_train))
    return made


def gradients(trainer) -> dict[str, dict[str, float]]:
    """Return {term: {network: sum of absolute gradients}} of one step, each term differentiated by itself."""
    from nnssl.trainers.base import to_device

    batch = to_device(next(trainer.dataloader_train), trainer.device)
    networks = {"cs": trainer.network, "ds": trainer.ds, "projection": trainer.projection}
    result = {}
    for group in trainer.compute_losses(batch):
        for term, value in group.terms.items():
            row = {}
            for name, network in networks.items():
                parameters = list(network.parameters())
                grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
                row[name] = sum(float(g.abs().sum()) for g in grads if g is not None)
            result[term] = row
    return result


def test_gradients_stop_where_the_paper_stops_them(trainer):
    reach = {term: {n for n, g in row.items() if g > 0} for term, row in gradients(trainer).items()}
    assert reach == {
        "loss_ds_supervised": {"ds"},
        "loss_ds_cross": {"ds"},
        "loss_cs_supervised": {"cs"},
        "loss_cs_cross": {"cs"},
        "loss_contrast": {"cs", "projection"},
    }


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_ds_output_depends_on_time_and_on_the_noised_label(build, configuration):
    trainer = build("DiffCLTrainer", configuration)
    trainer.train_step(next(trainer.dataloader_train))
    batch = next(trainer.dataloader_train)
    x = batch["data"]
    y = torch.randn(len(x), trainer.label_space.num_heads, *x.shape[2:])
    run = lambda y, t: full_resolution(trainer.ds(torch.cat([x, y], 1), t=torch.full((len(x),), t))).detach()  # noqa: E731
    early, late, other = run(y, 10), run(y, 900), run(y.flip(0).roll(3, -1), 10)
    scale = early.std()
    assert (early - late).abs().max() > 1e-4 * scale
    assert (early - other).abs().max() > 1e-4 * scale


def test_bank_holds_only_voxels_that_ds_classifies_correctly(build):
    """The features say whether a voxel's label is right and which class it has, so the bank shows what it took."""
    trainer = build("DiffCLTrainer", start=False)
    trainer.initialize()
    trainer.projection = torch.nn.Identity()
    truth, hard = torch.randint(0, 3, (2, 2, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    features = torch.cat([(hard == truth).float(), truth.float()], 1)
    nothing = torch.zeros(0)
    trainer._fill_bank(Outputs(nothing, nothing, features, nothing, hard, nothing), truth.short(), ["a", "b"])
    slots = trainer.bank.state_dict()
    assert set(slots) == {"a", "b"}
    for index, slot in enumerate(slots.values()):
        assert set(slot) == {0, 1, 2}
        for label, stored in slot.items():
            assert torch.equal(stored, torch.tensor([[1.0, label]]).expand_as(stored))
            available = int(((hard == truth) & (truth == label))[index].sum())
            assert len(stored) == min(available, trainer.settings.bank_capacity)


def test_weights_enter_the_terms_as_equations_16_to_22_have_them(build):
    def first_step(**settings) -> dict[str, float]:
        trainer = build("DiffCLTrainer", settings={"mu_schedule": "constant", "eta": 1.0, **settings})
        return trainer.train_step(next(trainer.dataloader_train))

    base = first_step()
    assert base["loss_contrast"] > 0
    changed = first_step(mu_d=3.0, mu_c=0.5, eta=4.0)
    factors = {"loss_ds_supervised": 1, "loss_cs_supervised": 1, "loss_ds_cross": 3, "loss_cs_cross": 0.5}
    for term, factor in (factors | {"loss_contrast": 0.5 * 4}).items():
        assert changed[term] == pytest.approx(factor * base[term], rel=1e-5), term
    none, double = ({f"{name}_{side}": w for name in ("beta", "lambda") for side in "dc"} for w in (0.0, 2.0))
    without, twice = first_step(**none), first_step(**double)
    for term in factors:  # Dice + weight x cross-entropy
        assert base[term] > without[term] + 1e-3, term
        assert twice[term] - base[term] == pytest.approx(base[term] - without[term], rel=1e-4), term
    one, two = first_step(cross_dice=1.0), first_step(cross_dice=2.0)
    for term in ("loss_ds_cross", "loss_cs_cross"):
        assert one[term] > base[term] + 1e-3, term
        assert two[term] - one[term] == pytest.approx(one[term] - base[term], rel=1e-4), term


def test_mu_zero_trains_two_supervised_networks(build):
    trainer = build("DiffCLTrainer", settings={"mu_d": 0, "mu_c": 0})
    scalars = trainer.train_step(next(trainer.dataloader_train))
    assert set(scalars) == {"loss_cs_supervised", "loss_ds_supervised"}


def test_a_batch_without_foreground_gives_finite_losses(trainer):
    batch = next(trainer.dataloader_train)
    batch["target"] = [torch.zeros_like(t) for t in batch["target"]]
    assert all(value == value and abs(value) < 1e6 for value in trainer.train_step(batch).values())


def test_ddim_pseudo_labels_and_the_guarded_contrast_run(build):
    trainer = build("DiffCLTrainer", settings={"ds_pseudo": "ddim", "cl_min_pred": True, "y0_scale": "01"})
    assert all(v == v for v in trainer.train_step(next(trainer.dataloader_train)).values())


def test_vnet_preset_trains(build):
    trainer = build("DiffCLTrainer", settings={"network": "vnet", "deep_supervision": False})
    assert all(v == v for v in trainer.train_step(next(trainer.dataloader_train)).values())


def test_vnet_preset_follows_the_dimension_of_the_configuration(build):
    trainer = build("DiffCLTrainer", "3d_fullres", {"network": "vnet", "deep_supervision": False}, start=False)
    assert trainer.configuration_manager.configuration["architecture"]["arch_kwargs"]["ndim"] == 3


def test_adapting_plans_twice_changes_nothing(toy):
    import json

    plans = json.loads((toy.preprocessed / "toy2d.json").read_text())
    segmentation_architecture(plans, "2d", DiffCLSettings())
    once = copy.deepcopy(plans)
    segmentation_architecture(plans, "2d", DiffCLSettings(hfm=False))
    assert plans == once
    assert once["configurations"]["2d"]["architecture"]["arch_kwargs"]["hfm"]["stages"] == [2]


@pytest.mark.parametrize("mode", ["gated", "residual"])
def test_hfm_is_trained(build, mode):
    trainer = build("DiffCLTrainer", settings={"hfm_mode": mode})
    before = [p.detach().clone() for p in trainer.network.hfm.parameters()]
    assert before
    for _ in range(4):
        trainer.train_step(next(trainer.dataloader_train))
    after = [p.detach() for p in trainer.network.hfm.parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    names = [n for n, _ in trainer.network.hfm.named_parameters()]
    still = {n for n, m in zip(names, moved, strict=True) if not m}
    # behind a gate that has only just left zero, a change can be smaller than the rounding of a parameter of size 1
    assert still <= (
        {n for n in names if n.endswith(("mamba.D", "norm1.weight", "norm2.weight"))} if mode == "gated" else set()
    )


def test_trust_is_the_dice_of_the_classes_present(build):
    trainer = build("DiffCLTrainer", settings={"trust": True})
    truth = torch.zeros(1, 1, 4, 4, dtype=torch.int16)
    truth[..., :2, :] = 1
    hard = torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    hard[..., :1, :] = 1
    assert trainer._trust(hard, truth) == pytest.approx(2 * 4 / (4 + 8))
    hard[..., 3, :] = 2  # a class that is only predicted has Dice 0
    assert trainer._trust(hard, truth) == pytest.approx((2 * 4 / (4 + 8) + 0) / 2)
    assert trainer._trust(torch.zeros_like(hard), torch.zeros_like(truth)) == 0
    assert trainer._trust(truth.long(), truth) == 1


def test_trust_scales_every_unsupervised_term_and_no_other(build):
    runs = {}
    for trust in (1.0, 0.25):
        trainer = build("DiffCLTrainer", settings={"trust": True, "mu_schedule": "constant", "eta": 1.0})
        trainer._trust = lambda hard, truth, trust=trust: torch.tensor(trust)
        runs[trust] = trainer.train_step(next(trainer.dataloader_train))
    for name, value in runs[1.0].items():
        if name.startswith("loss_"):
            factor = 1.0 if "supervised" in name else 0.25
            assert runs[0.25][name] == pytest.approx(factor * value, rel=1e-4)
