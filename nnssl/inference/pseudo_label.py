"""Make masks of unknown quality: predict ``imagesUn`` with a trained model and keep what is sure.

The cases are predicted in chunks, so that probabilities never fill the disk; of each case only its label map and its
confidences stay (16 bits a voxel, compressed) until the thresholds of all classes are known.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnssl.errors import UserError
from nnssl.imageio import read_array, read_image, write_label
from nnssl.inference.models import TrainedModel
from nnssl.inference.predict import PredictOptions, predict_cases
from nnssl.inference.pseudo_label_filter import (
    STEPS,
    Box,
    Confidences,
    FilterOptions,
    agreement,
    apply_boxes,
    below,
    confidence,
    doubtful_components,
    most_stable,
    quantized,
)
from nnssl.inference.pseudo_label_refine import FolderExchange, Refiner, refine
from nnssl.layout import PSEUDO_FOLDER, RawDataset, require_writable, variable
from nnssl.plans.manifest import SCANS_NAME, file_hash, write_json_atomically
from nnssl.plans.pseudo import RECORD_NAME, VERSION, ignore_value, read_record, require_unseen
from nnssl.plans.verify import listed, verify_raw_dataset

if TYPE_CHECKING:
    import torch

#: Probabilities of one chunk of cases may take this share of the free disk, and no more than this many bytes.
SHARE_OF_DISK, LARGEST_CHUNK_BYTES, LARGEST_CHUNK = 0.2, 2 * 2**30, 32


@dataclass(frozen=True)
class Request:
    """What is asked for beside data set and model.

    Args:
        filters: what of the predictions is kept.
        predict: how to predict.
        boxes: case -> boxes of its objects.
        refiner: callable, see :mod:`nnssl.inference.pseudo_label_refine`.
        exchange: folder to exchange masks with a tool outside, instead of a callable.
        refiner_name: how the record calls either.
        overwrite: replace masks that ``nnssl_pseudo_label`` made before.
        origin: further entries of the record's ``origin``.
    """

    filters: FilterOptions = field(default_factory=FilterOptions)
    predict: PredictOptions = field(default_factory=PredictOptions)
    boxes: Mapping[str, list[Box]] | None = None
    refiner: Refiner | None = None
    exchange: Path | None = None
    refiner_name: str = "none"
    overwrite: bool = False
    origin: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Predicted:
    """What is known of the predicted cases before thresholds are."""

    confidences: Confidences = field(default_factory=Confidences)
    stability: dict[str, float] = field(default_factory=dict)


def make_masks(
    dataset: RawDataset,
    model: TrainedModel,
    request: Request,
    device: torch.device | None = None,
    num_processes: int = 1,
    report: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """Write ``labelsPseudo`` with its record.

    Args:
        dataset: the raw data set whose ``imagesUn`` gets masks.
        model: the model that makes them; it may come from another data set with the same channels and labels.
        request: what to keep and how.
        device: default: the best there is.
        num_processes: processes that check the images.
        report: receives lines for the user.

    Returns:
        The record, or None if masks were exported to a tool outside that has not answered for every case.

    Raises:
        UserError: if the model does not fit the data set or saw a held-out case, or masks are in the way.
    """
    _require_fit(dataset, model)
    _require_place(dataset, request.overwrite)
    cache = variable("nnUNet_preprocessed") / dataset.name / SCANS_NAME
    verified = verify_raw_dataset(dataset, num_processes, True, cache)
    images = {case: files for case, files in dataset.cases("imagesUn").items() if case not in verified.set_aside}
    if not images:
        remedy = f"add images; set aside: {listed(verified.set_aside) or 'none'}"
        raise UserError("masks are made for unlabeled cases", f"none in {dataset.folder / 'imagesUn'}", None, remedy)
    _require_boxes(request.boxes, images, dataset, model)
    saw = seen_by(model, report)
    require_unseen(saw, {folder: verified.hashes.get(folder, {}) for folder in ("imagesVal", "imagesTs")})
    require_writable(dataset.folder, "the raw data set must be writable", "mend its rights")
    work = dataset.folder / f".{PSEUDO_FOLDER}.work"  # beside its target, so that a rename puts the masks in place
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    work.mkdir()
    try:
        hashes = {path.parent.name: file_hash(path) for path in model.checkpoint_files}
        exchange = FolderExchange(request.exchange, dataset.file_ending, hashes) if request.exchange else None
        predicted = _predict(dataset, model, images, request, exchange, device, work, report)
        if exchange is not None and exchange.missing:
            report(f"Exported {len(exchange.missing)} cases to {exchange.folder}; put masks of them into its folder")
            report("'refined' and run the command again")
            return None
        record = _write(dataset, model, images, request, predicted, {"checkpoints": hashes, "saw": saw}, work)
        _put_in_place(work / "final", dataset.folder / PSEUDO_FOLDER)
        return record
    finally:
        shutil.rmtree(work, ignore_errors=True)


def seen_by(model: TrainedModel, report: Callable[[str], None] = print) -> dict[str, dict[str, str]] | None:
    """Return the labeled cases that a model saw, ``{"trained": {case: hash}, "watched": {case: hash}}``.

    ``watched`` are the cases that chose the checkpoint: the fold's validation cases for ``checkpoint_best``, else none.
    None if a fold does not tell (nnU-Net's own trainers, masks of unknown origin); then a line says so.
    """
    saw: dict[str, dict[str, str]] = {"trained": {}, "watched": {}}
    for checkpoint in model.checkpoint_files:
        path = checkpoint.parent / "nnssl_run.json"
        run = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "labeled" not in run or run["inherited"] is None:
            report(f"warning: {checkpoint.parent} does not say which labeled cases its model saw")
            return None
        saw["trained"] |= run["labeled"] | run["inherited"]
        if "best" in model.checkpoint:
            saw["watched"] |= run["watched"]
    return saw


def _require_fit(dataset: RawDataset, model: TrainedModel) -> None:
    ours, theirs = dataset.json, model.dataset_json

    def labels(content: Mapping[str, Any]) -> Any:
        return [(k, v) for k, v in content["labels"].items() if k != "ignore"], content.get("regions_class_order")

    for what, mine, its in (
        ("labels", labels(ours), labels(theirs)),
        ("number of channels", len(dataset.channel_names), model.channels),
        ("file ending", dataset.file_ending, model.file_ending),
    ):
        if mine != its:
            rule = f"the model and the data set must have the same {what}"
            raise UserError(rule, f"{its} in {model.folder.name}", mine, "choose another model or data set")


def _require_place(dataset: RawDataset, overwrite: bool) -> None:
    if not dataset.pseudo_masks():
        return
    rule = f"masks in {PSEUDO_FOLDER} are not overwritten by accident"
    if read_record(dataset.folder / PSEUDO_FOLDER) is None:
        raise UserError(rule, f"masks without {RECORD_NAME}, so made by hand", None, f"move {PSEUDO_FOLDER} away")
    if not overwrite:
        raise UserError(rule, "masks of an earlier run", None, f"give --overwrite, or move {PSEUDO_FOLDER} away")


def _require_boxes(
    boxes: Mapping[str, list[Box]] | None, images: Mapping[str, Any], dataset: RawDataset, model: TrainedModel
) -> None:
    if not boxes:
        return
    if _has_regions(model):
        raise UserError("--boxes needs exclusive classes", "a data set with regions", "labels without regions")
    if strangers := sorted(boxes.keys() - images.keys()):
        raise UserError("--boxes names cases of imagesUn", listed(strangers), None, "mend the file")
    labels = {int(v) for k, v in dataset.json["labels"].items() if k not in ("background", "ignore")}
    if wrong := sorted({box.label for members in boxes.values() for box in members} - labels):
        raise UserError("--boxes names labels of dataset.json", listed(wrong), sorted(labels), "mend the file")


def _has_regions(model: TrainedModel) -> bool:
    return any(isinstance(v, (list, tuple)) and len(v) > 1 for v in model.dataset_json["labels"].values())


def _predict(
    dataset: RawDataset,
    model: TrainedModel,
    images: Mapping[str, list[Path]],
    request: Request,
    exchange: FolderExchange | None,
    device: torch.device | None,
    work: Path,
    report: Callable[[str], None],
) -> _Predicted:
    """Predict every case, with and without mirroring, and keep label maps and confidences in ``work``."""
    found, todo, largest = _Predicted(), sorted(images), 0
    (work / "found").mkdir()
    while todo:
        room = min(LARGEST_CHUNK_BYTES, SHARE_OF_DISK * shutil.disk_usage(work).free)
        count = min(LARGEST_CHUNK, max(1, int(room // largest))) if largest else 1  # the first case tells how much
        chunk, todo = todo[:count], todo[count:]
        files = {case: [str(path) for path in images[case]] for case in chunk}
        mirrored, plain = work / "mirrored", work / "plain"
        predict_cases(model, files, _empty(mirrored), replace(request.predict, save_probabilities=True), device)
        if request.predict.mirroring:
            predict_cases(model, files, _empty(plain), replace(request.predict, mirroring=False), device)
        for case in chunk:
            label = read_array(mirrored / (case + dataset.file_ending))[0][0].astype(np.uint16)
            if request.predict.mirroring:
                found.stability[case] = agreement(label, read_array(plain / (case + dataset.file_ending))[0][0])
            probabilities = mirrored / f"{case}.npz"
            largest = max(largest, probabilities.stat().st_size)
            with np.load(probabilities) as content:
                probs = content["probabilities"]
            steps = quantized(confidence(probs, _has_regions(model)))
            if request.boxes and case in request.boxes:
                label, sure = apply_boxes(probs, request.boxes[case])
                steps = quantized(sure)
            label, steps = _refined(dataset, request, exchange, case, images[case], label, steps)
            found.confidences.add(label, steps)
            np.savez_compressed(work / "found" / f"{case}.npz", label=label, steps=steps)
        shutil.rmtree(mirrored)
        shutil.rmtree(plain, ignore_errors=True)
        report(f"Predicted {len(images) - len(todo)} of {len(images)} cases")
    return found


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _refined(
    dataset: RawDataset,
    request: Request,
    exchange: FolderExchange | None,
    case: str,
    images: list[Path],
    label: np.ndarray,
    steps: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    if request.refiner is not None:
        image = np.concatenate([read_array(path)[0] for path in images])
        return refine(request.refiner, image, label, steps, STEPS)
    if exchange is None:
        return label, steps
    allowed = set(range(ignore_value(dataset.json["labels"])))
    refined = exchange.exchange(case, images, label, allowed)
    if refined is None:
        return label, steps
    return refined, np.where(refined != label, np.uint16(STEPS), steps)  # what the tool changed, it vouches for


def _write(
    dataset: RawDataset,
    model: TrainedModel,
    images: Mapping[str, list[Path]],
    request: Request,
    predicted: _Predicted,
    known: Mapping[str, Any],
    work: Path,
) -> dict[str, Any]:
    """Write the masks that are kept and their record into ``work/final``; ``known``: the model's hashes and ``saw``."""
    filters, unsure_value = request.filters, ignore_value(dataset.json["labels"])
    thresholds = predicted.confidences.thresholds(filters)
    kept = sorted(images)
    if filters.keep < 1:
        if not predicted.stability:
            rule = "--keep needs predictions with and without mirroring"
            raise UserError(rule, "--disable_tta", None, "leave one of the two out")
        kept = most_stable(predicted.stability, filters.keep)
    final, cases = _empty(work / "final"), {}
    for case in kept:
        with np.load(work / "found" / f"{case}.npz") as content:
            label, steps = content["label"], content["steps"]
        doubtful = doubtful_components(label, filters)
        mask = np.where(doubtful, 0 if filters.keep_all else unsure_value, label)
        mask[below(label, steps, thresholds)] = unsure_value
        foreground = steps[label > 0] if (label > 0).any() else steps
        entry = {"confidence": float(foreground.mean() / STEPS), "stability": predicted.stability.get(case)}
        voxels = {str(int(v)): int(n) for v, n in zip(*np.unique(mask, return_counts=True), strict=True)}
        cases[case] = {"weight": _weight(entry, filters.weight_by), **entry, "voxels": voxels}
        like = None if dataset.file_ending == ".png" else read_image(images[case][0])
        write_label(mask, like, final / (case + dataset.file_ending))
    record = {
        "version": VERSION,
        "ignore": unsure_value,
        "origin": {
            "dataset": model.folder.parent.name,
            "model": model.folder.name,
            "checkpoints": known["checkpoints"],
            "checkpoint": model.checkpoint,
            "thresholds": {str(label): threshold for label, threshold in thresholds.items()},
            "filters": {k: getattr(filters, k) for k in filters.__dataclass_fields__},
            "mirroring": request.predict.mirroring,
            "refiner": request.refiner_name,
            "boxes": request.boxes is not None,
            **request.origin,
        },
        "saw": known["saw"],
        "cases": cases,
    }
    write_json_atomically(final / RECORD_NAME, record)
    return record


def _weight(entry: Mapping[str, Any], by: str) -> float:
    if by == "none":
        return 1.0
    if entry[by] is None:
        raise UserError(f"--weight_by {by} needs mirroring", "--disable_tta", None, "leave one of the two out")
    return entry[by]


def _put_in_place(new: Path, target: Path) -> None:
    """Rename a folder to its place; what lies there goes away once the new one is whole."""
    old = new.with_name("old")
    if target.is_dir():
        target.rename(old)
    new.rename(target)
