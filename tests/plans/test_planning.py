"""Plans: independent of the number of labels, changed as asked, never overwriting one another by accident."""

import json
import math

import blosc2
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnssl.errors import UserError
from nnssl.layout import RawDataset
from nnssl.plans.manifest import part_folder, require_current
from nnssl.plans.options import Overrides, PlanningOptions
from nnssl.plans.pipeline import plan_and_preprocess
from nnssl.plans.planning import changed_network, find_planner


def without_record(plans: dict) -> dict:
    return {k: v for k, v in plans.items() if k not in ("nnssl", "foreground_intensity_properties_per_channel")}


@pytest.mark.parametrize("labeled", [1, 5])
def test_the_same_images_give_the_same_plan_for_any_number_of_labels(toy, new_toy, labeled):
    other = new_toy("other", labeled=labeled, unlabeled=9 - labeled)
    other.run()
    assert without_record(other.plans()) == without_record(toy.plans())
    assert other.plans()["configurations"]["2d"]["batch_size"] > 2  # three labels alone would cap it at nnU-Net's 2
    intensities = "foreground_intensity_properties_per_channel"
    assert other.plans()[intensities] != toy.plans()[intensities]


def test_unlabeled_images_change_no_intensity_statistics(toy, new_toy):
    other = new_toy("other", labeled=3, unlabeled=0)
    other.run()
    intensities = "foreground_intensity_properties_per_channel"
    assert other.plans()[intensities] == toy.plans()[intensities]
    assert (other.folder / "dataset_fingerprint.json").read_bytes() == (
        toy.folder / "dataset_fingerprint.json"
    ).read_bytes()
    assert other.plans()["configurations"]["2d"]["batch_size"] < toy.plans()["configurations"]["2d"]["batch_size"]


def test_plans_name_only_what_stock_nnunet_knows(toy):
    plans = toy.plans()
    assert plans["experiment_planner_used"] == "ExperimentPlanner"
    assert plans["label_manager"] == "LabelManager"
    assert {c["preprocessor_name"] for c in plans["configurations"].values()} == {"DefaultPreprocessor"}


def network(config: dict) -> torch.nn.Module:
    architecture = config["architecture"]
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        1,
        3,
        deep_supervision=False,
    )


@pytest.mark.parametrize(
    ("configuration", "patch", "expected"),
    [("2d", (40, 24), (40, 24)), ("2d", (35, 9), (36, 10)), ("3d_fullres", (9, 24, 30), (10, 24, 32))],
)
def test_a_patch_size_recomputes_the_network(toy, configuration, patch, expected):
    override = Overrides(patch_size=patch, batch_size=3, base_features=4)
    prepared = toy.run(configuration, planning={"overrides": {configuration: override}})
    config = prepared.plans["configurations"][configuration]
    assert tuple(config["patch_size"]) == expected
    assert config["batch_size"] == 3
    assert config["architecture"]["arch_kwargs"]["features_per_stage"][:2] == [4, 8]
    strides = [math.prod(axis) for axis in zip(*config["architecture"]["arch_kwargs"]["strides"], strict=True)]
    assert all(p % s == 0 for p, s in zip(expected, strides, strict=True))
    assert network(config)(torch.zeros(1, 1, *expected)).shape == (1, 3, *expected)
    other = "3d_fullres" if configuration == "2d" else "2d"
    assert prepared.plans["configurations"][other] == toy.plans()["configurations"][other]


def test_asking_for_what_is_planned_changes_nothing(toy):
    for configuration, config in toy.plans()["configurations"].items():
        same = Overrides(patch_size=config["patch_size"], batch_size=config["batch_size"], base_features=32)
        prepared = toy.run("2d", planning={"overrides": {configuration: same}, "plans_name": "same"})
        changed = dict(prepared.plans["configurations"][configuration])
        assert changed.pop("data_identifier") == f"same_{configuration}"
        assert changed == {k: v for k, v in config.items() if k != "data_identifier"}


