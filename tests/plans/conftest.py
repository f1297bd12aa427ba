"""A toy raw data set in nnssl's layout, written with numpy and SimpleITK only."""

from __future__ import annotations

import json
import shutil
import types
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl.layout import RawDataset
from nnssl.plans.options import PlanningOptions
from nnssl.plans.pipeline import Prepared, plan_and_preprocess

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
    """Stands in for ``multiprocessing`` where nnU-Net spawns processes, which takes seconds each."""

    @staticmethod
    def get_context(method: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(Pool=ThreadPool)


def use_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nnU-Net's fingerprint extractor work in threads, on 10 thousand foreground voxels instead of 100 million."""
    from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor

    stock = fingerprint_extractor.DatasetFingerprintExtractor

    class Extractor(stock):
        def run(self, overwrite_existing: bool = False) -> dict:
            self.num_foreground_voxels_for_intensitystats = 10_000
            return super().run(overwrite_existing)

    monkeypatch.setattr(fingerprint_extractor, "multiprocessing", _Threads)
    monkeypatch.setattr("nnssl.plans.fingerprint.DatasetFingerprintExtractor", Extractor)


@dataclass(frozen=True)
class Toy:
    """A raw data set and what preprocessing made of it.

    Args:
        raw: ``nnUNet_raw/Dataset901_Toy``.
        folder: ``nnUNet_preprocessed/Dataset901_Toy``.
    """

    raw: Path
    folder: Path

    def run(self, *configurations: str, **options) -> Prepared:
        """Plan and preprocess; 2d unless configurations are given."""
        planning = PlanningOptions(**options.pop("planning", {}))
        dataset = RawDataset.load(self.raw)
        return plan_and_preprocess(dataset, list(configurations or ["2d"]), planning, report=_silent, **options)

    def plans(self, name: str = "nnUNetPlans") -> dict:
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))


def _silent(line: str) -> None:
    """Receive a line for the user."""


@pytest.fixture(scope="session")
def prepared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 labeled, 6 unlabeled, 1 monitoring and 1 test case, planned and preprocessed for 2d. Not to be changed."""
    root = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as monkeypatch:
        raw, preprocessed = point_variables(monkeypatch, root)
        use_threads(monkeypatch)
        Toy(write_raw_dataset(raw), preprocessed / "Dataset901_Toy").run()
    return root


@pytest.fixture
def toy(prepared_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A copy of the prepared toy data set that a test may change, with nnU-Net's variables pointing to it."""
    shutil.copytree(prepared_root, tmp_path / "toy")
    raw, preprocessed = point_variables(monkeypatch, tmp_path / "toy")
    use_threads(monkeypatch)
    return Toy(raw / "Dataset901_Toy", preprocessed / "Dataset901_Toy")


@pytest.fixture
def new_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Toy]:
    """A function that writes a raw data set of its own (see `write_raw_dataset`) and points the variables to it."""
    use_threads(monkeypatch)

    def write(name: str, **content) -> Toy:
        raw, preprocessed = point_variables(monkeypatch, tmp_path / name)
        return Toy(write_raw_dataset(raw, **content), preprocessed / "Dataset901_Toy")

    return write
