"""Preprocess all cases of a data set with nnU-Net's own preprocessor, touching only what changed.

The content of every case (voxels, geometry, label file) is recorded in the manifest, and so is the hash of the plan's
preprocessing fields. A rerun processes cases that are new or changed, deletes those that are gone, and starts over
when the plan changed. Unlabeled cases are processed without a segmentation: no label of theirs can be read. Those
that have a mask of unknown quality are processed once more, with it, into a folder of their own.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.errors import UserError
from nnssl.plans.manifest import (
    CASE_KEYS,
    SUFFIXES,
    cases_on_disk,
    configuration_of,
    file_hash,
    part_folder,
    preprocessing_hash,
    save_manifest,
)
from nnssl.plans.parallel import Workers, reason
from nnssl.plans.pseudo import with_ignore

#: Endings of the files that nnU-Net writes for one case.
CASE_ENDINGS = (".b2nd", "_seg.b2nd", ".pkl")


@dataclass
class Sources:
    """The raw files of the cases to preprocess, by part (labeled, unlabeled, monitoring, pseudo).

    Args:
        images: channel files by part and case.
        labels: label file by part and case; the part ``unlabeled`` has none.
    """

    images: dict[str, dict[str, list[Path]]]
    labels: dict[str, dict[str, Path]] = field(default_factory=dict)


def carry_over(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """Take over what an earlier run finished, and delete the files of cases that changed or are gone.

    ``new`` is written before any file is touched: if this run breaks off, training sees unfinished configurations.

    Args:
        old: the last run's manifest.
        new: this run's manifest, whose ``configurations`` are filled in.
        folder: the preprocessed data set's folder.
    """
    for identifier, entry in old["configurations"].items():
        kept = {"preprocessing_hash": entry["preprocessing_hash"]}
        for part in SUFFIXES:
            kept[part] = [c for c in entry.get(part, []) if _signature(old, part, c) == _signature(new, part, c)]
        new["configurations"][identifier] = kept
    save_manifest(folder, new)
    for identifier, kept in new["configurations"].items():
        _delete_unlisted(folder, identifier, kept)


def _delete_unlisted(folder: Path, identifier: str, entry: dict[str, Any]) -> None:
    """Delete the preprocessed cases of a configuration that its manifest entry does not list."""
    for part in SUFFIXES:
        target = part_folder(folder, identifier, part)
        for case in cases_on_disk(target) - set(entry[part]):
            _delete_case(target, case)


def _signature(manifest: dict[str, Any], part: str, case: str) -> Any:
    """Return what a preprocessed case depends on besides the plan; None if the manifest does not know the case."""
    known = manifest[CASE_KEYS[part]].get(case)
    if known is None:
        return None
    if part == "unlabeled":
        return known["hash"]
    return known, manifest.get("labels", {}).get(part, {}).get(case), manifest.get("dataset")


def preprocess_configuration(
    folder: Path,
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    sources: Sources,
    manifest: dict[str, Any],
    workers: Workers,
) -> dict[str, int]:
    """Bring one configuration's folders up to date and record it in ``manifest`` (and on disk, also when it fails).

    An unlabeled case that can't be processed is set aside with its reason. Files land under their final names, but
    a case counts only once the manifest lists it.

    Args:
        folder: the preprocessed data set's folder.
        plans: the plan.
        configuration: its name in the plan.
        dataset_json: the data set's ``dataset.json``.
        sources: raw files by part and case.
        manifest: this run's manifest, updated in place.
        workers: pool to work with.

    Returns:
        Number of cases processed by part; ``pseudo`` only where the data set has such masks.

    Raises:
        UserError: if a case other than an unlabeled one can't be processed.
    """
    identifier = configuration_of(plans, configuration)["data_identifier"]
    entry = _current_entry(folder, identifier, preprocessing_hash(plans, configuration), manifest)
    try:
        return {
            part: _preprocess_part(folder, plans, configuration, dataset_json, sources, manifest, workers, entry, part)
            for part in SUFFIXES
            if part != "pseudo" or manifest["pseudo"]
        }
    finally:
        for part in SUFFIXES:
            entry[part].sort()
        save_manifest(folder, manifest)


def _current_entry(folder: Path, identifier: str, plan_hash: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest entry to continue from; folders of another plan, or of unknown origin, are emptied."""
    entry = manifest["configurations"].get(identifier)
    if entry is None or entry["preprocessing_hash"] != plan_hash:
        entry = {"preprocessing_hash": plan_hash, **{part: [] for part in SUFFIXES}}
        manifest["configurations"][identifier] = entry
        save_manifest(folder, manifest)
        for part in SUFFIXES:
            shutil.rmtree(part_folder(folder, identifier, part), ignore_errors=True)
    for part in SUFFIXES:
        target = part_folder(folder, identifier, part)
        entry[part] = [case for case in entry[part] if _is_complete(target, case)]
    _delete_unlisted(folder, identifier, entry)
    return entry


