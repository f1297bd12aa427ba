"""What a user may change about a plan, its checks, and the name of the plan that results. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from nnssl.errors import UserError, nearest

#: nnU-Net's configurations that nnssl trains; the cascade needs predictions of another stage and is refused.
CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")
CASCADE = "3d_cascade_fullres"
#: nnU-Net's normalizations by the names that plans use.
NORMALIZATIONS = (
    "CTNormalization",
    "NoNormalization",
    "RGBTo01Normalization",
    "RescaleTo01Normalization",
    "ZScoreNormalization",
)


@dataclass(frozen=True)
class Overrides:
    """Changes to one configuration; what is None stays as nnU-Net plans it.

    Args:
        patch_size: voxels an axis, in the order of the plan (nnU-Net's transposed axes: slices first in 3D).
        batch_size: labeled items a step.
        base_features: feature maps of the first stage; they double each stage up to nnU-Net's maximum.
        network: another network: ``{"arch_kwargs": {...}}`` changes arguments of the planned one;
            ``{"network_class_name": ..., "arch_kwargs": {...}}`` replaces it, and an argument given as ``"planned"``
            takes the planned network's value.
        normalization: one of nnU-Net's normalizations for every channel, such as RescaleTo01Normalization, instead of
            the one that follows from the channels' names.
    """

    patch_size: tuple[int, ...] | None = None
    batch_size: int | None = None
    base_features: int | None = None
    network: dict[str, Any] | None = None
    normalization: str | None = None

    def __post_init__(self) -> None:
        if self.normalization is not None and self.normalization not in NORMALIZATIONS:
            allowed = nearest(str(self.normalization), NORMALIZATIONS)
            raise UserError("normalization must be one of nnU-Net's", repr(self.normalization), allowed)
        if self.patch_size is not None:
            object.__setattr__(self, "patch_size", tuple(int(v) for v in self.patch_size))
            if len(self.patch_size) not in (2, 3) or min(self.patch_size) < 1 or max(self.patch_size) < 8:
                allowed = "2 (2d) or 3 positive numbers, at least one of them 8 or more"
                raise UserError("--patch_size must be a size in voxels", list(self.patch_size), allowed)
        for name in ("batch_size", "base_features"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be a positive number", value, "1 or more")

    def to_dict(self) -> dict[str, Any]:
        """Return the given changes only, JSON-safe."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}

    def __bool__(self) -> bool:
        return bool(self.to_dict())


@dataclass(frozen=True)
class PlanningOptions:
    """How to plan.

    Args:
        planner: name of an nnU-Net experiment planner (``-pl``); None: the existing plan's, else ExperimentPlanner.
        gpu_memory_target: GB that training may take; None: the planner's own.
        trainer: the trainer to plan for (``-tr``), for the record and the plan's name.
        memory_factor: memory of that trainer in units of supervised training.
        spacing: target spacing in mm in the image's own axis order (nnU-Net's ``-overwrite_target_spacing``).
        overrides: changes by configuration.
        preset: name of the preset that was applied, for the plan's name.
        plans_name: the name to write the plan under, whatever it overwrites.
    """

    planner: str | None = None
    gpu_memory_target: float | None = None
    trainer: str | None = None
    memory_factor: float = 1.0
    spacing: tuple[float, ...] | None = None
    overrides: dict[str, Overrides] = field(default_factory=dict)
    preset: str | None = None
    plans_name: str | None = None

    def __post_init__(self) -> None:
        if self.gpu_memory_target is not None and not self.gpu_memory_target > 0:
            raise UserError("-gpu_memory_target must be positive", self.gpu_memory_target, "GB > 0")
        if self.spacing is not None:
            object.__setattr__(self, "spacing", tuple(float(v) for v in self.spacing))
            if len(self.spacing) != 3 or not all(0 < v < float("inf") for v in self.spacing):
                raise UserError("--spacing must be a voxel size in mm", list(self.spacing), "three positive numbers")
        if self.plans_name is not None:
            check_plans_name(self.plans_name)

    def record(self) -> dict[str, Any]:
        """Return what is written into the plan as ``plans['nnssl']['planning']``, so that a rerun finds it."""
        values = {
            "planner": self.planner,
            "gpu_memory_target": self.gpu_memory_target,
            "trainer": self.trainer,
            "memory_factor": self.memory_factor if self.trainer else None,
            "spacing": list(self.spacing) if self.spacing else None,
            "preset": self.preset,
            "overrides": {name: o.to_dict() for name, o in sorted(self.overrides.items()) if o},
        }
        return {key: value for key, value in values.items() if value}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> PlanningOptions:
        """Return the options that a plan was made with (inverse of :meth:`record`)."""
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in record.items() if key in known and key != "overrides"}
        overrides = {name: Overrides(**o) for name, o in record.get("overrides", {}).items()}
        return cls(**values, overrides=overrides)

    def changes_plan(self) -> bool:
        """Whether anything but the planner differs from a plain ``nnssl_plan_and_preprocess -d ID``."""
        return bool(set(self.record()) - {"planner"})

    def own_name(self, base: str) -> str:
        """Return a plans name that tells the changes, such as ``nnUNetPlans_p160x160_b8_f16``."""
        tokens = [base]
        for name, override in sorted(self.overrides.items()):
            if len(self.overrides) > 1:
                tokens.append(name)
            tokens += _override_tokens(override, preset=self.preset)
        if self.spacing:
            tokens.append("s" + "x".join(f"{v:g}".replace(".", "-") for v in self.spacing))
        if self.gpu_memory_target:
            tokens.append(f"g{self.gpu_memory_target:g}".replace(".", "-"))
        tokens += [token for token in (self.trainer, self.preset) if token]
        name = re.sub(r"[^A-Za-z0-9.\-]+", "_", "_".join(tokens)).strip("_")
        check_plans_name(name)
        return name


