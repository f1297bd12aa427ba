"""The plug for an external refiner of masks: a Python callable, or an exchange of folders. Loads no torch.

A refiner is called once a case with

    image     float32 (C, z, y, x), the raw intensities; one slice in 2D
    masks     uint8 (N, z, y, x), one binary mask a foreground label
    boxes     float (N, 2, 3): first voxel and the one behind the last, by axis (z, y, x), tight around each mask
    labels    int (N,), the labels of the masks

and returns the refined masks (N, z, y, x) and their scores (N,) in [0, 1].
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nnssl.errors import UserError
from nnssl.imageio import read_array, read_image, write_label

Refiner = Callable[..., tuple[np.ndarray, np.ndarray]]
#: What ``--refiner`` may be.
ALLOWED = "none, MODULE:FUNCTION or folder:EXPORT_DIR"


def load_refiner(spec: str) -> Refiner:
    """Import the callable ``MODULE:FUNCTION``; modules of the working directory are found.

    Raises:
        UserError: if it can't be imported or called.
    """
    module, _, function = spec.partition(":")
    if not module or not function:
        raise UserError("--refiner must name a refiner", repr(spec), ALLOWED)
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError("--refiner must be importable", f"{spec}: {error}", ALLOWED, "check the names") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise UserError("--refiner must name a function", f"{spec} is {type(found).__name__}", ALLOWED)
    return found


def refine(
    refiner: Refiner, image: np.ndarray, label: np.ndarray, steps: np.ndarray, scale: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return label map and confidences (z, y, x) after a refiner.

    Refined masks are painted by decreasing size. Voxels that they change are as sure as the score of the mask that
    took or lost them; the others keep their confidence.

    Args:
        refiner: see the module.
        image: (C, z, y, x).
        label: label map (z, y, x).
        steps: quantized confidences (z, y, x).
        scale: the step of confidence 1.

    Raises:
        UserError: if the refiner returns other shapes.
    """
    ids = np.unique(label[label > 0])
    if not len(ids):
        return label, steps
    masks = np.stack([label == value for value in ids]).astype(np.uint8)
    answer = refiner(image.astype(np.float32), masks, _tight_boxes(masks), ids.astype(np.int64))
    refined, scores = np.asarray(answer[0]) > 0, np.asarray(answer[1], float)
    if refined.shape != masks.shape or scores.shape != ids.shape or not ((scores >= 0) & (scores <= 1)).all():
        got = f"masks {refined.shape}, scores {scores.shape} from {scores.min():g} to {scores.max():g}"
        rule = "a refiner returns a mask of the same shape and a score in 0 to 1 for every label"
        raise UserError(rule, got, f"masks {masks.shape}, scores {ids.shape}", "mend the refiner")
    result, score = np.zeros_like(label), np.zeros(int(ids.max()) + 1)
    score[ids] = scores
    for i in np.argsort(-refined.sum(axis=tuple(range(1, refined.ndim))), kind="stable"):
        result[refined[i]] = ids[i]
    changed = result != label
    owner = np.where(result > 0, result, label)
    return result, np.where(changed, np.rint(score[owner] * scale).astype(steps.dtype), steps)


def _tight_boxes(masks: np.ndarray) -> np.ndarray:
    boxes = []
    for mask in masks:
        where = np.argwhere(mask)
        boxes.append([where.min(0), where.max(0) + 1])
    return np.asarray(boxes, float)


class FolderExchange:
    """Hand masks to a tool outside and take its own: ``images/``, ``masks/`` go out, ``refined/`` comes back.

    Args:
        folder: the exchange folder.
        ending: file ending of the masks.
        model: SHA-256 of the checkpoints that make the masks, by fold.

    Raises:
        UserError: if the folder holds masks of another model.
    """

    def __init__(self, folder: Path, ending: str, model: dict[str, str]) -> None:
        self.folder, self.ending = Path(folder), ending
        self.missing: list[str] = []
        mark = self.folder / "model.json"
        if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) != model:
            rule = "an exchange folder belongs to one model"
            raise UserError(rule, f"masks of another one in {self.folder}", None, "name another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(model, indent=1) + "\n", encoding="utf-8")

    def exchange(self, case: str, images: list[Path], label: np.ndarray, allowed: set[int]) -> np.ndarray | None:
        """Return the refined label map (z, y, x) of a case, or export the case and return None if there is none yet.

        Raises:
            UserError: if a refined mask has another shape or holds values that are no label.
        """
        path = self.folder / "refined" / (case + self.ending)
        if path.is_file():
            refined = read_array(path)[0][0]
            strange = sorted(set(np.unique(refined).tolist()) - allowed)
            if refined.shape != label.shape or strange:
                got = f"{path}: shape {refined.shape}, values that are no label: {strange}"
                raise UserError("a refined mask has the grid and the labels of its case", got, label.shape, "mend it")
            return refined.astype(label.dtype)
        for name in ("images", "masks", "refined"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for image in images:
            shutil.copyfile(image, self.folder / "images" / image.name)
        like = None if self.ending == ".png" else read_image(images[0])
        write_label(label, like, self.folder / "masks" / (case + self.ending))
        self.missing.append(case)
        return None