def test_a_rounded_patch_and_a_large_memory_are_reported(toy):
    lines: list[str] = []
    override = {"2d": Overrides(patch_size=(35, 100), batch_size=4000)}
    plan_and_preprocess(RawDataset.load(toy.raw), ["2d"], PlanningOptions(overrides=override), report=lines.append)
    text = "\n".join(lines)
    assert "patch size 35x100 became 40x112" in text
    assert "exceeds the median image 24x24" in text
    assert "GB, more than the target of 8 GB" in text


def test_a_patch_of_the_wrong_dimension_is_refused_and_writes_no_plan(toy):
    before = sorted(p.name for p in toy.folder.glob("*.json"))
    with pytest.raises(UserError, match="got 3 numbers for 2d; allowed 2 numbers"):
        toy.run("2d", planning={"overrides": {"2d": Overrides(patch_size=(8, 8, 8))}})
    assert sorted(p.name for p in toy.folder.glob("*.json")) == before


def test_a_changed_plan_never_overwrites_an_existing_one(toy):
    before = (toy.folder / "nnUNetPlans.json").read_bytes()
    prepared = toy.run("2d", planning={"overrides": {"2d": Overrides(batch_size=3)}})
    assert prepared.plans_name == "nnUNetPlans_b3"
    assert prepared.processed == {"2d": {"labeled": 0, "unlabeled": 0, "monitoring": 0}}  # it shares the data
    assert require_current(toy.folder, prepared.plans, "2d")
    assert (
        toy.run("2d", planning={"trainer": "CPSTrainer", "memory_factor": 2.0}).plans_name == "nnUNetPlans_CPSTrainer"
    )
    assert (toy.folder / "nnUNetPlans.json").read_bytes() == before
    forced = toy.run("2d", planning={"overrides": {"2d": Overrides(batch_size=3)}, "plans_name": "nnUNetPlans"})
    assert forced.plans_name == "nnUNetPlans"
    assert toy.plans()["configurations"]["2d"]["batch_size"] == 3


def test_the_first_plan_takes_the_plain_name_and_keeps_its_changes(new_toy):
    toy = new_toy("fresh", labeled=1, unlabeled=2, monitoring=0, test=0)
    change = {"overrides": {"2d": Overrides(batch_size=3)}}
    assert toy.run("2d", planning=change).plans_name == "nnUNetPlans"
    before = (toy.folder / "nnUNetPlans.json").read_bytes()
    assert toy.run("2d", planning=change).plans_name == "nnUNetPlans"
    assert toy.run("3d_fullres").plans_name == "nnUNetPlans"
    assert (toy.folder / "nnUNetPlans.json").read_bytes() == before
    assert toy.run("3d_fullres", planning={"overrides": {"3d_fullres": Overrides(batch_size=3)}}).plans_name == (
        "nnUNetPlans_b3"
    )
    toy.run("2d", clean=True)
    assert "overrides" not in toy.plans()["nnssl"]["planning"]


def test_two_configurations_of_one_plan_keep_their_changes(toy):
    toy.run("2d", planning={"overrides": {"2d": Overrides(batch_size=3)}})
    toy.run("3d_fullres", planning={"overrides": {"3d_fullres": Overrides(batch_size=3)}})
    configurations = toy.plans("nnUNetPlans_b3")["configurations"]
    assert [configurations[c]["batch_size"] for c in ("2d", "3d_fullres")] == [3, 3]


