"""The invented scans are reproducible, hold every class, and differ as scans of several scanners do."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from scipy.ndimage import binary_dilation, label

from nnssl.demo.synthetic import CLASSES, SHAPE, SPACING, STYLES, make_case, write_dataset

CASES = range(12)


@pytest.fixture(scope="module")
def cases() -> list:
    return [make_case(0, i) for i in CASES]


def test_same_seed_gives_the_same_voxels_and_another_seed_others(cases: list) -> None:
    again = make_case(0, 5)
    np.testing.assert_array_equal(again.image, cases[5].image)
    np.testing.assert_array_equal(again.label, cases[5].label)
    other = make_case(1, 5)
    assert (other.label != again.label).any()
    assert (other.image != again.image).any()


def test_every_case_holds_every_class(cases: list) -> None:
    for case in cases:
        assert case.image.shape == case.label.shape == SHAPE
        assert case.image.dtype == np.int16
        assert set(np.unique(case.label)) == {0, *CLASSES}
        assert min((case.label == c).sum() for c in CLASSES) >= 40, "a class of a few voxels measures nothing"


def test_ring_encloses_the_cavity_and_the_crescent_leans_on_it(cases: list) -> None:
    for case in cases:
        for plane in case.label:
            if (plane == 1).any():
                rim = binary_dilation(plane == 1) & (plane != 1)
                assert set(np.unique(plane[rim])) == {2}, "the cavity touches muscle only"
            if (plane == 3).any():
                assert (binary_dilation(plane == 3) & (plane == 2)).any()


def test_targets_stay_inside_the_picture(cases: list) -> None:
    inside = [(c.label[:, 1:-1, 1:-1] > 0).sum() / (c.label > 0).sum() for c in cases]
    assert min(inside) > 0.98


def test_shapes_and_places_vary(cases: list) -> None:
    volumes = np.array([(c.label == 1).sum() for c in cases])
    assert volumes.max() > 2 * volumes.min()
    centers = np.array([np.argwhere(c.label[0] == 1).mean(0) for c in cases])
    assert (np.ptp(centers, axis=0) > 5).all(), "pixels"


def test_styles_take_turns_and_differ_in_contrast(cases: list) -> None:
    assert {c.style for c in cases[:3]} == {s.name for s in STYLES}
    contrasts: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        cavity, muscle = (case.image[case.label == c].mean() for c in (1, 2))
        brightest = np.percentile(case.image[case.label == 0], 98)
        contrasts.setdefault(case.style, []).append((cavity / muscle, brightest / cavity))
    means = [np.mean(values, axis=0) for values in contrasts.values()]
    assert min(m[0] for m in means) > 1.2, "the cavity is brighter than the muscle in every style"
    apart = [np.abs(a - b).max() for a, b in itertools.combinations(means, 2)]
    assert min(apart) > 0.3, "contrast tells any two styles apart"


def test_intensity_alone_does_not_find_the_targets(cases: list) -> None:
    """Look-alikes: thresholding at the cavity's own brightness finds more outside of the targets than inside."""
    for case in cases:
        typical = np.median(case.image[case.label == 1])
        alike = (np.abs(case.image - typical) < 0.15 * typical) & (case.label == 0)
        assert alike.sum() > 0.5 * (case.label == 1).sum()
        assert label(alike)[1] > 1


def test_folders_hold_masks_for_labeled_and_test_only(tmp_path: Path) -> None:
    counts = {"labeled": 1, "unlabeled": 2, "test": 1}
    styles = write_dataset(tmp_path, 3, counts, (4, 32, 32))
    assert {p.name for p in tmp_path.iterdir()} == {"labeled", "masks", "unlabeled", "test", "test_masks"}
    assert {split: len(names) for split, names in styles.items()} == counts
    names = [{p.name for p in (tmp_path / d).iterdir()} for d in ("labeled", "unlabeled", "test")]
    assert len(set.union(*names)) == 4, "no case is in two splits"
    for images, masks in (("labeled", "masks"), ("test", "test_masks")):
        for path in (tmp_path / images).iterdir():
            image, mask = (SimpleITK.ReadImage(str(p)) for p in (path, tmp_path / masks / path.name))
            assert image.GetSize() == mask.GetSize() == (32, 32, 4)
            assert image.GetDirection() == mask.GetDirection()
            np.testing.assert_allclose(image.GetSpacing(), SPACING[::-1])


def test_files_are_reproducible_byte_by_byte(tmp_path: Path) -> None:
    def digests(folder: Path) -> dict[str, str]:
        write_dataset(folder, 0, {"labeled": 1, "unlabeled": 1}, (4, 32, 32))
        files = sorted(folder.rglob("*.nii.gz"))
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    assert digests(tmp_path / "a") == digests(tmp_path / "b")
