"""Plans for few labels: nnU-Net's planners, told of all images, with a user's changes on top.

nnU-Net caps the batch at 5 % of the labeled voxels and takes the median shape of the labeled images. With three labels
both are poor, so shapes, spacings and the cap count every image, labeled or not. Intensity statistics stay those of
the labeled cases. The same images give the same plan for any number of labels.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nnunetv2
import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnssl.errors import UserError, nearest
from nnssl.plans.domains import Domains, channels_by_themselves
from nnssl.plans.manifest import (
    NORMALIZATIONS_WITHOUT_STATISTICS,
    configuration_of,
    plans_on_disk,
    preprocessing_hash,
    write_json_atomically,
)
from nnssl.plans.options import CASCADE, Overrides, PlanningOptions

DEFAULT_PLANNER = "ExperimentPlanner"


@dataclass(frozen=True)
class Target:
    """Where a plan goes and how it is made.

    Args:
        name: plans name.
        base: the planner's own plans name.
        options: the options, completed by those that an existing plan was made with.
        notes: lines to tell the user.
    """

    name: str
    base: str
    options: PlanningOptions
    notes: tuple[str, ...] = ()


def find_planner(name: str) -> type[ExperimentPlanner]:
    """Return one of nnU-Net's experiment planners by name.

    Raises:
        UserError: if there is none of that name.
    """
    folder = str(Path(nnunetv2.__path__[0]) / "experiment_planning")
    found = recursive_find_python_class(folder, name, current_module="nnunetv2.experiment_planning")
    if found is None or not (inspect.isclass(found) and issubclass(found, ExperimentPlanner)):
        known, classes = set(), [ExperimentPlanner]
        while classes:
            known.add(classes[-1].__name__)
            classes += classes.pop().__subclasses__()
        raise UserError(
            "-pl must name a planner of nnU-Net", repr(name), nearest(name, known), "choose a known planner"
        )
    return found


def choose_target(options: PlanningOptions, preprocessed_folder: Path, clean: bool = False) -> Target:
    """Decide the plans name: a changed plan never overwrites an existing one unless its name is given.

    A run without changes keeps those that the existing plan was made with (``clean`` drops them); a run that changes
    another configuration of the same plan keeps the first one's changes.
    """
    record = {} if clean or not options.plans_name else _planning_record(preprocessed_folder, options.plans_name)
    planner = options.planner or record.get("planner", DEFAULT_PLANNER)
    base = inspect.signature(find_planner(planner)).parameters["plans_name"].default
    options = replace(options, planner=planner)
    name = options.plans_name or base
    exists = (preprocessed_folder / f"{name}.json").is_file()
    record = {} if clean else _planning_record(preprocessed_folder, name)
    if not options.changes_plan():
        if set(record) - {"planner", "statistics"}:
            kept = PlanningOptions.from_record(record)
            note = (
                f"{name} keeps the changes it was made with: {json.dumps(_without_defaults(kept))} (--clean drops them)"
            )
            return Target(name, base, replace(kept, planner=planner), (note,))
        return Target(name, base, options)
    if exists and not options.plans_name and not _covers(record, options):
        name = options.own_name(base)
        record = {} if clean else _planning_record(preprocessed_folder, name)
    if record:
        kept_overrides = PlanningOptions.from_record(record).overrides
        options = replace(options, overrides={**kept_overrides, **options.overrides})
    return Target(name, base, options)


def _covers(record: dict[str, Any], options: PlanningOptions) -> bool:
    """Whether the recorded plan already has just these changes for the configurations in question."""
    wanted = options.record()
    same = all(record.get(k) == wanted.get(k) for k in ("planner", "gpu_memory_target", "trainer", "spacing", "preset"))
    overrides = record.get("overrides", {})
    return same and bool(record) and all(overrides.get(c) == o for c, o in wanted.get("overrides", {}).items())


def _planning_record(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")).get("nnssl", {}).get("planning", {}) if path.is_file() else {}


def _without_defaults(options: PlanningOptions) -> dict[str, Any]:
    return {key: value for key, value in options.record().items() if key != "planner"}


@contextlib.contextmanager
def _at_least_one_worker() -> Iterator[None]:
    """Hide ``nnUNet_n_proc_DA=0``, which nnU-Net's planner would pass on as a number of torch threads."""
    name, before = "nnUNet_n_proc_DA", os.environ.get("nnUNet_n_proc_DA")
    if before == "0":
        os.environ[name] = "1"
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


