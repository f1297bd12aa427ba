"""From a raw data set to one that can be trained on: verify, fingerprint, plan, preprocess, split, record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl.errors import UserError, nearest
from nnssl.layout import RawDataset, variable
from nnssl.plans.domains import Domains, count_by_domain
from nnssl.plans.manifest import (
    IMAGE_FINGERPRINT_NAME,
    MANIFEST_NAME,
    SCANS_NAME,
    configuration_of,
    digest,
    empty_manifest,
    file_hash,
    load_manifest,
    plans_on_disk,
    save_manifest,
    write_json_atomically,
)
from nnssl.plans.options import CASCADE, CONFIGURATIONS, PlanningOptions
from nnssl.plans.parallel import Workers, reason
from nnssl.plans.splits import make_splits

#: Image folder of each part of a preprocessed data set.
PART_FOLDERS = {"labeled": "imagesTr", "unlabeled": "imagesUn", "monitoring": "imagesVal", "pseudo": "imagesUn"}
SPLITS_NAME = "splits_final.json"


@dataclass(frozen=True)
class Prepared:
    """What :func:`plan_and_preprocess` left on disk.

    Args:
        folder: ``nnUNet_preprocessed/DatasetXXX_Name``.
        plans_name: name of the plan.
        plans: the plan.
        configurations: the configurations that are ready for training.
        manifest: content of ``nnssl_unlabeled.json``.
        processed: number of cases processed in this run by configuration and part.
    """

    folder: Path
    plans_name: str
    plans: dict[str, Any]
    configurations: tuple[str, ...]
    manifest: dict[str, Any]
    processed: dict[str, dict[str, int]]


def plan_and_preprocess(
    dataset: RawDataset,
    configurations: Sequence[str] | None = None,
    options: PlanningOptions | None = None,
    num_processes: int = 1,
    verify_integrity: bool = False,
    clean: bool = False,
    report: Callable[[str], None] = print,
) -> Prepared:
    """Plan and preprocess a data set; a rerun does only what changed.

    Args:
        dataset: the raw data set in ``nnUNet_raw``.
        configurations: those to preprocess; None: 2d, 3d_fullres and 3d_lowres as far as the plan has them.
        options: how to plan.
        num_processes: worker processes; 1 or fewer works in this process where nnU-Net allows it.
        verify_integrity: also run nnU-Net's own integrity check.
        clean: forget earlier runs: plan and preprocess everything anew.
        report: receives lines for the user.

    Raises:
        UserError: if the data set, the configuration or an option is refused.
    """
    folder = variable("nnUNet_preprocessed") / dataset.name
    options = options or PlanningOptions()
    _refuse_layout(dataset)
    domains = Domains.of(dataset)
    _refuse_configurations(configurations, folder)
    old = _old_manifest(folder, clean)
    if clean:
        for cache in (SCANS_NAME, IMAGE_FINGERPRINT_NAME):
            (folder / cache).unlink(missing_ok=True)
    new, sources = _verified(dataset, folder, num_processes, verify_integrity, report)
    if domains.names:
        report(f"Domains: {count_by_domain(dataset, domains)}")
    _adopt_users_splits(dataset, folder, old)
    new["splits"] = old.get("splits")

    from nnssl.plans import fingerprint, planning, preprocess

    target = planning.choose_target(options, folder, clean)
    if new["fingerprint"] != old.get("fingerprint") or not (folder / "dataset_fingerprint.json").is_file():
        report("Extracting the fingerprint of the labeled cases")
        fingerprint.extract_labeled_fingerprint(dataset, num_processes)
    with Workers(num_processes) as workers:
        images = {**sources.images["labeled"], **sources.images["unlabeled"]}
        hashes = {**new["labeled"], **{case: entry["hash"] for case, entry in new["cases"].items()}}
        statistics, failed = fingerprint.update_image_fingerprint(folder, images, hashes, dataset, workers)
        for case, why in failed.items():
            if case in new["labeled"]:
                raise UserError("every labeled image must be readable", f"{case}: {why}", None, "repair the file")
            preprocess.set_aside(folder, new, case, why)
        plans, notes = planning.make_plan(dataset.name, folder, target, statistics, len(new["labeled"]), domains)
        for note in notes:
            report(f"Note: {note}")
        chosen = _choose_configurations(configurations, plans)
        report(summary(plans, chosen))
        preprocess.carry_over(old, new, folder)
        processed = {
            c: preprocess.preprocess_configuration(folder, plans, c, dataset.json, sources, new, workers)
            for c in chosen
        }
    preprocess.copy_ground_truth(folder, sources.labels["labeled"], new["labels"]["labeled"])
    new["splits"] = _write_splits(dataset, folder, sorted(new["labeled"]), domains, old, report)
    save_manifest(folder, new)
    return Prepared(folder, target.name, plans, tuple(chosen), new, processed)


def summary(plans: dict[str, Any], configurations: Sequence[str]) -> str:
    """Return one line a configuration: patch, batch, spacing, stages and features."""
    lines = [f"Plan {plans['plans_name']}:"]
    for name in configurations:
        config = configuration_of(plans, name)
        spacing = " x ".join(f"{v:.4g}" for v in config["spacing"])
        features = config["architecture"]["arch_kwargs"].get("features_per_stage", "its own")
        lines.append(
            f"  {name}: patch {'x'.join(map(str, config['patch_size']))}, batch {config['batch_size']}, "
            f"spacing {spacing} mm, features {features}, data in {config['data_identifier']}"
        )
    return "\n".join(lines)


def _refuse_layout(dataset: RawDataset) -> None:
    if "dataset" in dataset.json:
        rule = "an nnssl data set keeps its images in imagesTr and labelsTr"
        raise UserError(rule, "a file list under 'dataset' in dataset.json", None, "move or link the files there")
    if not dataset.cases("imagesTr"):
        got = f"no image CASE_0000{dataset.file_ending} in {dataset.folder / 'imagesTr'}"
        raise UserError("a data set needs at least one labeled case", got, None, "add images and labels")


def _refuse_configurations(configurations: Sequence[str] | None, folder: Path) -> None:
    """Refuse what can't be a configuration before anything is written."""
    known = set(CONFIGURATIONS).union(*(plans["configurations"] for plans in plans_on_disk(folder).values()))
    for name in configurations or ():
        if name == CASCADE:
            rule = (
                "the cascade is not supported: its second stage needs predictions of the first on every unlabeled case"
            )
            raise UserError(rule, name, ", ".join(CONFIGURATIONS), "use 3d_fullres or 3d_lowres")
        if name not in known:
            raise UserError("-c must name a configuration", repr(name), nearest(name, known - {CASCADE}), "check -c")