def test_settings_of_methods_survive_replanning(toy):
    plans = toy.plans()
    plans["nnssl"]["SomeTrainer"] = {"weight": 3}
    (toy.folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    toy.run()
    assert toy.plans()["nnssl"]["SomeTrainer"] == {"weight": 3}


def test_another_normalization_gets_data_of_its_own(toy):
    change = {"overrides": {"2d": Overrides(normalization="RescaleTo01Normalization")}}
    prepared = toy.run("2d", planning=change)
    config = prepared.plans["configurations"]["2d"]
    assert prepared.plans_name == "nnUNetPlans_RescaleTo01"
    assert config["normalization_schemes"] == ["RescaleTo01Normalization"]
    for part in ("labeled", "unlabeled"):
        for path in sorted(part_folder(toy.folder, config["data_identifier"], part).glob("case_*.b2nd")):
            if not path.name.endswith("_seg.b2nd"):
                voxels = blosc2.open(str(path))[:]
                assert (voxels.min(), voxels.max()) == (0, 1)
    assert toy.plans()["configurations"]["2d"]["normalization_schemes"] == ["ZScoreNormalization"]
    assert require_current(toy.folder, toy.plans(), "2d")


def test_another_spacing_gets_data_of_its_own(toy):
    prepared = toy.run("3d_fullres", planning={"spacing": (2.5, 1.5, 1.5)})
    config = prepared.plans["configurations"]["3d_fullres"]
    assert prepared.plans_name == "nnUNetPlans_s2-5x1-5x1-5"
    assert config["spacing"] == [2.5, 1.5, 1.5]
    assert prepared.plans["configurations"]["2d"]["data_identifier"] == "nnUNetPlans_s2-5x1-5x1-5_2d"
    assert require_current(toy.folder, toy.plans(), "2d")
    assert toy.run("3d_fullres").processed["3d_fullres"]["unlabeled"] == 6


def test_a_trainers_memory_shrinks_the_batch(toy):
    prepared = toy.run("2d", planning={"trainer": "X", "gpu_memory_target": 0.01, "memory_factor": 4.0})
    wide = toy.run("2d", planning={"gpu_memory_target": 0.01, "plans_name": "wide"})
    batch, more = (p.plans["configurations"]["2d"]["batch_size"] for p in (prepared, wide))
    assert batch < more


def test_unknown_planners_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="nnUNetPlannerResEncM"):
        find_planner("nnUNetPlannerResEnc")
    assert find_planner("nnUNetPlannerResEncM").__name__ == "nnUNetPlannerResEncM"


def test_a_preset_may_replace_the_network():
    planned = {
        "network_class_name": "a.UNet",
        "arch_kwargs": {"conv_op": "torch.nn.Conv3d", "n_stages": 3},
        "_kw_requires_import": ["conv_op", "norm_op"],
    }
    assert changed_network(planned, {"arch_kwargs": {"n_stages": 2}}) == {
        **planned,
        "arch_kwargs": {"conv_op": "torch.nn.Conv3d", "n_stages": 2},
    }
    replaced = changed_network(planned, {"network_class_name": "b.V", "arch_kwargs": {"conv_op": "planned", "w": 1}})
    assert replaced == {
        "network_class_name": "b.V",
        "arch_kwargs": {"conv_op": "torch.nn.Conv3d", "w": 1},
        "_kw_requires_import": ["conv_op"],
    }
    with pytest.raises(UserError, match="n_stages"):
        changed_network(planned, {"network_class_name": "b.V", "arch_kwargs": {"n_stage": "planned"}})


def test_modalities_that_meet_are_z_scored_case_by_case(new_toy):
    domains = {f"case_{i:03d}": "scannerA" if i < 5 else "scannerB" for i in range(11)}
    both = {"scannerA": "CT", "scannerB": "MR"}
    lines: list[str] = []
    toy = new_toy("mixed", channel="CT", nnssl={"domains": domains, "domain_modalities": both})
    plan_and_preprocess(RawDataset.load(toy.raw), ["2d"], report=lines.append)
    config = toy.plans()["configurations"]["2d"]
    assert config["normalization_schemes"] == ["ZScoreNormalization"]
    text = "\n".join(lines)
    assert "every case is z-scored by itself" in text
    assert "modalities meet: scannerA (CT), scannerB (MR)" in text
    assert "Domains: scannerA: 3 labeled, 2 unlabeled; scannerB: 4 unlabeled, 1 val, 1 test" in text
    for part in ("labeled", "unlabeled"):  # the voxels that training sees
        for path in sorted(part_folder(toy.folder, config["data_identifier"], part).glob("case_*.b2nd")):
            if not path.name.endswith("_seg.b2nd"):
                voxels = blosc2.open(str(path))[:]
                assert abs(voxels.mean()) < 0.01
                assert abs(voxels.std() - 1) < 0.01


