"""Options: ranges, names and their round trip through the plan."""

import argparse
import json

import pytest
from nnunetv2.preprocessing.normalization import default_normalization_schemes

from nnssl.cli.plan_and_preprocess import build_parser, planning_options
from nnssl.errors import UserError
from nnssl.plans.options import NORMALIZATIONS, Overrides, PlanningOptions, check_plans_name


def parse(*argv: str) -> tuple[PlanningOptions, list[str] | None]:
    args: argparse.Namespace = build_parser().parse_args(["-d", "901", *argv])
    return planning_options(args)


def test_changes_give_the_plan_a_name_of_its_own():
    options, configurations = parse(
        "-c", "2d", "--patch_size", "160", "160", "--batch_size", "8", "--base_features", "16"
    )
    assert configurations == ["2d"]
    assert options.own_name("nnUNetPlans") == "nnUNetPlans_p160x160_b8_f16"
    assert parse("--spacing", "2", "1.5", "1")[0].own_name("nnUNetPlans") == "nnUNetPlans_s2x1-5x1"
    assert parse("-tr", "CPSTrainer")[0].own_name("nnUNetPlans") == "nnUNetPlans_CPSTrainer"
    assert not parse("-c", "2d", "3d_fullres")[0].changes_plan()


def test_a_trainer_brings_its_memory_factor():
    assert parse("-tr", "CPSTrainer")[0].memory_factor > 1.5
    assert parse("-tr", "SupervisedTrainer")[0].memory_factor == 1
    with pytest.raises(UserError, match="nearest: CPSTrainer"):
        parse("-tr", "CPSTrainr")


@pytest.mark.parametrize("configurations", [[], ["-c", "2d", "3d_fullres"]])
def test_overrides_need_exactly_one_configuration(configurations):
    for change in (["--batch_size", "2"], ["--base_features", "8"], ["--patch_size", "16", "16"]):
        with pytest.raises(UserError, match="exactly one configuration"):
            parse(*configurations, *change)


@pytest.mark.parametrize(
    "change",
    [
        ["--batch_size", "0"],
        ["--base_features", "-1"],
        ["--patch_size", "16"],
        ["--patch_size", "0", "16"],
        ["--patch_size", "4", "4"],
        ["--spacing", "1", "1"],
        ["--spacing", "0", "1", "1"],
        ["-gpu_memory_target", "0"],
        ["-overwrite_plans_name", "a__b"],
        ["-overwrite_plans_name", "../a"],
        ["-overwrite_plans_name", "dataset"],
    ],
)
def test_values_out_of_range_are_refused(change):
    with pytest.raises(UserError):
        parse("-c", "2d", *change)


def test_a_normalization_is_one_of_nnunets():
    with pytest.raises(UserError, match=r"nearest: .*RescaleTo01Normalization"):
        Overrides(normalization="RescaleNormalization")
    for name in NORMALIZATIONS:
        assert hasattr(default_normalization_schemes, name)


def test_options_survive_the_plan():
    options = PlanningOptions(
        planner="ExperimentPlanner",
        gpu_memory_target=11.0,
        trainer="CPSTrainer",
        memory_factor=2.2,
        spacing=(2, 1, 1),
        overrides={
            "2d": Overrides((64, 32), 3, network={"arch_kwargs": {"n": 1}}, normalization="NoNormalization"),
        },
        preset="paper",
    )
    assert PlanningOptions.from_record(json.loads(json.dumps(options.record()))) == options


def test_a_preset_is_overridden_by_the_command_line(tmp_path):
    preset = tmp_path / "paper.json"
    preset.write_text(json.dumps({"plan": {"configuration": "3d_fullres", "patch_size": [8, 16, 16], "batch_size": 4}}))
    options, configurations = parse("--preset", str(preset), "--batch_size", "2")
    assert configurations == ["3d_fullres"]
    assert options.overrides == {"3d_fullres": Overrides(patch_size=(8, 16, 16), batch_size=2)}
    assert options.own_name("nnUNetPlans") == "nnUNetPlans_p8x16x16_b2_paper"
    preset.write_text(json.dumps({"plan": {"patchsize": [8, 16, 16]}}))
    with pytest.raises(UserError, match="nearest: patch_size"):
        parse("-c", "2d", "--preset", str(preset))
    with pytest.raises(UserError, match="must name a preset or a file"):
        parse("--preset", "no_such_preset")


@pytest.mark.parametrize("name", ["nnUNetPlans", "a-b.c_d", "nnUNetPlans_p160x160_b8_f16"])
def test_plain_names_pass(name):
    check_plans_name(name)
