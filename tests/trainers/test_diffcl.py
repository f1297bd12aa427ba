"""What Diff-CL promises beyond the contract: who gets gradient from which term, time conditioning, the bank."""

from __future__ import annotations

import copy

import pytest
import torch
from nnssl_test_tools import same

from nnssl.trainers.base import full_resolution
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


def test_bank_holds_labeled_cases_and_only_correct_voxels(build):
    trainer = build("DiffCLTrainer")
    pushed = []
    original = trainer.bank.push
    trainer.bank.push = lambda cases, features, labels: (
        pushed.append((cases, labels)),
        original(cases, features, labels),
    )
    seen = {}
    fill = trainer._fill_bank

    def spy(ds, truth, cases):
        seen.update(correct=(ds.hard_labeled == truth), truth=truth, cases=cases)
        fill(ds, truth, cases)

    trainer._fill_bank = spy
    trainer.train_step(next(trainer.dataloader_train))
    assert {case for cases, _ in pushed for case in cases} <= set(seen["cases"])
    for label in torch.cat([labels for _, (labels,) in pushed]).unique().tolist():
        assert bool((seen["correct"] & (seen["truth"] == label)).any())
    stored = sum(len(labels) for _, (labels,) in pushed)
    assert 0 < stored <= int(seen["correct"].sum())


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


def test_hfm_changes_the_prediction_and_is_trained(build):
    trainer = build("DiffCLTrainer")
    before = [p.detach().clone() for p in trainer.network.hfm.parameters()]
    assert before
    for _ in range(2):
        trainer.train_step(next(trainer.dataloader_train))
    after = [p.detach() for p in trainer.network.hfm.parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert all(moved), [n for (n, _), m in zip(trainer.network.hfm.named_parameters(), moved, strict=True) if not m]
    assert not same(before, after)
