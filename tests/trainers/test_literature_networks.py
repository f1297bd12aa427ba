"""Trainers that the published tables run on the literature's networks take them by the plan, and learn."""

from __future__ import annotations

import json

import pytest
import torch

from nnssl.cli import plan_and_preprocess
from nnssl.plans.preset import load_preset
from nnssl.reproduce.table import papers, tables_of

ROWS = [r for paper in papers() for t in tables_of(paper).values() for r in t.rows if r.trainer]
#: Trainers by the recipe's network; a recipe without one is the planned network.
WANTED = sorted({(r.trainer, "network" in load_preset(r.preset)["plan"]) for r in ROWS if "recipe" in r.preset})
ON_PAPERS = [name for name, literature in WANTED if literature]
ON_PLANNED = [name for name, literature in WANTED if not literature]
NETWORKS = {
    "vnet": load_preset("recipe_la_vnet")["plan"]["network"],
    "unet": load_preset("recipe_acdc_unet")["plan"]["network"],
}


@pytest.fixture(scope="module")
def plans(toy, tmp_path_factory):
    """Plan the toy data set with each of the networks."""
    for name, network in NETWORKS.items():
        preset = tmp_path_factory.mktemp("preset") / f"{name}.json"
        section = {"configuration": "2d", "patch_size": [32, 32], "batch_size": 2, "network": network}
        preset.write_text(json.dumps({"plan": section}))
        argv = ["-d", "901", "-np", "1", "--preset", str(preset), "-overwrite_plans_name", f"toy{name}"]
        assert plan_and_preprocess.main(argv) == 0
    return toy.plans


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ON_PAPERS)
def test_a_step_changes_the_network(build, plans, monkeypatch, name, network):
    monkeypatch.setitem(plans, "2d", f"toy{network}")
    row = next(r for r in ROWS if r.trainer == name)
    trainer = build(name, settings={"deep_supervision": False, **row.set})
    assert type(trainer.network).__name__ == {"vnet": "VNet", "unet": "LiteratureUNet"}[network]
    before = [p.detach().clone() for p in trainer.network.parameters()]
    scalars = trainer.train_step(next(iter(trainer.dataloader_train)))
    assert all(torch.isfinite(torch.as_tensor(v)).all() for v in scalars.values() if isinstance(v, float))
    assert any((a != b).any() for a, b in zip(before, trainer.network.parameters(), strict=True))


def test_the_rest_changes_the_network_and_runs_on_the_planned_one():
    assert set(ON_PLANNED) == {
        "BCPTrainer",
        "CAMLTrainer",
        "DSTTrainer",
        "DTCTrainer",
        "INCLTrainer",
        "MCNetTrainer",
        "MLRPLTrainer",
        "SASSNetTrainer",
        "SSNetTrainer",
        "SupervisedTrainer",
        "URPCTrainer",
    }
