"""Settings refuse what they do not know, and presets hold only settings that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnssl.errors import UserError
from nnssl.plans.preset import available_presets, load_preset
from nnssl.trainers.diffcl_settings import DiffCLSettings
from nnssl.trainers.mean_teacher import MeanTeacherSettings
from nnssl.trainers.presets import train_section
from nnssl.trainers.registry import TRAINERS, trainer_class, trainer_info
from nnssl.trainers.run_options import RunOptions
from nnssl.trainers.settings import Settings, settings_table


def test_strings_are_parsed_by_the_fields_type():
    settings = DiffCLSettings.from_mapping({"eta": "0.5", "hfm": "false", "k": "8", "unlabeled_batch": "none"})
    assert (settings.eta, settings.hfm, settings.k, settings.unlabeled_batch) == (0.5, False, 8, None)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"etta": 1}, ("etta", "nearest: ", "eta")),
        ({"eta": -1}, ("eta", "-1", "0 to inf")),
        ({"eta": "much"}, ("eta", "float", "much")),
        ({"k": 1.5}, ("k", "int")),
        ({"hfm": "maybe"}, ("hfm", "bool")),
        ({"hfm_mask": "round"}, ("hfm_mask", "radial", "box", "ratio")),
        ({"mu_schedule": "soon"}, ("soon", "ramp")),
        ({"hfm_stages": "3;4"}, ("hfm_stages", "auto")),
        ({"t_min_unlabeled": 1000}, ("t_min_unlabeled", "timesteps")),
        ({"network": "vnet"}, ("V-Net", "deep_supervision")),
        ({"eta": float("nan")}, ("eta", "nan")),
    ],
)
def test_refusals_name_the_setting_and_what_is_allowed(values, words):
    with pytest.raises(UserError) as refused:
        DiffCLSettings.from_mapping(values)
    assert all(word in str(refused.value) for word in words), str(refused.value)


@pytest.mark.parametrize("name", sorted(TRAINERS))
def test_settings_survive_their_own_dictionary_and_describe_every_field(name):
    cls = trainer_class(name).settings_class
    assert cls.from_mapping(cls().to_dict()) == cls()
    rows = {row["name"]: row for row in cls.describe()}
    assert set(rows) == set(cls().to_dict())
    assert all(row["help"] for row in rows.values())


def test_the_unsupervised_weight_follows_its_schedule():
    settings = MeanTeacherSettings(unsupervised_weight=2.0, unsupervised_schedule="ramp")
    assert [round(settings.unsupervised(f), 4) for f in (0, 0.25, 0.5, 0.75, 1)] == [0.0135, 0.1201, 0.573, 1.4632, 2.0]


@pytest.mark.parametrize("name", sorted(available_presets()))
def test_presets_hold_settings_that_exist(name):
    preset = load_preset(name)
    trainer = preset["train"].get("trainer")
    assert (trainer is None) == name.startswith("recipe_")
    settings, options = train_section(name, trainer or "SupervisedTrainer")
    trainer_class(trainer or "SupervisedTrainer").settings_class.from_mapping(settings)
    RunOptions(**options)
    if trainer is None:
        return
    with pytest.raises(UserError, match="belongs to one trainer"):
        train_section(name, "SupervisedTrainer")


def test_table_2_of_the_paper_is_what_the_presets_say():
    expected = {
        "diffcl_la4": (0.02, 0.7, 0.6),
        "diffcl_la8": (0.02, 0.5, 0.7),
        "diffcl_pancreas6": (0.2, 0.007, 0.8),
        "diffcl_pancreas12": (0.2, 0.0003, 0.5),
        "diffcl_brats25": (0.2, 0.007, 0.5),
        "diffcl_brats50": (0.2, 0.003, 0.5),
    }
    for name, (beta, eta, threshold) in expected.items():
        for preset in (name, name + "_literal"):
            chosen = load_preset(preset)["train"]["set"]
            assert (chosen["beta_c"], chosen["eta"], chosen["hfm_threshold"]) == (beta, eta, threshold)
            assert chosen["mu_schedule"] == ("constant" if preset.endswith("literal") else "ramp")


def test_run_options_refuse_what_cannot_be():
    for wrong in ({"epochs": 0}, {"iterations_per_epoch": 0}, {"seed": -1}, {"precision": "fp8"}):
        with pytest.raises(UserError):
            RunOptions(**wrong)
    assert RunOptions().total_steps == 30_000


def test_base_settings_are_nnunets():
    base = Settings()
    assert (base.initial_lr, base.momentum, base.nesterov, base.weight_decay) == (0.01, 0.99, True, 3e-5)


@pytest.mark.parametrize("name", sorted(TRAINERS))
def test_the_methods_page_holds_the_settings_as_the_code_has_them(name):
    page = Path(__file__).parents[2] / "documentation" / "methods" / f"{trainer_info(name).module.split('.')[-1]}.md"
    base = None if name == "SupervisedTrainer" else Settings
    table = settings_table(trainer_class(name).settings_class, base)
    assert table in page.read_text(encoding="utf-8"), f"put this into {page.name}:\n{table}"
