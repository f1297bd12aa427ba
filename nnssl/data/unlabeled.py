"""Preprocessed unlabeled cases as an nnU-Net data set that can not read a label."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from nnssl.errors import UserError, nearest


class NonzeroMask:
    """Read a ``CASE_seg.b2nd`` lazily as nothing but 0 (inside the nonzero mask) and -1 (outside).

    nnU-Net marks the outside of the nonzero mask with -1 in the segmentation. Whatever else the file holds becomes 0
    here, so a label that strayed into it cannot travel further.

    Args:
        array: the stored integers, shape (1, z, y, x).
    """

    def __init__(self, array: Any) -> None:
        self._array = array
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype = np.dtype(np.int16)

    def __getitem__(self, item: Any) -> np.ndarray:
        return -(np.asarray(self._array[item]) < 0).astype(np.int16)


class UnlabeledDataset:
    """Load preprocessed unlabeled cases (nnU-Net's blosc2 format) without ever reading a label.

    It offers what nnU-Net's loaders need of a data set (``identifiers``, ``load_case``). ``CASE.pkl``, which holds
    label locations in labeled data sets, is never opened; ``CASE_seg.b2nd`` only with ``use_mask``, and then only
    its sign is read (see `NonzeroMask`).

    Args:
        folder: the ``<data_identifier>_unlabeled`` folder of the preprocessed data set.
        identifiers: the cases to use, in any order; None means every case in the folder.
        use_mask: whether the nonzero mask matters, that is ``any(configuration_manager.use_mask_for_norm)``.

    Raises:
        UserError: the folder or a case is missing, or there is no case.
    """

    def __init__(self, folder: str | Path, identifiers: Iterable[str] | None = None, use_mask: bool = False) -> None:
        self.source_folder = str(folder)
        self.use_mask = use_mask
        found = self.get_identifiers(self.source_folder)
        self.identifiers = found if identifiers is None else sorted({str(name) for name in identifiers})
        self._refuse_missing(found)
        # mmap fails on Windows (MIC-DKFZ/nnUNet issue 2723)
        self._open_options: dict[str, Any] = {} if os.name == "nt" else {"mmap_mode": "r"}

    @staticmethod
    def get_identifiers(folder: str | Path) -> list[str]:
        """Return the sorted names of the preprocessed cases in a folder.

        Raises:
            UserError: the folder does not exist.
        """
        if not Path(folder).is_dir():
            raise UserError(
                "unlabeled cases must be preprocessed before training", f"no folder {folder}", None, _PREPROCESS
            )
        names = [path.name for path in Path(folder).glob("*.b2nd")]
        return sorted(name[: -len(".b2nd")] for name in names if not name.endswith("_seg.b2nd"))

    def _refuse_missing(self, found: list[str]) -> None:
        missing = sorted(set(self.identifiers) - set(found))
        if missing:
            raise UserError(
                f"every unlabeled case must lie in {self.source_folder}",
                f"{len(missing)} missing, first {missing[0]}.b2nd",
                nearest(missing[0], found),
                _PREPROCESS,
            )
        if not self.identifiers:
            raise UserError("an unlabeled data set holds cases", f"none in {self.source_folder}", None, _PREPROCESS)

    def __len__(self) -> int:
        return len(self.identifiers)

    def __getitem__(self, identifier: str) -> tuple[Any, NonzeroMask | None, None, dict]:
        return self.load_case(identifier)

    def load_case(self, identifier: str) -> tuple[Any, NonzeroMask | None, None, dict]:
        """Open one case lazily.

        Returns:
            (data, mask, None, {}): data float32 (c, z, y, x); mask int16 (1, z, y, x) with 0 inside and -1 outside
            the nonzero mask, or None without ``use_mask``. The last two stand where nnU-Net has the previous stage's
            segmentation and the properties with the label locations.
        """
        data = self._open(identifier + ".b2nd")
        return data, NonzeroMask(self._open(identifier + "_seg.b2nd")) if self.use_mask else None, None, {}

    def _open(self, name: str) -> Any:
        path = os.path.join(self.source_folder, name)
        return blosc2.open(urlpath=path, mode="r", dparams={"nthreads": 1}, **self._open_options)


_PREPROCESS = "run nnssl_plan_and_preprocess for this data set and configuration"
