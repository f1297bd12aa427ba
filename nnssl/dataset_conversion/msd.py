"""Medical Segmentation Decathlon: any task, from its own dataset.json; and the prostate as the literature uses it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from nnssl.dataset_conversion.base import Case, Converter, Source, require_label
from nnssl.dataset_conversion.volumes import read_channels
from nnssl.errors import UserError
from nnssl.plans.verify import listed


class MSD(Converter):
    """All channels and classes of a task, under its own name."""

    NAME = "MSD"
    TITLE = "Medical Segmentation Decathlon"
    LICENCE = "CC BY-SA 4.0"
    SOURCE_URL = "https://medicaldecathlon.com"
    LAYOUTS = {"Decathlon": "TaskNN_NAME with dataset.json, imagesTr/, labelsTr/ [and imagesTs/]"}
    EXPECTED: ClassVar[dict[str, dict[str, int]]] = {"Decathlon": {}}  # the task's dataset.json says it
    LABELS: ClassVar[dict[str, Any]] = {}  # as above
    PAGE = "msd"
    SHARED_VOXELS = True
    KEEP: ClassVar[tuple[int, ...] | None] = None  # channels

    def detect(self, source: Path) -> str | None:
        return "Decathlon" if _task(source) else None

    def cases(self, source: Path, layout: str) -> Iterator[Case]:
        root, content = _task(source) or (source, {})
        split = self.KEEP is not None or len(content["modality"]) > 1
        read = partial(read_channels, keep=self.KEEP) if split else None
        for entry in content["training"]:
            image, label = root / entry["image"], root / entry["label"]
            yield Case(_name(image), (Source(image, read),), require_label(label, image))
        tests = [root / (entry if isinstance(entry, str) else entry["image"]) for entry in content.get("test", [])]
        if missing := [path.name for path in tests if not path.is_file()]:
            warnings.warn(f"test images of dataset.json that are not there: {listed(missing)}", stacklevel=2)
        for image in tests:
            if image.is_file():
                yield Case(_name(image), (Source(image, read),), folder="imagesTs")

    def details(self, source: Path, layout: str) -> dict[str, Any]:
        root, content = _task(source) or (source, {})
        names = {int(value): str(name) for value, name in content["labels"].items()}
        if sorted(names) != list(range(len(names))):
            rule = "label values of a task are 0, 1, 2, ..."
            raise UserError(rule, sorted(names), None, f"mend the labels of {root / 'dataset.json'}")
        classes = {"background" if value == 0 else names[value]: value for value in sorted(names)}
        channels = {str(i): str(content["modality"][str(k)]) for i, k in enumerate(self._channels(content))}
        name = str(content.get("name", root.name))
        return {
            "name": "".join(c if c.isalnum() or c in "_-" else "_" for c in name),
            "channel_names": channels,
            "labels": classes,
            "description": f"{self.TITLE}, {name}: {content.get('description', '')}".rstrip(": "),
            "licence": content.get("licence") or self.LICENCE,
        }

    def _channels(self, content: dict[str, Any]) -> tuple[int, ...]:
        return tuple(range(len(content["modality"]))) if self.KEEP is None else self.KEEP


class Prostate(MSD):
    """Task05 as DiffRect uses it: T2 alone, peripheral and transition zone."""

    NAME = "Prostate"
    TITLE = "Medical Segmentation Decathlon, prostate: peripheral and transition zone in T2-weighted MRI"
    LAYOUTS = {"Decathlon": "Task05_Prostate with dataset.json, imagesTr/, labelsTr/ [and imagesTs/]"}
    EXPECTED = {"Decathlon": {"imagesTr": 32, "imagesTs": 16}}
    PUBLISHED = "prostate.json"
    KEEP = (0,)  # T2; the second channel, ADC, is left out

    def detect(self, source: Path) -> str | None:
        task = _task(source)
        return "Decathlon" if task and str(task[1].get("name", "")).lower() == "prostate" else None

    def details(self, source: Path, layout: str) -> dict[str, Any]:
        return {**super().details(source, layout), "name": self.NAME, "description": self.TITLE}


def _task(source: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder of the task, which may lie one level deeper, and its dataset.json."""
    for root in (source, *sorted(source.glob("*"))):
        try:
            content = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and {"modality", "labels", "training"} <= content.keys():
            return root, content
    return None


def _name(image: Path) -> str:
    return image.name.removesuffix(".gz").removesuffix(".nii")