@_at_least_one_worker()
def make_plan(
    dataset_name: str,
    preprocessed_folder: Path,
    target: Target,
    images: dict[str, dict[str, Any]],
    labeled: int,
    domains: Domains | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Plan a data set whose ``dataset_fingerprint.json`` exists, and write ``<name>.json``.

    Args:
        dataset_name: ``DatasetXXX_Name``.
        preprocessed_folder: where the fingerprint lies and the plan goes.
        target: name and options (:func:`choose_target`).
        images: statistics of all labeled and unlabeled images
            (:func:`nnssl.plans.fingerprint.update_image_fingerprint`).
        labeled: number of labeled cases among them.
        domains: the data set's domains; where other modalities than CT may be among them, no channel is normalized
            with statistics of the data set (:func:`nnssl.plans.domains.channels_by_themselves`).

    Returns:
        The plan as written, and lines to tell the user.

    Raises:
        UserError: if an override does not fit its configuration, or a user's own configuration breaks that rule.
    """
    options, domains = target.options, domains or Domains()
    base_class = find_planner(options.planner or DEFAULT_PLANNER)
    memory = options.gpu_memory_target or inspect.signature(base_class).parameters["gpu_memory_target_in_gb"].default
    planner = _with_all_images(base_class, images, domains)(
        dataset_name,
        gpu_memory_target_in_gb=memory / options.memory_factor,
        plans_name=target.name if options.plans_name else target.base,
        overwrite_target_spacing=list(options.spacing) if options.spacing else None,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net prints whole configurations; the command sums them up
        plans = planner.plan_experiment()
    plans["plans_name"] = target.name
    notes = [*target.notes, *planner.notes]
    for configuration, override in options.overrides.items():
        if configuration not in plans["configurations"]:
            allowed = nearest(configuration, set(plans["configurations"]) - {CASCADE})
            raise UserError("changes must apply to a planned configuration", repr(configuration), allowed, "check -c")
        notes += apply_overrides(planner, plans["configurations"][configuration], configuration, override, options)
    recursive_fix_for_json_export(plans)
    plans = json.loads(json.dumps(plans))
    statistics = {
        "labeled_images": labeled,
        "unlabeled_images": len(images) - labeled,
        "note": "intensities: labeled cases; shapes, spacings and the batch cap: all of these images",
    }
    _keep_from_old(plans, preprocessed_folder / f"{target.name}.json")
    if not domains.only_ct():
        notes += _normalization_notes(plans, domains)
    plans["nnssl"]["planning"] = {**options.record(), "statistics": statistics}
    _separate_data_identifiers(plans, preprocessed_folder)
    write_json_atomically(preprocessed_folder / f"{target.name}.json", plans)
    return plans, notes


def _with_all_images(
    base: type[ExperimentPlanner], images: dict[str, dict[str, Any]], domains: Domains
) -> type[ExperimentPlanner]:
    """Derive a planner that sees the shapes and the number of all images and the domains, and leaves writing to us."""

    class AllImagesPlanner(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.dataset = {case: files for case, files in self.dataset.items() if case in images}  # no stray file
            statistics = list(images.values())
            relative = [s["relative_size_after_cropping"] for s in statistics]
            self.dataset_fingerprint = {
                **self.dataset_fingerprint,
                "spacings": [s["spacing"] for s in statistics],
                "shapes_after_crop": [s["shape_after_crop"] for s in statistics],
                "median_relative_size_after_cropping": float(np.median(relative)),
            }
            key = "channel_names" if "channel_names" in self.dataset_json else "modality"
            channels, line = channels_by_themselves(self.dataset_json[key], domains)
            self.notes = [line] if line else []
            # numTraining: only the batch cap reads it
            self.dataset_json = {**self.dataset_json, key: channels, "numTraining": len(statistics)}

        def save_plans(self, plans: dict[str, Any]) -> None:
            """Leave the file to :func:`make_plan`, which writes it atomically and only if it changed."""

    AllImagesPlanner.__name__ = base.__name__  # 'experiment_planner_used' in the plan names a class nnU-Net knows
    return AllImagesPlanner


def apply_overrides(
    planner: ExperimentPlanner, config: dict[str, Any], name: str, override: Overrides, options: PlanningOptions
) -> list[str]:
    """Change one planned configuration in place as nnU-Net would have planned it; what is not given stays.

    Returns:
        Lines to tell the user: a rounded patch size, a patch beyond the images, memory beyond the target.

    Raises:
        UserError: if the patch size has the wrong number of axes.
    """
    notes: list[str] = []
    architecture = config["architecture"] = deepcopy(config["architecture"])
    spacing = config["spacing"]
    if override.patch_size and len(override.patch_size) != len(spacing):
        got = f"{len(override.patch_size)} numbers for {name}"
        raise UserError("--patch_size must have one number an axis", got, f"{len(spacing)} numbers", "check -c")
    if override.patch_size or override.base_features:
        base_features = override.base_features or architecture["arch_kwargs"]["features_per_stage"][0]
        patch = override.patch_size or tuple(int(v) for v in config["patch_size"])
        config["patch_size"] = _set_topology(planner, architecture["arch_kwargs"], spacing, patch, base_features)
    if override.patch_size:
        notes += _patch_notes(name, override.patch_size, config)
    if override.batch_size:
        config["batch_size"] = override.batch_size
    if override.normalization:
        config["normalization_schemes"] = [override.normalization] * len(config["normalization_schemes"])
    if override.network:
        config["architecture"] = changed_network(architecture, override.network)
    else:
        notes += _memory_notes(planner, name, config, options)
    return notes


def _set_topology(
    planner: ExperimentPlanner, arch_kwargs: dict[str, Any], spacing: Any, patch: tuple[int, ...], base_features: int
) -> tuple[int, ...]:
    """Recompute stages, strides and features for a patch as nnU-Net's planners do; return the divisible patch."""
    _, strides, kernels, patch, _ = get_pool_and_conv_props(
        spacing, patch, planner.UNet_featuremap_min_edge_length, 999999
    )
    stages = len(strides)
    most = planner.UNet_max_features_2d if len(spacing) == 2 else planner.UNet_max_features_3d
    encoder = "n_blocks_per_stage" if "n_blocks_per_stage" in arch_kwargs else "n_conv_per_stage"
    arch_kwargs.update(
        {
            "n_stages": stages,
            "features_per_stage": tuple(min(most, base_features * 2**i) for i in range(stages)),
            "kernel_sizes": kernels,
            "strides": strides,
            encoder: planner.UNet_blocks_per_stage_encoder[:stages],
            "n_conv_per_stage_decoder": planner.UNet_blocks_per_stage_decoder[: stages - 1],
        }
    )
    return tuple(int(v) for v in patch)


def changed_network(planned: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Return the plan's ``architecture`` with a preset's ``network`` applied (see :class:`Overrides`).

    Raises:
        UserError: if a ``"planned"`` argument does not exist in the planned network.
    """
    if "network_class_name" not in change:
        kwargs = {**planned["arch_kwargs"], **change.get("arch_kwargs", {})}
        return {**planned, **change, "arch_kwargs": kwargs}
    kwargs = dict(change.get("arch_kwargs", {}))
    for key, value in kwargs.items():
        if value == "planned":
            if key not in planned["arch_kwargs"]:
                rule = "a network argument 'planned' must exist in the planned network"
                raise UserError(rule, repr(key), nearest(key, planned["arch_kwargs"]), "repair the preset")
            kwargs[key] = planned["arch_kwargs"][key]
    imported = [key for key in planned["_kw_requires_import"] if key in kwargs]
    return {"_kw_requires_import": imported, **change, "arch_kwargs": kwargs}


def _patch_notes(name: str, asked: tuple[int, ...], config: dict[str, Any]) -> list[str]:
    notes, patch = [], config["patch_size"]
    if tuple(asked) != tuple(patch):
        notes.append(f"{name}: patch size {_x(asked)} became {_x(patch)}, so that every pooling divides it")
    median = [round(float(v)) for v in config["median_image_size_in_voxels"]]
    if any(p > 1.5 * m + 8 for p, m in zip(patch, median, strict=True)):
        notes.append(f"{name}: patch size {_x(patch)} exceeds the median image {_x(median)}; the rest is padding")
    return notes


def _memory_notes(planner: ExperimentPlanner, name: str, config: dict[str, Any], options: PlanningOptions) -> list[str]:
    architecture, flat = config["architecture"], len(config["spacing"]) == 2
    estimate = planner.static_estimate_VRAM_usage(
        config["patch_size"],
        len(planner.dataset_json.get("channel_names", planner.dataset_json.get("modality"))),
        len(planner.dataset_json["labels"]),
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
    )
    reference = planner.UNet_reference_val_2d if flat else planner.UNet_reference_val_3d
    batch = planner.UNet_reference_val_corresp_bs_2d if flat else planner.UNet_reference_val_corresp_bs_3d
    needed = planner.UNet_reference_val_corresp_GB * estimate / reference * config["batch_size"] / batch
    if needed <= 1.1 * planner.UNet_vram_target_GB:
        return []
    factor = options.memory_factor
    target = planner.UNet_vram_target_GB * factor
    return [f"{name}: this takes about {needed * factor:.0f} GB, more than the target of {target:.0f} GB"]


def _keep_from_old(plans: dict[str, Any], path: Path) -> None:
    """Keep a user's own configurations, as nnU-Net does, and methods' settings of the plan that is replaced."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    plans["nnssl"] = dict(old.get("nnssl", {}))
    for name, config in old.get("configurations", {}).items():
        plans["configurations"].setdefault(name, config)


def _normalization_notes(plans: dict[str, Any], domains: Domains) -> list[str]:
    """Refuse statistics of the whole data set where modalities may meet; say how mixed ones are normalized."""
    schemes: set[str] = set()
    for name in plans["configurations"]:
        used = set(configuration_of(plans, name).get("normalization_schemes", []))
        if wrong := used - NORMALIZATIONS_WITHOUT_STATISTICS:
            rule = "where CT and other modalities may meet, every case is normalized by itself"
            got = f"{', '.join(sorted(wrong))} in configuration {name}; domains {domains.described()}"
            remedy = f"change or remove that configuration in {plans['plans_name']}.json"
            raise UserError(rule, got, ", ".join(sorted(NORMALIZATIONS_WITHOUT_STATISTICS)), remedy)
        schemes |= used
    if not domains.mixed():
        return []
    return [f"modalities meet: {domains.described()}; every case is normalized by itself: {', '.join(sorted(schemes))}"]


def _separate_data_identifiers(plans: dict[str, Any], folder: Path) -> None:
    """Give a configuration data of its own where another plan keeps differently preprocessed data of that name."""
    others = [other for stem, other in plans_on_disk(folder).items() if stem != plans["plans_name"]]
    for name, config in plans["configurations"].items():
        if "data_identifier" not in config:
            continue
        mine = preprocessing_hash(plans, name)
        taken = {
            preprocessing_hash(other, c)
            for other in others
            for c in other["configurations"]
            if configuration_of(other, c).get("data_identifier") == config["data_identifier"]
        }
        if taken - {mine}:
            config["data_identifier"] = f"{plans['plans_name']}_{name}"


def _x(size: Any) -> str:
    return "x".join(str(int(v)) for v in size)
