"""Masks of unknown quality (``labelsPseudo``): their record, and the rules that keep them apart from real labels.

``labelsPseudo/CASE.ending`` holds the labels of the data set, and the ignore value where a voxel is unsure. Beside them
lies ``nnssl_pseudo.json``, written by ``nnssl_pseudo_label``::

    {"version": 1, "ignore": 3,
     "origin": {"trainer": ..., "dataset": ..., "checkpoints": {"fold_all": SHA-256}, "thresholds": {...}, ...},
     "saw": {"trained": {case: content hash}, "watched": {case: content hash}},
     "cases": {case: {"weight": 1.0, "confidence": ..., "stability": ..., "voxels": {label: n}}}}

``saw`` names the labeled cases that reached the model's weights, and those that chose its checkpoint. A mask can carry
what its model learned there, so masks of a model that saw a held-out case are refused. Loads no torch.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnssl.errors import UserError
from nnssl.layout import PSEUDO_FOLDER, RawDataset
from nnssl.plans.manifest import digest
from nnssl.plans.verify import Verified, allowed_label_values, listed

RECORD_NAME = "nnssl_pseudo.json"
VERSION = 1
#: Why a model's labeled cases are recorded: it learned from them, or its checkpoint was chosen by them.
SAW = ("trained", "watched")
_MAKE = "make the masks with nnssl_pseudo_label"


@dataclass(frozen=True)
class PseudoMasks:
    """The masks of ``labelsPseudo`` that may be used.

    Args:
        files: mask by unlabeled case.
        source: what the manifest keeps of them: ignore value, weights, ``saw`` and ``origin`` (None: unknown).
    """

    files: dict[str, Path] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)


def ignore_value(labels: Mapping[str, Any]) -> int:
    """Return the value of unsure voxels: the data set's ignore label, else one more than its highest label."""
    return int(labels["ignore"]) if "ignore" in labels else max(allowed_label_values(dict(labels))) + 1


def with_ignore(dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of dataset.json whose labels declare the value of unsure voxels."""
    labels = dataset_json["labels"]
    return {**dataset_json, "labels": {**labels, "ignore": ignore_value(labels)}}


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read ``nnssl_pseudo.json`` of a folder of masks; None if there is none.

    Raises:
        UserError: if it is no valid JSON or of another version.
    """
    path = Path(folder) / RECORD_NAME
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{RECORD_NAME} must be valid JSON", f"{path}: {error}", None, _MAKE) from error
    if not isinstance(record, dict) or record.get("version") != VERSION:
        got = f"version {record.get('version') if isinstance(record, dict) else None} in {path}"
        raise UserError(f"{RECORD_NAME} must have a known version", got, VERSION, _MAKE)
    return record


def check_masks(dataset: RawDataset, verified: Verified) -> PseudoMasks:
    """Hold the masks of a raw data set against every rule, and return those whose images are used.

    Refused: a mask of a case that is not in imagesUn, on another grid than its image, with a value that is no label;
    masks of a model that saw a case of imagesVal or imagesTs. A mask whose image was set aside is left out with a
    warning; another warning says when the origin of the masks is unknown.

    Args:
        dataset: the raw data set.
        verified: what :func:`nnssl.plans.verify.verify_raw_dataset` found, with its check of labels.

    Raises:
        UserError: on every refusal.
    """
    files = dataset.pseudo_masks()
    if strays := _strays(dataset):
        ending = f"CASE{dataset.file_ending}"
        warnings.warn(f"files in {PSEUDO_FOLDER} that are no mask {ending} are ignored: {listed(strays)}", stacklevel=3)
    if not files:
        return PseudoMasks()
    if strangers := sorted(files.keys() - dataset.cases("imagesUn").keys()):
        rule = f"a mask in {PSEUDO_FOLDER} belongs to a case of imagesUn"
        raise UserError(rule, f"masks without such an image: {listed(strangers)}", None, "remove them")
    ignore = ignore_value(dataset.json["labels"])
    allowed = allowed_label_values(dataset.json["labels"]) | {ignore}
    for case, scan in verified.masks.items():
        if case in verified.set_aside:
            continue
        name = f"{PSEUDO_FOLDER}/{case}"
        if scan.label_problem:
            rule = "a mask has the grid of its image"
            raise UserError(rule, f"{name}: {scan.label_problem}", None, "make it again, or remove it")
        if wrong := [f"{value:g} in {voxels} voxels" for value, voxels in scan.label_values if value not in allowed]:
            remedy = "mend the mask, or remove it"
            got = f"{name}: {', '.join(wrong)}"
            rule = f"a mask holds labels of dataset.json, and {ignore} where it is unsure"
            raise UserError(rule, got, sorted(allowed), remedy)
    if aside := sorted(files.keys() & verified.set_aside.keys()):
        warnings.warn(f"masks whose images are set aside are not used: {listed(aside)}", stacklevel=3)
    used = {case: path for case, path in files.items() if case not in verified.set_aside}
    return PseudoMasks(used, _source(dataset, verified, ignore, used))


def _strays(dataset: RawDataset) -> list[str]:
    folder, masks = dataset.folder / PSEUDO_FOLDER, set(dataset.pseudo_masks().values())
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p.name for p in found if p not in masks and p.name != RECORD_NAME and not p.name.startswith(".")]