def set_domains(toy, **block) -> None:
    content = json.loads((toy.raw / "dataset.json").read_text())
    content["nnssl"] = block
    (toy.raw / "dataset.json").write_text(json.dumps(content))


def test_ct_normalization_stays_where_every_domain_is_ct(new_toy):
    domains = {f"case_{i:03d}": "AB"[i % 2] for i in range(11)}
    toy = new_toy("ct", channel="CT", nnssl={"domains": domains, "domain_modalities": {"A": "CT", "B": "CT"}})
    schemes = [toy.run().plans["configurations"]["2d"]["normalization_schemes"]]
    set_domains(toy, domains=domains)  # several domains, and nothing says that all are CT
    schemes.append(toy.run().plans["configurations"]["2d"]["normalization_schemes"])
    set_domains(toy, domains=dict.fromkeys(domains, "A"))
    schemes.append(toy.run().plans["configurations"]["2d"]["normalization_schemes"])
    assert schemes == [["CTNormalization"], ["ZScoreNormalization"], ["CTNormalization"]]


def test_a_users_own_configuration_cannot_bring_ct_normalization_back(new_toy):
    domains = {f"case_{i:03d}": "AB"[i % 2] for i in range(11)}
    toy = new_toy("own", channel="CT")
    plans = toy.run().plans
    plans["configurations"]["mine"] = plans["configurations"]["2d"]
    (toy.folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    set_domains(toy, domains=domains, domain_modalities={"A": "CT", "B": "MR"})
    with pytest.raises(UserError, match="CTNormalization in configuration mine"):
        toy.run()


def test_planning_refuses_domains_with_gaps(toy):
    set_domains(toy, domains={f"case_{i:03d}": "A" for i in range(10)})
    with pytest.raises(UserError, match="none for case_010"):
        toy.run()
    set_domains(toy, domains=["A"])
    with pytest.raises(UserError, match="maps names to names"):
        toy.run()


def test_folds_follow_the_domains(new_toy):
    domains = {f"case_{i:03d}": "AB"[i % 2] for i in range(10)}  # the plain folds hold B, B and A, A
    toy = new_toy("folds", labeled=10, unlabeled=0, monitoring=0, test=0, nnssl={"domains": domains})
    toy.run()
    for split in json.loads((toy.folder / "splits_final.json").read_text()):
        assert sorted(domains[case] for case in split["val"]) == ["A", "B"]


def test_an_unseen_domain_touches_neither_fingerprint_nor_plan_nor_data(new_toy):
    """Test images of another spacing, size and unit: every file of the preprocessed set but the record stays."""
    seen = {}
    for name, scale, spacing in (("plain", 1, (1.0, 1.0, 2.0)), ("strange", 1000, (3.0, 3.0, 7.0))):
        domains = {f"case_{i:03d}": "A" for i in range(10)} | {"case_010": "unseen"}
        toy = new_toy(name, nnssl={"domains": domains})
        path = str(toy.raw / "imagesTs" / "case_010_0000.nii.gz")
        image = sitk.ReadImage(path) * scale
        image.SetSpacing(spacing)
        sitk.WriteImage(image, path)
        toy.run()
        names = ("dataset_fingerprint.json", "nnUNetPlans.json", "splits_final.json")
        seen[name] = {n: (toy.folder / n).read_bytes() for n in names}
        data = part_folder(toy.folder, "nnUNetPlans_2d", "labeled")
        seen[name] |= {p.name: blosc2.open(str(p))[:].tobytes() for p in data.glob("*.b2nd")}
    assert len(seen["plain"]) == 9
    assert seen["plain"] == seen["strange"]
