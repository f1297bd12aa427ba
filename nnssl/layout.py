"""Where things lie on disk: nnU-Net's variables and the raw data set, with its unlabeled half. Loads no torch.

Layout of a raw data set (everything but ``imagesUn``, ``imagesVal`` and ``labelsVal`` is nnU-Net's own)::

    DatasetXXX_Name/  imagesTr/ labelsTr/  imagesUn/  imagesVal/ labelsVal/  imagesTs/ [labelsTs/]  dataset.json

``labelsPseudo`` may hold masks of unknown quality for some cases of ``imagesUn`` (see :mod:`nnssl.plans.pseudo`).
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from nnssl.errors import UserError, nearest

#: nnU-Net's three variables; nnssl defines none of its own.
VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
#: Folder of masks of unknown quality, ``CASE.ending``, for some cases of ``imagesUn``.
PSEUDO_FOLDER = "labelsPseudo"
#: Image folders and the folder with their labels (None: no labels exist there).
IMAGE_FOLDERS = {"imagesTr": "labelsTr", "imagesUn": None, "imagesVal": "labelsVal", "imagesTs": "labelsTs"}


def variable(name: str) -> Path:
    """Return the folder an nnU-Net variable points to.

    Raises:
        UserError: if the variable is unset.
    """
    value = os.environ.get(name, "")
    if not value:
        raise UserError(
            f"the environment variable {name} must name a folder", "unset", None, f"export {name}=/a/folder"
        )
    return Path(value)


def find_dataset(id_or_name: int | str, root: Path | None = None) -> Path:
    """Find ``DatasetXXX_Name`` below ``root`` (default: nnUNet_raw) by id (``501``) or full name.

    Raises:
        UserError: if none or several data sets answer to it.
    """
    root = variable("nnUNet_raw") if root is None else Path(root)
    known = sorted(p.name for p in root.glob("Dataset[0-9][0-9][0-9]_*") if p.is_dir())
    text = str(id_or_name)
    hits = [k for k in known if int(k[7:10]) == int(text)] if text.isdigit() else [k for k in known if k == text]
    if len(hits) != 1:
        rule = "a data set id or name must name exactly one data set"
        raise UserError(
            f"{rule} in {root}", f"{text!r} ({len(hits)} found)", nearest(text, known), "check -d and the variables"
        )
    return root / hits[0]


def require_writable(folder: Path, rule: str, remedy: str) -> None:
    """Create a folder and write to it once.

    Raises:
        UserError: ``rule``, with the system's reason and ``remedy``, if that fails.
    """
    probe = folder / f".nnssl_write_test_{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(rule, f"{folder}: {error}", None, remedy) from error


@dataclass(frozen=True)
class RawDataset:
    """A raw data set on disk.

    Args:
        folder: ``nnUNet_raw/DatasetXXX_Name``.
        json: the parsed ``dataset.json``.
    """

    folder: Path
    json: dict = field(repr=False)

    @classmethod
    def load(cls, folder: Path) -> RawDataset:
        """Read ``dataset.json`` of ``folder``."""
        path = Path(folder) / "dataset.json"
        if not path.is_file():
            raise UserError(
                "a raw data set needs a dataset.json", f"no {path}", None, "run nnssl_import or nnssl_convert"
            )
        try:
            return cls(Path(folder), json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise UserError("dataset.json must be valid JSON", f"{path}: {error}", None, "repair the file") from error

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def file_ending(self) -> str:
        return self.json["file_ending"]

    @property
    def channel_names(self) -> dict[str, str]:
        return self.json.get("channel_names", self.json.get("modality", {}))

    @property
    def nnssl(self) -> dict:
        """The optional block ``nnssl`` of dataset.json: patient_pattern, domains."""
        return self.json.get("nnssl", {})

    def cases(self, image_folder: str) -> dict[str, list[Path]]:
        """Return ``{case id: channel files in order}`` of one image folder; empty if the folder is absent.

        Files that do not follow ``CASE_0000.ending`` are not listed (see :meth:`stray_files`).
        """
        folder = self.folder / image_folder
        found: dict[str, list[Path]] = {}
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                match = self._image_name.fullmatch(path.name)
                if match and not path.name.startswith("."):
                    found.setdefault(match[1], []).append(path)
        return found

    def stray_files(self, image_folder: str) -> list[Path]:
        """Return files of an image folder that are no image of any case."""
        folder = self.folder / image_folder
        if not folder.is_dir():
            return []
        return [
            p for p in sorted(folder.iterdir()) if not p.name.startswith(".") and not self._image_name.fullmatch(p.name)
        ]

    def label_file(self, image_folder: str, case: str) -> Path:
        """Return the path where the label of a case of ``imagesTr``, ``imagesVal`` or ``imagesTs`` lies."""
        labels = IMAGE_FOLDERS[image_folder]
        if labels is None:
            raise ValueError(f"{image_folder} has no labels")
        return self.folder / labels / (case + self.file_ending)

    def pseudo_masks(self) -> dict[str, Path]:
        """Return ``{case: mask}`` of ``labelsPseudo``, whether or not the case exists; empty if there is none."""
        folder, ending = self.folder / PSEUDO_FOLDER, self.file_ending
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        return {p.name[: -len(ending)]: p for p in found if p.name.endswith(ending) and not p.name.startswith(".")}

    def patient(self, case: str) -> str:
        """Return the patient of a case: the first group of ``patient_pattern``, else the case id itself."""
        pattern = self.nnssl.get("patient_pattern")
        if not pattern:
            return case
        match = re.search(pattern, case)
        if match is None or not match.groups() or match[1] is None:
            remedy = "repair nnssl.patient_pattern in dataset.json"
            raise UserError(
                "patient_pattern must match every case id with one group", f"{pattern!r} on {case!r}", None, remedy
            )
        return match[1]

    @cached_property
    def _image_name(self) -> re.Pattern[str]:
        return re.compile(r"(.+)_(\d{4})" + re.escape(self.file_ending))
