"""Toy scans, folders and downloads for the tests of importing, converting and subsetting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl.layout import RawDataset

SHAPE = (5, 7, 6)  # z, y, x
#: Patients 0 to 3 of the source come from A, 4 to 8 from B, and 9 from C.
DOMAINS = {f"p{i:02d}_f{frame}": "AAAABBBBBC"[i] for i in range(10) for frame in (1, 2)} | {
    "p03_f3": "A",
    "p03_f4": "A",
}


class Toy:
    """Write toy scans; every scan of a different seed differs."""

    def scan(self, seed: int, dtype: str = "int16") -> sitk.Image:
        image = sitk.GetImageFromArray(np.random.default_rng(seed).integers(0, 200, SHAPE).astype(dtype))
        image.SetSpacing((1.5, 1.25, 3.0))
        image.SetOrigin((-10.5, 20.25, 5.0))
        return image

    def mask(self, seed: int, values: tuple[int, ...] = (0, 1, 2)) -> sitk.Image:
        array = np.random.default_rng(seed).choice(values, SHAPE)
        array.flat[: len(values)] = values  # every value occurs
        image = sitk.GetImageFromArray(array.astype(np.uint8))
        image.CopyInformation(self.scan(seed))
        return image

    def values(self, seed: int, values: tuple[int, ...], like: sitk.Image | None = None) -> sitk.Image:
        """A label with any values of 16 bits, on the grid of ``like``; default: that of every scan."""
        array = np.random.default_rng(seed).choice(values, SHAPE)
        array.flat[: len(values)] = values
        image = sitk.GetImageFromArray(array.astype(np.int16))
        image.CopyInformation(self.scan(seed) if like is None else like)
        return image

    def write(self, image: sitk.Image, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(path))
        return path

    def dicom(self, seed: int, folder: Path, shift: int = 0) -> Path:
        """Write a scan as a DICOM series, one file a slice; ``shift`` is added to its grey levels."""
        folder.mkdir(parents=True, exist_ok=True)
        image = self.scan(seed) + shift
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        for z in range(image.GetDepth()):
            position = image.TransformIndexToPhysicalPoint((0, 0, z))
            part = image[:, :, z]
            tags = {
                "0008|0060": "MR",
                "0020|000d": f"1.2.826.0.1.3680043.2.1125.{seed}",
                "0020|000e": f"1.2.826.0.1.3680043.2.1125.{seed}.1",
                "0008|0018": f"1.2.826.0.1.3680043.2.1125.{seed}.1.{z}",
                "0020|0032": "\\".join(f"{p:g}" for p in position),
                "0020|0037": "1\\0\\0\\0\\1\\0",
                "0018|0050": f"{image.GetSpacing()[2]:g}",
                "0020|0013": str(z),
            }
            for key, value in tags.items():
                part.SetMetaData(key, value)
            writer.SetFileName(str(folder / f"{z:03d}.dcm"))
            writer.Execute(part)
        return folder


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty nnUNet_raw; the other two variables are unset, and work is done in this process."""
    folder = tmp_path / "raw"
    folder.mkdir()
    monkeypatch.setenv("nnUNet_raw", str(folder))
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    monkeypatch.delenv("nnUNet_results", raising=False)
    return folder


@pytest.fixture
def folders(tmp_path: Path, toy: Toy) -> Path:
    """Folders as a user has them: labeled/ and masks/ with three cases, archive/ with two scans, new/ with one."""
    root = tmp_path / "scans"
    for i in range(3):
        toy.write(toy.scan(i), root / "labeled" / f"case{i}.nii.gz")
        toy.write(toy.mask(i), root / "masks" / f"case{i}.nii.gz")
    for i in range(2):
        toy.write(toy.scan(10 + i), root / "archive" / f"un{i}.nii.gz")
    toy.write(toy.scan(20), root / "new" / "test0.nii.gz")
    return root


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command's main and return exit code, stdout and stderr."""

    def call(main: Callable[[list[str]], int], *argv: object) -> tuple[int, str, str]:
        code = main([str(a) for a in argv])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """Folder of the download that a test makes."""
    folder = tmp_path / "download"
    folder.mkdir()
    return folder


@pytest.fixture
def convert_to(run, raw: Path, download: Path) -> Callable[..., tuple[RawDataset, str, str]]:
    """Convert ``download`` as data set 60, which must succeed; return it, stdout and stderr."""
    from nnssl.cli.convert import main

    def call(name: str, *options: object) -> tuple[RawDataset, str, str]:
        code, out, err = run(main, name, download, "-d", 60, *options)
        assert code == 0, err
        return RawDataset.load(next(raw.glob("Dataset060_*"))), out, err

    return call


@pytest.fixture
def convert_fails(run, raw: Path, download: Path) -> Callable[..., str]:
    """Convert ``download``, which must be refused and leave no data set; return stderr."""
    from nnssl.cli.convert import main

    def call(name: str, *options: object) -> str:
        code, _, err = run(main, name, download, "-d", 60, *options)
        assert code == 2
        assert list(raw.glob("Dataset*")) == []
        return err

    return call


@pytest.fixture
def source(raw: Path, toy: Toy) -> Path:
    """A raw data set of ten patients with two frames each, all labeled, and two unlabeled scans of patient p03."""
    folder = raw / "Dataset040_Source"
    for i in range(10):
        for frame in (1, 2):
            toy.write(toy.scan(10 * i + frame), folder / "imagesTr" / f"p{i:02d}_f{frame}_0000.nii.gz")
            toy.write(toy.mask(10 * i + frame), folder / "labelsTr" / f"p{i:02d}_f{frame}.nii.gz")
    for frame in (3, 4):
        toy.write(toy.scan(500 + frame), folder / "imagesUn" / f"p03_f{frame}_0000.nii.gz")
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "front": 1, "back": 2},
        "numTraining": 20,
        "file_ending": ".nii.gz",
        "nnssl": {"patient_pattern": r"(p\d+)_", "domains": DOMAINS},
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder
