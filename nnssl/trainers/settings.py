"""Settings of methods: frozen dataclasses that validate what users write, and describe themselves."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nnssl.errors import UserError, nearest
from nnssl.training.ramps import schedule


def option(
    default: Any, help: str, *, choices: tuple | None = None, low: float | None = None, high: float | None = None
):
    """Declare one setting: its default, what it does, and which values are allowed (``low``/``high`` inclusive)."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class Settings:
    """Base of every method's settings. Shared by all methods, so that comparisons compare methods.

    The defaults are nnU-Net's own; what a paper used instead stands in its preset.
    """

    optimizer: str = option("sgd", "optimizer; Adam has betas 0.9 and 0.999", choices=("sgd", "adam", "adamw"))
    initial_lr: float = option(0.01, "learning rate at the first step", low=0)
    momentum: float = option(0.99, "momentum of SGD", low=0, high=1)
    nesterov: bool = option(True, "Nesterov momentum")
    weight_decay: float = option(3e-5, "weight decay", low=0)
    lr_schedule: str = option("poly", "learning rate over the run", choices=("poly", "constant"))
    warmup: int = option(0, "iterations over which the learning rate rises to its course", low=0)
    gradient_clip: float = option(12.0, "largest norm of a network's gradient", low=1e-6)
    dropout: float = option(
        0.0, "rate of channel dropout in every block of the planned network; 0 = as planned", low=0, high=0.9
    )
    deep_supervision: bool = option(True, "supervised loss on nnU-Net's lower resolutions too")
    unlabeled_batch: int | None = option(None, "unlabeled items a step, global; none = the plan's batch size", low=1)
    supervision: str = option(
        "gt", "learn from labels, from masks of labelsPseudo, or from both", choices=("gt", "pseudo", "gt+pseudo")
    )
    pseudo_weight: float = option(1.0, "weight of the loss on masks of labelsPseudo (supervision=gt+pseudo)", low=0)
    pseudo_batch: int | None = option(None, "items a step with such masks, global; none = the plan's batch size", low=1)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Settings:
        """Build settings from names and values; strings (from the command line) are parsed by the field's type.

        Raises:
            UserError: for an unknown key (with the nearest ones), a value of the wrong type or out of range.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        parsed = {}
        for key, value in values.items():
            if key not in known:
                raise UserError("--set must name a setting of the trainer", repr(key), nearest(key, known))
            parsed[key] = _check(known[key], _parse(key, value, hints[key]))
        settings = cls(**parsed)
        settings.validate()
        return settings

    def validate(self) -> None:
        """Check what concerns several settings at once; raise UserError."""

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-able names and values."""
        return dataclasses.asdict(self)

    @classmethod
    def describe(cls) -> list[dict[str, Any]]:
        """Return one row a setting: name, type, default, choices, low, high, help (for --help and the pages)."""
        hints = typing.get_type_hints(cls)
        rows = []
        for f in dataclasses.fields(cls):
            kind = hints[f.name]
            name = kind.__name__ if isinstance(kind, type) else str(kind)
            rows.append({"name": f.name, "type": name, "default": f.default, **f.metadata})
        return rows


def settings_table(cls: type[Settings], base: type[Settings] | None = Settings) -> str:
    """Return a method's settings as a Markdown table; those of ``base`` are left out (None: none are)."""
    shared = {row["name"] for row in base.describe()} if base is not None else set()
    inherited = {row["name"]: row for row in base.describe()} if base is not None else {}
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for row in cls.describe():
        if row["name"] in shared and inherited[row["name"]]["default"] == row["default"]:
            continue
        choices = f" ({', '.join(map(str, row['choices']))})" if row["choices"] else ""
        lines.append(f"| `{row['name']}` | {str(row['default']).lower()} | {row['help']}{choices} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class UnsupervisedSettings(Settings):
    """Settings of methods with one unsupervised term, weighted over the run."""

    unsupervised_weight: float = option(1.0, "weight of the unsupervised term at the end of its schedule", low=0)
    unsupervised_schedule: str = option("ramp", "its course over the run: constant, linear, ramp, warmup1 to warmup99")

    def validate(self) -> None:
        schedule(self.unsupervised_schedule)

    def unsupervised(self, fraction: float) -> float:
        """Return the weight of the unsupervised term at a fraction of the run."""
        return self.unsupervised_weight * schedule(self.unsupervised_schedule)(fraction)


def _parse(key: str, value: Any, kind: Any) -> Any:
    """Turn ``value`` into the type a field declares."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        inner = [k for k in typing.get_args(kind) if k is not type(None)]
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        kind = inner[0]
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "1", "yes", "false", "0", "no"):
            return value.lower() in ("true", "1", "yes")
        if isinstance(value, bool):
            return value
    elif kind in (int, float):
        try:
            number = kind(value) if not isinstance(value, bool) else None
        except (TypeError, ValueError):
            number = None
        if number is not None and number == number and not (kind is int and float(value) != number):
            return number
    elif kind is str and isinstance(value, str):
        return value
    raise UserError(f"setting {key} must be of type {kind.__name__}", repr(value))


def _check(declared: dataclasses.Field, value: Any) -> Any:
    """Hold a value against the field's choices and range."""
    choices, low, high = (declared.metadata[k] for k in ("choices", "low", "high"))
    if value is None:
        return value
    if choices is not None and value not in choices:
        raise UserError(
            f"setting {declared.name} must be one of its choices", repr(value), ", ".join(map(str, choices))
        )
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"{'-inf' if low is None else low} to {'inf' if high is None else high}"
        raise UserError(f"setting {declared.name} must be in range", value, bounds)
    return value
