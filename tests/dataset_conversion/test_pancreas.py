"""NIH Pancreas-CT from a tiny copy of the collection: DICOM series, and labels in files of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl.cli import make_subset
from nnssl.imageio import read_array
from nnssl.layout import RawDataset

IDS = ("0002", "0018", "0025", "0050", "0057", "0062")  # three of them labeled in Pancreas-6, one of them test


def as_in_the_archive(label: sitk.Image) -> sitk.Image:
    """The archive's headers: another origin, and directions that are not those of the series."""
    label.SetOrigin((0, 0, 0))
    label.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    return label


@pytest.fixture
def pancreas(download: Path, toy) -> Path:
    for i, number in enumerate(IDS):
        toy.dicom(i + 1, download / "Pancreas-CT" / f"PANCREAS_{number}" / "study" / "series")
        label = as_in_the_archive(toy.mask(i + 1, (0, 1)))
        toy.write(label, download / "TCIA_pancreas_labels-02-05-2017" / f"label{number}.nii.gz")
    return download


def test_series_and_label_share_their_voxels(convert_to, pancreas: Path, toy):
    dataset, _, err = convert_to("Pancreas-CT")
    image, grid = read_array(dataset.cases("imagesTr")["PANCREAS_0018"][0])
    np.testing.assert_array_equal(image[0], sitk.GetArrayFromImage(toy.scan(2)))
    label, label_grid = read_array(dataset.label_file("imagesTr", "PANCREAS_0018"))
    np.testing.assert_array_equal(label[0], sitk.GetArrayFromImage(toy.mask(2, (0, 1))))
    assert label_grid.difference(grid) is None
    assert "5 labels took over the grid of their image" in err
    assert dataset.channel_names == {"0": "CT"}


@pytest.mark.parametrize("options", [(), ("--literature_crop",)])
def test_a_label_that_says_it_was_stored_with_other_axes_is_turned(convert_to, pancreas: Path, toy, options):
    label = sitk.DICOMOrient(toy.mask(2, (0, 1)), "RAI")
    toy.write(label, pancreas / "TCIA_pancreas_labels-02-05-2017" / "label0018.nii.gz")
    dataset, _, err = convert_to("Pancreas-CT", *options)
    found, grid = read_array(dataset.label_file("imagesTr", "PANCREAS_0018"))
    np.testing.assert_array_equal(found[0], sitk.GetArrayFromImage(toy.mask(2, (0, 1))))
    assert grid.difference(read_array(dataset.cases("imagesTr")["PANCREAS_0018"][0])[1]) is None
    text = "1 labels were stored with other axes than their image, and turned: imagesTr/PANCREAS_0018"
    assert (text in err) == (not options)


def test_withdrawn_copies_are_left_out_and_named(convert_to, pancreas: Path):
    dataset, out, err = convert_to("Pancreas-CT")
    assert "PANCREAS_0025" not in dataset.cases("imagesTr")
    assert "set aside: PANCREAS_0025: withdrawn by the archive" in err
    assert dataset.nnssl["set_aside"].keys() == {"PANCREAS_0025"}
    assert "1 set aside" in out


def test_label_off_the_soft_tissue_is_refused(convert_fails, pancreas: Path, toy):
    toy.dicom(2, pancreas / "Pancreas-CT/PANCREAS_0018/study/series", shift=-1000)
    assert "0% of it lies between -150 and 350 HU" in convert_fails("Pancreas-CT")


def test_label_of_another_size_is_refused(convert_fails, pancreas: Path, toy):
    path = pancreas / "TCIA_pancreas_labels-02-05-2017/label0018.nii.gz"
    toy.write(toy.mask(2, (0, 1))[:, :, 1:], path)
    assert "size (6, 7, 5) and (6, 7, 4) (image, label)" in convert_fails("Pancreas-CT")


def test_scan_without_label_and_label_without_scan(convert_to, convert_fails, pancreas: Path, toy):
    labels = pancreas / "TCIA_pancreas_labels-02-05-2017"
    toy.write(toy.mask(9), labels / "label0082.nii.gz")
    toy.write(toy.mask(9), labels / "label0070.nii.gz")  # its scan is gone from the archive, its label is not
    (labels / "label0050.nii.gz").rename(labels / "kept")
    assert "every training image has a label" in convert_fails("Pancreas-CT")
    (labels / "kept").rename(labels / "label0050.nii.gz")
    assert "labels without a scan are left out: PANCREAS_0082\n" in convert_to("Pancreas-CT")[2]


def test_two_series_of_a_patient_are_refused(convert_fails, pancreas: Path, toy):
    toy.dicom(99, pancreas / "Pancreas-CT/PANCREAS_0018/study/other")
    assert "one DICOM series" in convert_fails("Pancreas-CT")


def test_literature_crop_is_marked_and_deep(convert_to, pancreas: Path):
    dataset, _, _ = convert_to("Pancreas-CT", "--literature_crop")
    assert dataset.nnssl["provenance"].startswith("label-cut crop by --literature_crop")
    assert read_array(dataset.cases("imagesTr")["PANCREAS_0018"][0])[1].size[2] == 5  # z stays whole


def test_published_protocol_without_its_withdrawn_case(convert_to, pancreas: Path, raw: Path, run):
    convert_to("Pancreas-CT")
    for number, name in ((61, "Pancreas-6"), (62, "Pancreas-12")):
        code, _, err = run(make_subset.main, "-d", 60, "-o", number, "-n", name, "--published", name)
        assert code == 0, err
        assert "leaves out what was withdrawn since its publication: PANCREAS_0025" in err
        dataset = RawDataset.load(raw / f"Dataset{number:03d}_{name}")
        assert list(dataset.cases("imagesTr")) == ["PANCREAS_0018", "PANCREAS_0057", "PANCREAS_0062"]
        assert list(dataset.cases("imagesUn")) == ["PANCREAS_0002"]
        assert list(dataset.cases("imagesTs")) == ["PANCREAS_0050"]
