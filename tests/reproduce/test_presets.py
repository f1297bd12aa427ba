"""Presets say what the papers and their code say."""

from __future__ import annotations

import json

import pytest

from nnssl.errors import UserError
from nnssl.plans.preset import load_preset

#: preset -> configuration, patch (z, y, x), labeled items, iterations, strides at test time.
PROTOCOLS = {
    "diffcl_la4": ("3d_fullres", [80, 112, 112], 2, 11_400, [4, 18, 18]),
    "diffcl_la8": ("3d_fullres", [80, 112, 112], 2, 10_800, [4, 18, 18]),
    "diffcl_pancreas6": ("3d_fullres", [96, 96, 96], 2, 8_400, [16, 16, 16]),
    "diffcl_pancreas12": ("3d_fullres", [96, 96, 96], 2, 7_500, [16, 16, 16]),
    "diffcl_brats25": ("3d_fullres", [96, 96, 96], 2, 33_600, [64, 64, 64]),
    "diffcl_brats50": ("3d_fullres", [96, 96, 96], 2, 30_000, [64, 64, 64]),
    "diffrect_acdc": ("2d", [256, 256], 3, 30_000, None),
    "diffrect_mscmr": ("2d", [256, 256], 3, 30_000, None),
    "diffrect_prostate": ("2d", [256, 256], 3, 30_000, None),
    "generic_ssl_la": ("3d_fullres", [80, 112, 112], 4, 5_700, [16, 16, 4]),
    "generic_ssl_synapse": ("3d_fullres", [64, 128, 128], 2, 2_400, [4, 16, 16]),
    "generic_ssl_mmwhs": ("3d_fullres", [128, 128, 128], 2, 2_400, [4, 16, 16]),
    "generic_ssl_mnms": ("3d_fullres", [32, 128, 128], 4, 28_000, [4, 16, 16]),
    "protodiff_endoscapes": ("2d", [512, 512], 8, 40_000, None),
    "protodiff_mosxav": ("2d", [512, 512], 8, 40_000, None),
    "recipe_la": ("3d_fullres", [80, 112, 112], 2, 15_000, [4, 18, 18]),
    "recipe_pancreas": ("3d_fullres", [96, 96, 96], 2, 15_000, [16, 16, 16]),
    "recipe_brats": ("3d_fullres", [96, 96, 96], 2, 30_000, [64, 64, 64]),
    "recipe_acdc": ("2d", [256, 256], 12, 30_000, None),
    "recipe_synapse": ("3d_fullres", [64, 128, 128], 2, 2_400, [16, 32, 32]),
}
#: preset -> learning rate, momentum, Nesterov, weight decay, schedule.
SGD = {
    "diffcl_la4": (0.01, 0.9, False, 3e-5, "constant"),
    "diffrect_acdc": (0.01, 0.9, False, 1e-4, "poly"),
    "generic_ssl_la": (0.01, 0.9, True, 3e-5, "poly"),
    "generic_ssl_synapse": (0.03, 0.9, True, 3e-5, "poly"),
    "generic_ssl_mmwhs": (0.005, 0.9, True, 3e-5, "poly"),
    "generic_ssl_mnms": (0.01, 0.9, True, 3e-5, "poly"),
    "recipe_la_vnet": (0.01, 0.9, False, 1e-4, "constant"),
    "recipe_brats_vnet": (0.01, 0.9, False, 1e-4, "poly"),
    "recipe_acdc_unet": (0.01, 0.9, False, 1e-4, "poly"),
    "recipe_synapse_vnet": (0.03, 0.9, True, 3e-5, "poly"),
}
#: SSL4MIS, DiffRect: min-max per volume; A&D: min-max on top for all (CT is clipped before, which nnU-Net's does).
MIN_MAX = {"diffrect_acdc", "diffrect_mscmr", "diffrect_prostate", "generic_ssl_la", "generic_ssl_mnms", "recipe_acdc"}


@pytest.mark.parametrize(("name", "values"), PROTOCOLS.items())
def test_plan_length_and_tiles_are_the_papers(name, values):
    preset = load_preset(name)
    plan, train, predict = preset["plan"], preset["train"], preset["predict"]
    iterations = train["epochs"] * train["iterations_per_epoch"]
    assert (plan["configuration"], plan["patch_size"], plan["batch_size"], iterations) == values[:4]
    assert predict.get("stride") == values[4]
    assert predict.get("disable_tta", False) == (not name.startswith("protodiff"))
    assert "chk" not in predict, "the last checkpoint is tested"
    assert (plan.get("normalization") == "RescaleTo01Normalization") == (name in MIN_MAX)


@pytest.mark.parametrize(("name", "values"), SGD.items())
def test_optimizers_are_the_papers(name, values):
    chosen = load_preset(name)["train"]["set"]
    keys = ("initial_lr", "momentum", "nesterov", "weight_decay", "lr_schedule")
    assert tuple(chosen[key] for key in keys) == values


@pytest.mark.parametrize(("name", "filters"), [("la", 16), ("pancreas", 16), ("brats", 16), ("synapse", 32)])
def test_recipes_with_the_literatures_network_change_nothing_else(name, filters):
    plain, vnet = load_preset(f"recipe_{name}"), load_preset(f"recipe_{name}_vnet")
    network = vnet["plan"].pop("network")
    assert network["network_class_name"] == "nnssl.networks.vnet.VNet"
    assert network["arch_kwargs"]["n_filters"] == filters
    assert [vnet[key] for key in ("plan", "train", "predict")] == [plain[key] for key in ("plan", "train", "predict")]


def test_diffrects_settings_are_the_same_on_every_data_set():
    sections = [load_preset(f"diffrect_{name}")["train"] for name in ("acdc", "mscmr", "prostate", "faithful")]
    assert all(section == sections[0] for section in sections)


def test_a_preset_extends_another_key_by_key(tmp_path):
    base, own = tmp_path / "base.json", tmp_path / "own.json"
    base.write_text(json.dumps({"about": "b", "train": {"epochs": 3, "set": {"a": 1, "b": [1, 2]}}}))
    own.write_text(json.dumps({"extends": str(base), "train": {"set": {"b": [3]}}, "predict": {}}))
    expected = {"name": "own", "about": "b", "train": {"epochs": 3, "set": {"a": 1, "b": [3]}}, "predict": {}}
    assert load_preset(str(own)) == expected
    base.write_text(json.dumps({"extends": str(own)}))
    with pytest.raises(UserError, match="own > base > own"):
        load_preset(str(own))
