"""MS-CMRSeg 2019 from a tiny copy of the challenge's folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nnssl.imageio import read_array

NAMES = [f"patient{i}" for i in (1, 2, 10, 11)]


@pytest.fixture
def mscmr(download: Path, toy) -> Path:
    for i, name in enumerate(NAMES):
        for kind in ("C0", "T2", "LGE"):
            toy.write(
                toy.scan(10 * i + len(kind)), download / f"C0LET2_nii45_for_challenge19/c0t2lge/{name}_{kind}.nii.gz"
            )
        folder = "C0LET2_nii45_for_challenge19/lgegt" if i < 2 else "C0LET2_gt_for_challenge19/LGE_manual_35_TestData"
        if i < 3:
            label = toy.values(i, (0, 200, 500, 600))
            toy.write(label, download / folder / f"{name}_LGE_manual.nii.gz")
    return download


def test_lge_with_classes_in_the_order_of_acdc(convert_to, mscmr: Path, toy):
    dataset, _, err = convert_to("MSCMR")
    assert set(dataset.cases("imagesTr")) == set(NAMES[:3])
    values = {"RV": 600, "MYO": 200, "LV": 500}
    label = read_array(dataset.label_file("imagesTr", "patient10"))[0]
    original = read_array(mscmr / "C0LET2_gt_for_challenge19/LGE_manual_35_TestData/patient10_LGE_manual.nii.gz")[0]
    for name, value in values.items():
        np.testing.assert_array_equal(label == dataset.json["labels"][name], original == value)
    assert "1 images without labels are left out" in err


def test_image_without_label_is_the_pool(convert_to, mscmr: Path):
    assert list(convert_to("MSCMR", "--with_unlabeled")[0].cases("imagesUn")) == ["patient11"]


def test_second_copy_counts_only_if_it_differs(convert_to, convert_fails, mscmr: Path, toy):
    first = mscmr / "C0LET2_nii45_for_challenge19/lgegt/patient1_LGE_manual.nii.gz"
    second = mscmr / "C0LET2_gt_for_challenge19/LGE_manual_35_TestData/patient1_LGE_manual.nii.gz"
    toy.write(toy.values(77, (0, 200)), second)
    assert "every file of a release is found once" in convert_fails("MSCMR")
    second.write_bytes(first.read_bytes())
    assert "patient1" in convert_to("MSCMR")[0].cases("imagesTr")
