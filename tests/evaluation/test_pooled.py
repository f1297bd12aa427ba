"""mIoU over the pixels of a whole set, against scikit-learn and against its own laws."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import jaccard_score

from nnssl.evaluation.evaluate import evaluate_folders
from nnssl.evaluation.pooled import Counts, count, pooled_iou
from nnssl.evaluation.report import result_table

NAMES = {"background": 0, "vessel": 1, "catheter": 2, "balloon": 3, "ignore": 4}
CLASSES = ["background", "vessel", "catheter", "balloon"]


@pytest.fixture
def pngs(tmp_path, write):
    """References with ignored pixels and predictions of three images of different size; balloon is in none."""
    rng = np.random.default_rng(0)
    for case, size in (("a", (9, 7)), ("b", (20, 30)), ("c", (5, 40))):
        reference = rng.choice([0, 1, 2, 4], size, p=[0.5, 0.3, 0.1, 0.1])
        prediction = np.where(rng.random(size) < 0.6, np.where(reference == 4, 1, reference), rng.integers(0, 3, size))
        write(tmp_path / "ref" / f"{case}.png", reference, spacing=(1, 1))
        write(tmp_path / "pred" / f"{case}.png", prediction, spacing=(1, 1))
    return tmp_path / "ref", tmp_path / "pred"


def pixels(folder, cases="abc"):
    from skimage import io

    return np.concatenate([io.imread(folder / f"{case}.png").ravel() for case in cases])


def sklearn_iou(folders, cases="abc"):
    reference, prediction = (pixels(folder, cases) for folder in folders)
    valid = reference != 4
    return jaccard_score(reference[valid], prediction[valid], labels=[0, 1, 2], average=None)


def test_iou_of_the_set_is_that_of_all_its_pixels_in_a_row(pngs):
    result = evaluate_folders(*pngs, NAMES, num_processes=1)
    miou, expected = result["miou"], sklearn_iou(pngs)
    assert list(miou["iou"]) == CLASSES
    assert [miou["iou"][name] for name in CLASSES[:3]] == pytest.approx(expected)
    assert miou["mean"] == pytest.approx(expected.mean())
    assert miou["mean_without_background"] == pytest.approx(expected[1:].mean())
    assert miou["mean_without_background"] != pytest.approx(result["foreground_mean"]["jaccard"])  # no mean over cases


def test_a_class_that_is_nowhere_has_no_iou_and_one_that_is_only_predicted_has_zero(pngs, write):
    assert evaluate_folders(*pngs, NAMES, num_processes=1)["miou"]["iou"]["balloon"] is None
    write(pngs[0] / "d.png", np.zeros((4, 4)), spacing=(1, 1))
    write(pngs[1] / "d.png", np.full((4, 4), 3), spacing=(1, 1))
    miou = evaluate_folders(*pngs, NAMES, num_processes=1)["miou"]
    assert miou["iou"]["balloon"] == 0
    assert miou["mean"] == pytest.approx(np.mean([miou["iou"][name] for name in CLASSES]))


def test_what_is_predicted_under_the_ignore_label_does_not_matter(pngs, write):
    from skimage import io

    before = evaluate_folders(*pngs, NAMES, num_processes=1)["miou"]
    for path in pngs[1].glob("*.png"):
        prediction, ignored = io.imread(path), io.imread(pngs[0] / path.name) == 4
        write(path, np.where(ignored, 3, prediction), spacing=(1, 1))
    assert evaluate_folders(*pngs, NAMES, num_processes=1)["miou"] == before


def test_classes_and_background_of_one_image_share_its_pixels(pngs):
    """Every valid pixel is predicted as one class and is of one class, so both sums over classes are the pixels."""
    reference, prediction = (pixels(folder) for folder in pngs)
    valid = reference != 4
    counts = [count((prediction == value) & valid, (reference == value) & valid) for value in range(4)]
    assert sum(c.tp + c.fp for c in counts) == sum(c.tp + c.fn for c in counts) == valid.sum()
    together = pooled_iou([dict(zip(CLASSES, counts, strict=True))], CLASSES[1:])
    assert together == evaluate_folders(*pngs, NAMES, num_processes=1)["miou"]


def test_means_of_an_empty_set_of_classes_are_undefined():
    nothing = Counts(0, 0, 0)
    miou = pooled_iou([{"background": Counts(4, 0, 0), "vessel": nothing}], ["vessel"])
    assert miou == {"mean": 1, "mean_without_background": None, "iou": {"background": 1, "vessel": None}}


def test_a_region_is_a_class_and_the_background_is_what_no_region_covers(pngs):
    labels = {"background": 0, "all": [1, 2], "catheter": 2, "ignore": 4}
    miou = evaluate_folders(*pngs, labels, num_processes=1)["miou"]
    reference, prediction = (pixels(folder) for folder in pngs)
    valid = reference != 4
    binary = jaccard_score(reference[valid] > 0, prediction[valid] > 0, average=None)
    assert [miou["iou"]["background"], miou["iou"]["all"]] == pytest.approx(binary)
    assert miou["iou"]["catheter"] == pytest.approx(sklearn_iou(pngs)[2])


def test_a_domain_has_the_miou_of_its_own_cases(pngs):
    result = evaluate_folders(*pngs, NAMES, num_processes=1, domains={"a": "A", "b": "B", "c": "B"})
    found = result["domains"]["B"]["miou"]
    assert [found["iou"][name] for name in CLASSES[:3]] == pytest.approx(sklearn_iou(pngs, "bc"))
    json.dumps(result, allow_nan=False)


def test_table_has_a_row_a_class_and_both_means(pngs):
    domains = {"a": "A", "b": "B", "c": "B"}
    result = evaluate_folders(*pngs, NAMES, num_processes=1, domains=domains)
    lines = result_table(result).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("IoU of the set"))
    rows = [line.split() for line in lines[start + 1 : start + 7]]
    assert [row[0] for row in rows] == [*CLASSES, "mIoU", "mIoU"]
    assert rows[3][1:] == ["-"] * 3
    assert rows[4][1] == f"{result['miou']['mean']:.4f}"
    assert rows[5][-3:] == [
        f"{part['miou']['mean_without_background']:.4f}" for part in (result, *result["domains"].values())
    ]