def _choose_configurations(configurations: Sequence[str] | None, plans: dict[str, Any]) -> list[str]:
    if configurations is None:
        return [c for c in CONFIGURATIONS if c in plans["configurations"]]
    for name in configurations:
        if name not in plans["configurations"]:
            allowed = ", ".join(c for c in plans["configurations"] if c != CASCADE)
            raise UserError(f"the plan must have the configuration {name} for this data set", None, allowed, "check -c")
    return list(dict.fromkeys(configurations))


def _old_manifest(folder: Path, clean: bool) -> dict[str, Any]:
    """Return what the last run recorded; ``clean`` forgets all but whose ``splits_final.json`` it is."""
    if not (folder / MANIFEST_NAME).is_file():
        return empty_manifest()
    if not clean:
        return load_manifest(folder)
    try:
        return {**empty_manifest(), "splits": load_manifest(folder).get("splits")}
    except UserError:  # --clean is the remedy for an unreadable manifest
        return empty_manifest()


def _verified(
    dataset: RawDataset, folder: Path, num_processes: int, verify_integrity: bool, report: Callable[[str], None]
) -> tuple[dict[str, Any], Any]:
    """Check the raw data set and start this run's manifest from what it holds."""
    from nnssl.plans.preprocess import Sources
    from nnssl.plans.pseudo import check_masks
    from nnssl.plans.verify import verify_raw_dataset

    verified = verify_raw_dataset(dataset, num_processes, True, folder / SCANS_NAME)
    if verify_integrity:
        _stock_integrity_check(dataset, num_processes)
    masks = check_masks(dataset, verified)
    manifest = {**empty_manifest(), "set_aside": dict(verified.set_aside), "test": verified.hashes.get("imagesTs", {})}
    images: dict[str, dict[str, list[Path]]] = {}
    for part, image_folder in PART_FOLDERS.items():
        hashes = verified.hashes.get(image_folder, {})
        used = hashes if part != "pseudo" else masks.files
        images[part] = {c: files for c, files in dataset.cases(image_folder).items() if c in used}
        recorded = {case: hashes[case] for case in images[part]}
        if part == "unlabeled":
            manifest["cases"] = {c: {"hash": h, "patient": dataset.patient(c)} for c, h in recorded.items()}
        else:
            manifest[part] = recorded
    labels = {p: {c: dataset.label_file(PART_FOLDERS[p], c) for c in images[p]} for p in ("labeled", "monitoring")}
    labels["pseudo"], manifest["pseudo_source"] = masks.files, masks.source
    manifest["labels"] = {part: {c: file_hash(path) for c, path in files.items()} for part, files in labels.items()}
    described = ("channel_names", "modality", "labels", "regions_class_order")
    manifest["dataset"] = {key: dataset.json[key] for key in described if key in dataset.json}
    manifest["fingerprint"] = digest([manifest["labeled"], manifest["labels"]["labeled"], manifest["dataset"]])
    shown = [part for part in PART_FOLDERS if part != "pseudo" or masks.files]
    counts = ", ".join(f"{len(images[part])} {part}" for part in shown)
    report(f"{dataset.name}: {counts} cases, {len(verified.set_aside)} set aside")
    return manifest, Sources(images, labels)