def _preprocess_part(
    folder: Path,
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    sources: Sources,
    manifest: dict[str, Any],
    workers: Workers,
    entry: dict[str, Any],
    part: str,
) -> int:
    if part == "pseudo":
        dataset_json = with_ignore(dataset_json)
    plans_manager = PlansManager(plans)
    config = plans_manager.get_configuration(configuration)
    target = part_folder(folder, config.data_identifier, part)
    done = set(entry[part])
    todo = [case for case in sorted(manifest[CASE_KEYS[part]]) if case not in done]
    if todo:
        target.mkdir(parents=True, exist_ok=True)
    jobs = {}
    for case in todo:
        _delete_case(target, case)
        label = sources.labels[part][case] if part in sources.labels else None
        files = [str(path) for path in sources.images[part][case]]
        jobs[case] = (str(target / case), files, label and str(label), plans_manager, config, dataset_json)
    preprocessor = config.preprocessor_class(verbose=False)
    failed: dict[str, str] = {}
    title = f"Preprocessing {configuration}, {part}"
    for case, _, error in workers.run(title, preprocessor.run_case_save, jobs):
        if error is None:
            entry[part].append(case)
        else:
            failed[case] = reason(error)
            _delete_case(target, case)
    if failed and part != "unlabeled":
        got = "; ".join(f"{case}: {why}" for case, why in list(failed.items())[:3])
        raise UserError(
            f"every {part} case must be preprocessed", f"{len(failed)} failed ({got})", None, "repair the files"
        )
    for case, why in failed.items():
        set_aside(folder, manifest, case, why)
    return len(jobs)


def set_aside(folder: Path, manifest: dict[str, Any], case: str, why: str) -> None:
    """Take an unlabeled case out of the data set: out of every configuration, with its reason on record."""
    manifest["set_aside"][case] = why
    for part in ("unlabeled", "pseudo"):
        manifest[CASE_KEYS[part]].pop(case, None)
        for identifier, entry in manifest["configurations"].items():
            if case in entry.get(part, ()):
                entry[part].remove(case)
            _delete_case(part_folder(folder, identifier, part), case)


def _is_complete(folder: Path, case: str) -> bool:
    return all((folder / (case + ending)).is_file() for ending in CASE_ENDINGS)


def _delete_case(folder: Path, case: str) -> None:
    for ending in CASE_ENDINGS:
        (folder / (case + ending)).unlink(missing_ok=True)


def copy_ground_truth(folder: Path, labels: dict[str, Path], hashes: dict[str, str]) -> None:
    """Keep ``gt_segmentations`` equal to the labels of the labeled cases, as nnU-Net's validation expects.

    Args:
        folder: the preprocessed data set's folder.
        labels: label file by labeled case.
        hashes: :func:`nnssl.plans.manifest.file_hash` of the label files. The copies are compared with it, not with
            the last run's record: a run that broke off has recorded labels that it did not copy.
    """
    target = folder / "gt_segmentations"
    target.mkdir(exist_ok=True)
    wanted = {label.name: (case, label) for case, label in labels.items()}
    for path in target.iterdir():
        if path.name not in wanted:
            path.unlink()
    for name, (case, label) in wanted.items():
        if not (target / name).is_file() or file_hash(target / name) != hashes[case]:
            shutil.copyfile(label, target / name)
