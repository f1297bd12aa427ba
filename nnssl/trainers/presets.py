"""The train section of a preset."""

from __future__ import annotations

from typing import Any

from nnssl.errors import UserError
from nnssl.plans.preset import load_preset

_OPTIONS = ("seed", "epochs", "iterations_per_epoch")


def train_section(name_or_path: str, trainer: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (method settings, run options) of a preset's ``train`` section.

    The section reads ``{"trainer": NAME, "set": {KEY: VALUE}, "epochs": N, "iterations_per_epoch": N, "seed": N}``.

    Raises:
        UserError: if the preset is for another trainer or holds an unknown key.
    """
    preset = load_preset(name_or_path)
    section = dict(preset.get("train", {}))
    meant = section.pop("trainer", trainer)
    if meant != trainer:
        raise UserError(
            "a preset belongs to one trainer", f"-tr {trainer} with {preset['name']}", meant, f"use -tr {meant}"
        )
    settings = section.pop("set", {})
    unknown = sorted(set(section) - set(_OPTIONS))
    if unknown:
        allowed = ", ".join(("trainer", "set", *_OPTIONS))
        raise UserError(f"the train section of preset {preset['name']} has known keys", ", ".join(unknown), allowed)
    return settings, section