def _stock_integrity_check(dataset: RawDataset, num_processes: int) -> None:
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    try:
        verify_dataset_integrity(str(dataset.folder), max(1, num_processes))
    except (AssertionError, RuntimeError, FileNotFoundError) as error:
        raise UserError("nnU-Net's integrity check must pass", reason(error), None, "repair the data set") from error


def _is_ours(path: Path, manifest: dict[str, Any]) -> bool:
    """Whether ``splits_final.json`` is as an earlier run wrote it."""
    return path.is_file() and digest(json.loads(path.read_text(encoding="utf-8"))) == manifest.get("splits")


def _adopt_users_splits(dataset: RawDataset, folder: Path, old: dict[str, Any]) -> None:
    """Take a ``splits_final.json`` that lies beside the raw data; nnU-Net's planner would only assert on a mismatch."""
    source, target = dataset.folder / SPLITS_NAME, folder / SPLITS_NAME
    if not source.is_file():
        return
    if target.is_file() and not _is_ours(target, old):
        if json.loads(source.read_text(encoding="utf-8")) != json.loads(target.read_text(encoding="utf-8")):
            rule = f"{SPLITS_NAME} of the raw and the preprocessed data set must agree"
            raise UserError(rule, f"{source} and {target} differ", None, "delete the one you don't want")
        return
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    old.pop("splits", None)


def _write_splits(
    dataset: RawDataset,
    folder: Path,
    cases: list[str],
    domains: Domains,
    old: dict[str, Any],
    report: Callable[[str], None],
) -> str | None:
    """Write patient-wise splits unless the user keeps a file of their own; return the digest of what is ours."""
    path = folder / SPLITS_NAME
    if path.is_file() and not _is_ours(path, old):
        report(f"Keeping your {path}")
        return None
    domain = domains.of_case.__getitem__ if domains.of_case else None
    splits = make_splits(cases, dataset.patient, domain=domain)
    write_json_atomically(path, splits)
    folds = f"{len(splits)} folds" if splits else "no folds (one labeled patient): train with fold all"
    report(f"Splits: {folds}")
    return digest(splits)
