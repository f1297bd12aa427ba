"""The literature's crop around the reference label: its box, its place, and its mark."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl.dataset_conversion import CONVERTERS
from nnssl.dataset_conversion.crop import MARK, LabelCrop
from nnssl.imageio import ImageReadError, read_array


def label(first: tuple[int, int, int], last: tuple[int, int, int], size=(20, 24, 10)) -> sitk.Image:
    """A label that fills a box; corners are x, y, z, inclusive."""
    array = np.zeros(size[::-1], np.uint8)
    array[first[2] : last[2] + 1, first[1] : last[1] + 1, first[0] : last[0] + 1] = 1
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.5, 2.0, 1.0))
    return image


def box(crop: LabelCrop, image: sitk.Image) -> list[tuple[int, int]]:
    start, size = crop.box(sitk.GetArrayViewFromImage(image), image.GetSpacing())
    return [(first, first + length) for first, length in zip(start, size, strict=True)]


def test_margin_in_voxels_and_in_mm():
    image = label((8, 9, 4), (10, 12, 5))
    assert box(LabelCrop((2, 3, 1), "voxels", 0, ""), image) == [(6, 13), (6, 16), (3, 7)]
    assert box(LabelCrop((2, 4, 1), "mm", 0, ""), image) == [(4, 15), (7, 15), (3, 7)]


def test_axis_without_margin_stays_whole_and_the_scan_ends_the_margin():
    image = label((0, 9, 4), (1, 22, 5))
    assert box(LabelCrop((3, 3, None), "voxels", 0, ""), image) == [(0, 5), (6, 24), (0, 10)]


def test_box_grows_to_its_minimum_on_both_sides():
    assert box(LabelCrop((1, 1, None), "voxels", 7, ""), label((8, 9, 4), (10, 12, 5))) == [(5, 14), (7, 16), (0, 10)]


def test_empty_label_is_refused():
    with pytest.raises(ImageReadError, match="empty label"):
        box(LabelCrop((1, 1, 1), "voxels", 0, ""), label((5, 5, 5), (4, 4, 4)))


def read(path: Path, image: sitk.Image) -> sitk.Image:
    return image


def test_voxels_keep_their_place_in_space():
    mask = label((8, 9, 4), (10, 12, 5))
    scan = sitk.GetImageFromArray(np.arange(20 * 24 * 10, dtype=np.int16).reshape(10, 24, 20))
    scan.CopyInformation(mask)
    crop = LabelCrop((1, 1, 1), "voxels", 0, "")
    load, load_label = partial(read, Path(), scan), partial(read, Path(), mask)
    cut = crop.wrap(load, load_label)(Path("scan"))
    assert cut.GetSize() == (5, 6, 4)
    for index in ((0, 0, 0), (4, 5, 3)):
        there = scan.TransformPhysicalPointToIndex(cut.TransformIndexToPhysicalPoint(index))
        assert cut[index] == scan[there]
    with pytest.raises(ImageReadError, match=r"\(image, label\)"):
        crop.wrap(partial(read, Path(), scan[:, :, 1:]), load_label)(Path("scan"))


def test_crop_of_la_is_marked_and_leaves_the_depth(convert_to, download: Path):
    spacing, shape = (0.625, 0.625, 0.625), (6, 160, 150)
    array = np.random.default_rng(0).integers(1, 255, shape).astype(np.uint8)
    mask = np.zeros(shape, np.uint8)
    mask[2:4, 40:110, 30:40] = 255
    for name, voxels in (("lgemri", array), ("laendo", mask)):
        image = sitk.GetImageFromArray(voxels)
        image.SetSpacing(spacing)
        (download / "CASE").mkdir(exist_ok=True)
        sitk.WriteImage(image, str(download / "CASE" / f"{name}.nrrd"))
    dataset, _, _ = convert_to("LA", "--literature_crop")
    image, _ = read_array(dataset.cases("imagesTr")["CASE"][0])
    written, _ = read_array(dataset.label_file("imagesTr", "CASE"))
    # x: 10 voxels grow to 112 by 51 a side, and 15 more are cut by the scan's edge; y: 70 grow by 21, and 15 more
    np.testing.assert_array_equal(image[0], array[:, 4:146, 0:106])
    np.testing.assert_array_equal(written[0], mask[:, 4:146, 0:106] > 0)
    assert dataset.nnssl["provenance"].startswith(MARK)
    assert "UA-MT" in dataset.nnssl["provenance"]


def test_only_what_the_literature_describes_can_be_cropped(convert_fails, download: Path, toy):
    toy.write(toy.scan(0), download / "Training/img/img0001.nii.gz")
    toy.write(toy.mask(0), download / "Training/label/label0001.nii.gz")
    assert "MMWHS (challenge), Pancreas-CT (TCIA)" in convert_fails("Synapse", "--literature_crop")


def test_layouts_with_a_crop_exist():
    assert {"LA", "Pancreas-CT"} <= {c.NAME for c in CONVERTERS.values() if c.CROPS}
    for converter in CONVERTERS.values():
        assert converter.CROPS.keys() <= converter.LAYOUTS.keys()