def _override_tokens(override: Overrides, preset: str | None) -> list[str]:
    tokens = []
    if override.patch_size:
        tokens.append("p" + "x".join(map(str, override.patch_size)))
    if override.batch_size:
        tokens.append(f"b{override.batch_size}")
    if override.base_features:
        tokens.append(f"f{override.base_features}")
    if override.normalization and not preset:
        tokens.append(override.normalization.removesuffix("Normalization"))
    if override.network and not preset:
        tokens.append("n" + str(override.network.get("network_class_name", "custom")).rsplit(".", 1)[-1])
    return tokens


def check_plans_name(name: str) -> None:
    """Refuse a plans name that can't be part of nnU-Net's ``TRAINER__PLANS__CONFIGURATION``.

    Raises:
        UserError: if it is empty, holds ``__`` or characters that don't belong into a file name.
    """
    if "__" in name or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._\-]*", name) or name in RESERVED_NAMES:
        allowed = "letters, digits, '.', '-' and single '_'"
        raise UserError("a plans name must fit into nnU-Net's folder names", repr(name), allowed, "choose another name")


#: Files beside the plans in the preprocessed folder.
RESERVED_NAMES = (
    "dataset",
    "dataset_fingerprint",
    "splits_final",
    "nnssl_unlabeled",
    "nnssl_image_fingerprint",
    "nnssl_verified",
)

_PLAN_KEYS = ("configuration", "patch_size", "batch_size", "base_features", "spacing", "network", "normalization")


def plan_section(preset: dict[str, Any] | None) -> dict[str, Any]:
    """Return the ``plan`` section of a preset (empty without one) after checking its keys.

    Raises:
        UserError: for an unknown key, with the nearest known ones.
    """
    section = dict((preset or {}).get("plan", {}))
    for key in section:
        if key not in _PLAN_KEYS:
            rule = f"the plan section of preset {preset['name']} must hold known keys" if preset else ""
            raise UserError(rule, repr(key), nearest(key, _PLAN_KEYS), "repair the preset")
    return section


def one_configuration(configurations: Sequence[str] | None, preset_configuration: str | None) -> str:
    """Return the single configuration that overrides apply to.

    Raises:
        UserError: unless exactly one was given by ``-c`` or by the preset.
    """
    given = list(configurations or ([preset_configuration] if preset_configuration else []))
    if len(given) != 1:
        rule = "--patch_size, --batch_size, --base_features and a preset's network apply to exactly one configuration"
        raise UserError(rule, " ".join(given) or "no -c", "one of " + ", ".join(CONFIGURATIONS), "give one -c")
    return given[0]