def _source(dataset: RawDataset, verified: Verified, ignore: int, files: Mapping[str, Path]) -> dict[str, Any]:
    record = read_record(dataset.folder / PSEUDO_FOLDER)
    if record is None:
        text = f"the origin of the masks in {PSEUDO_FOLDER} is unknown (no {RECORD_NAME})"
        warnings.warn(f"{text}: nothing shows that no val or test label went into them", stacklevel=4)
        return {"ignore": ignore, "weights": dict.fromkeys(files, 1.0), "saw": None, "origin": None}
    if record.get("ignore", ignore) != ignore:
        rule = "masks are made for the labels of their data set"
        got = f"unsure voxels are {record['ignore']} in {RECORD_NAME}"
        raise UserError(rule, got, ignore, _MAKE + " again")
    if record.get("saw") is None:
        text = f"{RECORD_NAME} does not say which labeled cases the model of the masks saw"
        warnings.warn(f"{text}: nothing shows that no val or test label went into them", stacklevel=4)
    held_out = {folder: verified.hashes.get(folder, {}) for folder in ("imagesVal", "imagesTs")}
    require_unseen(record.get("saw"), held_out)
    weights = {case: record.get("cases", {}).get(case, {}).get("weight", 1.0) for case in files}
    _check_weights(weights)
    return {"ignore": ignore, "weights": weights, "saw": record.get("saw"), "origin": record.get("origin")}


def _check_weights(weights: Mapping[str, Any]) -> None:
    def usable(weight: Any) -> bool:
        return isinstance(weight, (int, float)) and math.isfinite(weight) and weight >= 0

    if wrong := [f"{case}: {weight!r}" for case, weight in weights.items() if not usable(weight)]:
        rule = f"a weight in {RECORD_NAME} is a number"
        raise UserError(rule, listed(wrong), "0 or more", "mend the file")


def require_unseen(saw: Mapping[str, Mapping[str, str]] | None, held_out: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse masks whose model saw a held-out case.

    Args:
        saw: reason (see :data:`SAW`) -> case -> content hash, as recorded with the masks; None: unknown.
        held_out: role, such as ``imagesVal`` -> case -> content hash.

    Raises:
        UserError: naming the cases.
    """
    seen = {value: f"{reason} as {case}" for reason in SAW for case, value in ((saw or {}).get(reason, {})).items()}
    found = [
        f"{role}/{case} ({seen[v]})" for role, members in held_out.items() for case, v in members.items() if v in seen
    ]
    if found:
        rule = "masks come from a model that saw no val or test case of this data set"
        remedy = f"{_MAKE} from a model trained without these cases, or remove {PSEUDO_FOLDER}"
        raise UserError(rule, f"a model that saw {listed(found)}", None, remedy)


def pseudo_cases(manifest: Mapping[str, Any], data_identifier: str) -> list[str]:
    """Return the sorted ids of a configuration's preprocessed cases with masks of unknown quality."""
    return sorted(manifest["configurations"][data_identifier].get("pseudo", ()))


def pseudo_weights(manifest: Mapping[str, Any], cases: list[str]) -> list[float]:
    """Return the weights of cases, in their order.

    Raises:
        UserError: if all of them are 0.
    """
    weights = [float(manifest["pseudo_source"]["weights"][case]) for case in cases]
    if not any(weights):
        rule = f"some case with a mask in {PSEUDO_FOLDER} must have a weight above 0"
        raise UserError(rule, f"{len(cases)} cases of weight 0", None, f"mend {RECORD_NAME} and preprocess again")
    return weights


def pseudo_digest(manifest: Mapping[str, Any], data_identifier: str, cases: list[str]) -> str:
    """Hash what training draws of some masks: images, masks, weights and preprocessing. Checkpoints keep it."""
    content = {
        case: [manifest["pseudo"][case], manifest["labels"]["pseudo"][case], weight]
        for case, weight in zip(cases, pseudo_weights(manifest, cases), strict=True)
    }
    plan = manifest["configurations"][data_identifier]["preprocessing_hash"]
    return digest({"preprocessing_hash": plan, "pseudo": content})
