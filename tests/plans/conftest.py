"""A toy raw data set in nnssl's layout, written with numpy and SimpleITK only."""

from __future__ import annotations

import json
import types
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

SPACING_ZYX = (2.0, 1.0, 1.0)


def write_image(path: Path, array: np.ndarray, spacing_zyx: tuple[float, ...] = SPACING_ZYX) -> None:
    """Write an array (z, y, x) as an image with the given voxel size in mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(tuple(reversed(spacing_zyx)))
    sitk.WriteImage(image, str(path))


def toy_case(seed: int, shape: tuple[int, int, int] = (16, 24, 24)) -> tuple[np.ndarray, np.ndarray]:
    """Return image (float32) and label (uint8: background, shell, core) of a noisy ball at a random place."""
    rng = np.random.default_rng(seed)
    center = [n / 2 + rng.uniform(-2, 2) for n in shape]
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    radius = np.sqrt(sum((g - c) ** 2 for g, c in zip(grid, center, strict=True)))
    label = ((radius < 6).astype(np.uint8) + (radius < 3)).astype(np.uint8)
    image = 100 + 50 * label + rng.normal(0, 5, shape)
    return image.astype(np.float32), label


def write_raw_dataset(
    root: Path,
    labeled: int = 3,
    unlabeled: int = 6,
    monitoring: int = 1,
    test: int = 1,
    dataset_id: int = 901,
    channel: str = "MRI",
    nnssl: dict | None = None,
    shape: tuple[int, int, int] = (16, 24, 24),
) -> Path:
    """Write ``DatasetXXX_Toy`` below ``root``; case k is the same image whatever folder it lands in.

    Labeled cases come first, then unlabeled, monitoring and test ones, with ids ``case_000``, ``case_001``, ...
    """
    folder = root / f"Dataset{dataset_id:03d}_Toy"
    homes = ["imagesTr"] * labeled + ["imagesUn"] * unlabeled + ["imagesVal"] * monitoring + ["imagesTs"] * test
    labels = {"imagesTr": "labelsTr", "imagesVal": "labelsVal", "imagesTs": "labelsTs"}
    for index, home in enumerate(homes):
        image, label = toy_case(index, shape)
        write_image(folder / home / f"case_{index:03d}_0000.nii.gz", image)
        if home in labels:
            write_image(folder / labels[home] / f"case_{index:03d}.nii.gz", label)
    content = {
        "channel_names": {"0": channel},
        "labels": {"background": 0, "shell": 1, "core": 2},
        "numTraining": labeled,
        "file_ending": ".nii.gz",
    }
    if nnssl is not None:
        content["nnssl"] = nnssl
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def point_variables(monkeypatch: pytest.MonkeyPatch, root: Path) -> tuple[Path, Path]:
    """Set nnU-Net's variables below ``root``; return the raw and the preprocessed folder."""
    for name in ("raw", "preprocessed", "results"):
        (root / name).mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv(f"nnUNet_{name}", str(root / name))
    return root / "raw", root / "preprocessed"


class _Threads:
    """Stands in for ``multiprocessing`` where nnU-Net insists on spawning: seconds a process, for milliseconds of work."""

    @staticmethod
    def get_context(method: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(Pool=ThreadPool)


@pytest.fixture
def no_spawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nnU-Net's fingerprint extractor work in threads."""
    from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor

    monkeypatch.setattr(fingerprint_extractor, "multiprocessing", _Threads)
