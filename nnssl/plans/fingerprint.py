"""What planning knows of the images: nnU-Net's fingerprint of the labeled cases, shapes and spacings of all."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.reader_writer_registry import (
    determine_reader_writer_from_dataset_json,
    recursive_find_reader_writer_by_name,
)
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

from nnssl.errors import UserError
from nnssl.layout import RawDataset
from nnssl.plans.manifest import IMAGE_FINGERPRINT_NAME, write_json_atomically
from nnssl.plans.parallel import Workers, reason


def extract_labeled_fingerprint(dataset: RawDataset, num_processes: int) -> None:
    """Write nnU-Net's ``dataset_fingerprint.json``: intensities, shapes and spacings of the labeled cases only.

    Raises:
        UserError: if nnU-Net can't make one, for instance because no labeled case has any foreground.
    """
    extractor = DatasetFingerprintExtractor(dataset.name, max(1, num_processes))
    extractor.show_progress_bar = False
    extractor.dataset = {case: extractor.dataset[case] for case in dataset.cases("imagesTr")}  # no stray file
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net prints the reader class
            extractor.run(overwrite_existing=True)
    except (IndexError, ValueError, AssertionError) as error:
        rule = "the labeled cases must have foreground to take intensity statistics from"
        raise UserError(rule, reason(error), None, "look at labelsTr and the labels in dataset.json") from error


def image_statistics(files: list[str], reader_name: str) -> dict[str, Any]:
    """Return what the plan needs of one image; no label is involved.

    Args:
        files: the channel files of a case, in order.
        reader_name: name of nnU-Net's reader class.

    Returns:
        ``spacing`` (mm, nnU-Net's axis order), ``shape_after_crop`` (voxels of the nonzero box) and
        ``relative_size_after_cropping``.
    """
    images, properties = recursive_find_reader_writer_by_name(reader_name)().read_images(files)
    cropped, _, _ = crop_to_nonzero(images)
    return {
        "spacing": [float(v) for v in properties["spacing"]],
        "shape_after_crop": [int(v) for v in cropped.shape[1:]],
        "relative_size_after_cropping": float(np.prod(cropped.shape[1:]) / np.prod(images.shape[1:])),
    }


def update_image_fingerprint(
    folder: Path, images: dict[str, list[Path]], hashes: dict[str, str], dataset: RawDataset, workers: Workers
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Take the statistics of images that are new or changed and keep the others' from the last run.

    Args:
        folder: the preprocessed data set's folder, which keeps ``nnssl_image_fingerprint.json``.
        images: channel files by case, labeled and unlabeled.
        hashes: content hash by case.
        dataset: the raw data set.
        workers: pool to read with.

    Returns:
        Statistics by case, and the reasons of the cases that could not be read.
    """
    path = folder / IMAGE_FINGERPRINT_NAME
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {c: known[c] for c in images if c in known and known[c]["hash"] == hashes[c]}
    reader = determine_reader_writer_from_dataset_json(dataset.json, str(next(iter(images.values()))[0]), verbose=False)
    jobs = {c: ([str(f) for f in files], reader.__name__) for c, files in images.items() if c not in found}
    failed: dict[str, str] = {}
    for case, statistics, error in workers.run("Reading shapes and spacings", image_statistics, jobs):
        if error is None:
            found[case] = {"hash": hashes[case], **statistics}
        else:
            failed[case] = reason(error)
    write_json_atomically(path, {case: found[case] for case in sorted(found)})
    return found, failed
