"""PNG data sets, RGB and grey, through every command of the ``2d`` configuration, up to the mIoU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from nnssl_test_tools import nnunet_variables
from skimage import io
from sklearn.metrics import jaccard_score

from nnssl.cli import evaluate, import_data, plan_and_preprocess, predict, train

PLAN = ["-c", "2d", "--patch_size", "32", "32", "--batch_size", "2", "--base_features", "4", "-np", "1"]
TRAIN = ["-device", "cpu", "--epochs", "1", "--iterations_per_epoch", "2"]
SIZE = (32, 40)
IGNORE = 3


@pytest.fixture
def workspace(tmp_path):
    """nnU-Net's variables in a folder of the test's own."""
    with nnunet_variables(tmp_path):
        yield tmp_path


def photo(seed: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a picture (y, x[, 3]) of 0 to 255 with a black border, and a label with two classes and ignored pixels."""
    rng = np.random.default_rng(seed)
    label = np.zeros(SIZE, np.uint8)
    y, x = rng.integers(4, 12, 2)
    label[y : y + 10, x : x + 8] = 1
    label[y : y + 10, x + 10 : x + 18] = 2
    image = np.stack([rng.integers(20, 60, SIZE) + (60 + 20 * c) * label for c in range(channels)], -1)
    image[:, :2] = 0
    label[-3:] = IGNORE
    return image.squeeze(-1).astype(np.uint8) if channels == 1 else image.astype(np.uint8), label


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    io.imsave(path, array, check_contrast=False)


@pytest.mark.parametrize("channels", [["rgb_to_0_1"] * 3, ["zscore"]], ids=["rgb", "grey"])
def test_the_five_commands_lead_from_folders_of_png_to_a_miou(workspace, channels):
    scans = workspace / "scans"
    for i in range(3):
        image, label = photo(i, len(channels))
        save(scans / "labeled" / f"frame{i}.png", image)
        save(scans / "masks" / f"frame{i}.png", label)
        save(scans / "archive" / f"old{i}.png", photo(50 + i, len(channels))[0])
        image, label = photo(90 + i, len(channels))
        save(scans / "new" / f"today{i}_0000.png", image)
        save(scans / "masks_new" / f"today{i}.png", label)
    folders = ["--labeled", str(scans / "labeled"), "--labels", str(scans / "masks")]
    names = ["--unlabeled", str(scans / "archive"), "--label_names", "one", "two", "ignore", "--channels", *channels]
    assert import_data.main(["-d", "501", "-n", "Photos", *folders, *names]) == 0
    assert plan_and_preprocess.main(["-d", "501", "--verify_dataset_integrity", *PLAN]) == 0
    for trainer in ("SupervisedTrainer", "ProtoDiffTrainer"):
        assert train.main(["501", "2d", "-tr", trainer, *TRAIN]) == 0
        out = workspace / f"out_{trainer}"
        where = ["-i", str(scans / "new"), "-o", str(out), "-d", "501", "-c", "2d", "-tr", trainer]
        assert predict.main([*where, "-device", "cpu", "-npp", "0", "-nps", "0"]) == 0
        assert evaluate.main(["-ref", str(scans / "masks_new"), "-pred", str(out), "-np", "1"]) == 0
        result = json.loads((out / "nnssl_evaluation.json").read_text())
        assert (result["unit"], result["ignore_label"], result["labels"]) == ("px", IGNORE, {"one": 1, "two": 2})
        check_miou(result["miou"], scans / "masks_new", out)


def check_miou(miou: dict, references: Path, predictions: Path) -> None:
    """Compare with scikit-learn over the pixels of all files; masks have one channel and the size of the pictures."""
    pixels: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for i in range(3):
        for folder, found in zip((references, predictions), pixels, strict=True):
            mask = io.imread(folder / f"today{i}.png")
            assert (mask.shape, mask.dtype) == (SIZE, np.uint8)
            found.append(mask.ravel())
    reference, prediction = map(np.concatenate, pixels)
    valid = reference != IGNORE
    present = sorted({*reference[valid], *prediction[valid]})
    expected = jaccard_score(reference[valid], prediction[valid], labels=present, average="macro")
    assert miou["mean"] == pytest.approx(expected)
