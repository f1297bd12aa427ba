"""nnssl_import: every format, labels, patients, links, refusals; nothing half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from skimage import io

from nnssl.cli.import_data import main
from nnssl.imageio import read_array
from nnssl.layout import RawDataset

HOME = {"case0": "siteA", "case1": "siteA", "case2": "siteB", "un0": "siteC", "un1": "siteB"}
CSV = "".join(f"{case},{domain}\n" for case, domain in HOME.items())


@pytest.fixture
def do_import(run, raw: Path, folders: Path) -> Callable[..., tuple[int, str, str]]:
    """Import the toy folders as data set 501; further options can be given."""

    def call(*options: object, labeled="labeled", labels="masks", unlabeled="archive") -> tuple[int, str, str]:
        basis = ["-d", 501, "-n", "Toy", "--labeled", folders / labeled, "--labels", folders / labels]
        more = ["--unlabeled", folders / unlabeled] if unlabeled else []
        channels = [] if "--channels" in options else ["--channels", "MRI"]
        return run(main, *basis, *more, *channels, *options)

    return call


def refused(result: tuple[int, str, str], raw: Path, *texts: str) -> None:
    """The command failed with one line that holds the texts, and left nothing behind."""
    code, _, err = result
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("nnssl_import: error: ")
    for text in texts:
        assert text in last
    assert list(raw.iterdir()) == []


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nifti_folders_become_a_raw_data_set(do_import, raw: Path, folders: Path):
    code, out, _ = do_import("--test", folders / "new", "--label_names", "front", "back")
    assert code == 0
    folder = raw / "Dataset501_Toy"
    assert names(folder) == ["dataset.json", "imagesTr", "imagesTs", "imagesUn", "labelsTr"]
    assert names(folder / "imagesTr") == [f"case{i}_0000.nii.gz" for i in range(3)]
    assert names(folder / "labelsTr") == [f"case{i}.nii.gz" for i in range(3)]
    assert names(folder / "imagesUn") == ["un0_0000.nii.gz", "un1_0000.nii.gz"]
    assert names(folder / "imagesTs") == ["test0_0000.nii.gz"]
    assert (folder / "imagesTr" / "case1_0000.nii.gz").read_bytes() == (folders / "labeled/case1.nii.gz").read_bytes()
    assert json.loads((folder / "dataset.json").read_text()) == {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "front": 1, "back": 2},
        "nnssl": {},
        "file_ending": ".nii.gz",
        "name": "Dataset501_Toy",
        "numTraining": 3,
    }
    lines = out.strip().splitlines()
    assert "3 labeled, 2 unlabeled, 0 val, 1 test" in lines[-2]
    assert lines[-1] == "next: nnssl_plan_and_preprocess -d 501 --verify_dataset_integrity"


@pytest.mark.parametrize("ending", [".nii", ".nrrd", ".mha", ".mhd"])
def test_other_volume_formats_are_converted_voxel_by_voxel(do_import, raw: Path, folders: Path, toy, ending: str):
    for i in range(2):
        toy.write(toy.scan(i), folders / "images2" / f"case{i}{ending}")
        toy.write(toy.mask(i), folders / "masks2" / f"case{i}{ending}")
        toy.write(toy.scan(30 + i), folders / "archive2" / f"un{i}{ending}")
    code, _, err = do_import(labeled="images2", labels="masks2", unlabeled="archive2")
    assert code == 0
    assert "set aside" not in err  # the data files of MHD are no strays
    folder = raw / "Dataset501_Toy"
    for old, new in (
        (folders / f"images2/case1{ending}", folder / "imagesTr/case1_0000.nii.gz"),
        (folders / f"masks2/case1{ending}", folder / "labelsTr/case1.nii.gz"),
        (folders / f"archive2/un1{ending}", folder / "imagesUn/un1_0000.nii.gz"),
    ):
        (before, grid), (after, new_grid) = read_array(old), read_array(new)
        np.testing.assert_array_equal(before, after)
        assert grid.difference(new_grid) is None


def test_dicom_series_folders_are_cases(do_import, raw: Path, folders: Path, toy):
    for i in range(2):
        toy.dicom(i, folders / "dicom" / f"case{i}")
        toy.write(toy.mask(i), folders / "dicom_masks" / f"case{i}.nii.gz")
    toy.dicom(40, folders / "dicom_archive" / "un0")
    assert do_import(labeled="dicom", labels="dicom_masks", unlabeled="dicom_archive")[0] == 0
    array, grid = read_array(raw / "Dataset501_Toy/imagesTr/case1_0000.nii.gz")
    scan = toy.scan(1)
    np.testing.assert_array_equal(array[0], sitk.GetArrayFromImage(scan))
    np.testing.assert_allclose(grid.spacing, scan.GetSpacing(), rtol=1e-5)
    np.testing.assert_allclose(grid.origin, scan.GetOrigin(), atol=1e-4)
    assert names(raw / "Dataset501_Toy/imagesUn") == ["un0_0000.nii.gz"]


def test_unlabeled_dicom_series_with_a_missing_slice_is_set_aside(do_import, raw: Path, folders: Path, toy):
    toy.dicom(50, folders / "dicom_archive" / "un0")
    (toy.dicom(51, folders / "dicom_archive" / "un1") / "002.dcm").unlink()
    code, out, err = do_import(unlabeled="dicom_archive")
    assert code == 0
    assert "set aside: un1" in err
    assert "one is missing" in err
    assert "1 unlabeled" in out


@pytest.mark.parametrize(("shape", "channels"), [((9, 8), ["grey"]), ((9, 8, 3), ["R", "G", "B"])])
def test_png_stays_png(do_import, raw: Path, folders: Path, shape: tuple, channels: list[str]):
    rng = np.random.default_rng(0)
    for kind, count in (("photos", 2), ("more", 1)):
        (folders / kind).mkdir()
        for i in range(count):
            io.imsave(folders / kind / f"{kind}{i}.png", rng.integers(0, 255, shape).astype(np.uint8))
    (folders / "png_masks").mkdir()
    for i in range(2):
        io.imsave(
            folders / f"png_masks/photos{i}.png", (np.indices((9, 8))[0] > 4).astype(np.uint8), check_contrast=False
        )
    code, _, _ = do_import("--channels", *channels, labeled="photos", labels="png_masks", unlabeled="more")
    assert code == 0
    folder = raw / "Dataset501_Toy"
    assert (folder / "imagesTr/photos0_0000.png").read_bytes() == (folders / "photos/photos0.png").read_bytes()
    assert names(folder / "imagesUn") == ["more0_0000.png"]
    content = json.loads((folder / "dataset.json").read_text())
    assert content["file_ending"] == ".png"
    assert list(content["channel_names"].values()) == channels


def test_png_masks_of_0_and_255_need_a_map(do_import, raw: Path, folders: Path):
    for kind in ("photos", "png_masks"):
        (folders / kind).mkdir()
    for i in range(2):
        io.imsave(folders / f"photos/a{i}.png", np.random.default_rng(i).integers(0, 255, (9, 8)).astype(np.uint8))
        mask = (np.indices((9, 8))[0] > 4).astype(np.uint8) * 255
        io.imsave(folders / f"png_masks/a{i}.png", mask, check_contrast=False)
    png = {"labeled": "photos", "labels": "png_masks", "unlabeled": None}
    refused(do_import(**png), raw, "--label_map 255:1")
    assert do_import("--label_map", "255:1", **png)[0] == 0
    assert set(np.unique(io.imread(raw / "Dataset501_Toy/labelsTr/a0.png"))) == {0, 1}


def test_channels_follow_the_suffix(do_import, raw: Path, folders: Path, toy):
    for i in range(2):
        for channel in range(2):
            toy.write(toy.scan(60 + 2 * i + channel), folders / "two" / f"case{i}_{channel:04d}.nii.gz")
        toy.write(toy.mask(i), folders / "two_masks" / f"case{i}.nii.gz")
    toy.write(toy.scan(70), folders / "two_archive" / "one_0000.nii.gz")
    for channel in range(2):
        toy.write(toy.scan(71 + channel), folders / "two_archive" / f"both_{channel:04d}.nii.gz")
    toy.write(toy.scan(80), folders / "two_archive" / "second_0001.nii.gz")
    arguments = {"labeled": "two", "labels": "two_masks", "unlabeled": "two_archive"}
    refused(do_import("--channels", "T1", **arguments), raw, "1 names for 2 channels")
    code, _, err = do_import("--channels", "T1", "T2", **arguments)
    assert code == 0
    assert names(raw / "Dataset501_Toy/imagesTr") == [f"case{i}_{c:04d}.nii.gz" for i in range(2) for c in range(2)]
    assert names(raw / "Dataset501_Toy/imagesUn") == ["both_0000.nii.gz", "both_0001.nii.gz"]
    assert "set aside: one: has 1 channels instead of 2" in err
    assert "set aside: second: channel files are numbered _0001" in err


def test_plain_names_that_end_in_four_digits_are_cases(do_import, raw: Path, folders: Path, toy):
    for year in (2019, 2020):
        toy.write(toy.scan(year), folders / "years" / f"scan_{year}.nii.gz")
        toy.write(toy.mask(year), folders / "year_masks" / f"scan_{year}.nii.gz")
    assert do_import(labeled="years", labels="year_masks")[0] == 0
    assert list(RawDataset.load(raw / "Dataset501_Toy").cases("imagesTr")) == ["scan_2019", "scan_2020"]


def test_link_makes_links_and_says_what_it_converts(do_import, raw: Path, folders: Path, toy):
    toy.write(toy.scan(90), folders / "archive" / "other.nrrd")
    code, _, err = do_import("--link")
    assert code == 0
    folder = raw / "Dataset501_Toy"
    for path in [
        *(folder / "imagesTr").iterdir(),
        *(folder / "labelsTr").iterdir(),
        folder / "imagesUn/un0_0000.nii.gz",
    ]:
        assert path.is_symlink()
        assert path.is_file()
    assert not (folder / "imagesUn/other_0000.nii.gz").is_symlink()
    assert "1 files are converted, not linked: other.nrrd" in err


def test_label_map_merges_and_drops(do_import, raw: Path, folders: Path):
    assert do_import("--label_map", "1:0,2:1", "--label_names", "back", "--link")[0] == 0
    folder = raw / "Dataset501_Toy"
    before = read_array(folders / "masks/case0.nii.gz")[0]
    np.testing.assert_array_equal(read_array(folder / "labelsTr/case0.nii.gz")[0], before == 2)
    assert not (folder / "labelsTr/case0.nii.gz").is_symlink()
    assert RawDataset.load(folder).json["labels"] == {"background": 0, "back": 1}
    assert RawDataset.load(folder).channel_names == {"0": "MRI"}


def test_default_names_patients_and_domains(do_import, raw: Path, folders: Path):
    (folders / "domains.csv").write_text("case,domain\n" + CSV)
    options = ("--patient_pattern", r"([a-z]+\d)", "--domains", folders / "domains.csv")
    assert do_import(*options)[0] == 0
    dataset = RawDataset.load(raw / "Dataset501_Toy")
    assert dataset.json["labels"] == {"background": 0, "label1": 1, "label2": 2}
    assert dataset.nnssl == {"patient_pattern": r"([a-z]+\d)", "domains": HOME}


def test_class_that_no_case_shows_is_a_warning(do_import, raw: Path):
    code, _, err = do_import("--label_names", "front", "back", "tumor")
    assert code == 0
    assert "nnssl_import: warning: classes of dataset.json that no labeled case shows: tumor" in err
    assert (raw / "Dataset501_Toy").is_dir()


def test_unusable_unlabeled_files_are_set_aside_and_named(do_import, raw: Path, folders: Path, toy):
    archive = folders / "archive"
    whole = (archive / "un0.nii.gz").read_bytes()
    (archive / "short.nii.gz").write_bytes(whole[: len(whole) // 2])
    (archive / "text.nii.gz").write_text("hello")
    (archive / "notes.txt").write_text("hello")
    (archive / "broken.nrrd").write_text("hello")
    (archive / "photo.png").write_text("hello")
    constant = toy.scan(1) * 0
    toy.write(constant, archive / "const.mha")
    holes = sitk.GetArrayFromImage(toy.scan(2, "float32"))
    holes[0, 0, 0] = np.nan
    toy.write(sitk.GetImageFromArray(holes), archive / "nan.nii.gz")
    code, out, err = do_import()
    assert code == 0
    aside = ["short", "text", "notes.txt", "broken", "photo", "const", "nan"]
    for name in aside:
        assert f"nnssl_import: set aside: {name}: " in err
    assert "2 unlabeled" in out
    assert "7 set aside" in out
    folder = raw / "Dataset501_Toy"
    assert names(folder / "imagesUn") == ["un0_0000.nii.gz", "un1_0000.nii.gz"]
    assert sorted(RawDataset.load(folder).nnssl["set_aside"]) == sorted(aside)


# Refusals -------------------------------------------------------------------------------------------------------------
def test_labels_and_images_must_match_by_name(do_import, raw: Path, folders: Path):
    (folders / "masks/case1.nii.gz").rename(folders / "masks/other.nii.gz")
    refused(do_import(), raw, "images without label: case1", "labels without image: other")


def test_empty_labeled_folder(do_import, raw: Path, folders: Path):
    (folders / "empty").mkdir()
    refused(do_import(labeled="empty", labels="empty"), raw, "at least one labeled case")


def test_missing_folder(do_import, raw: Path):
    refused(do_import(unlabeled="nowhere"), raw, "must exist", "nowhere")


def test_same_case_labeled_and_unlabeled(do_import, raw: Path, folders: Path, toy):
    toy.write(toy.scan(99), folders / "archive/case0.nii.gz")
    refused(do_import(), raw, "either labeled or unlabeled", "case0")


@pytest.mark.parametrize(("option", "other"), [("labeled", "imagesTr/case2"), ("test", "imagesTs/test0")])
def test_unlabeled_copy_of_a_labeled_or_test_image(do_import, raw: Path, folders: Path, toy, option: str, other: str):
    toy.write(toy.scan(2 if option == "labeled" else 20), folders / "archive/copy.nrrd")
    refused(do_import("--test", folders / "new"), raw, f"imagesUn/copy equals {other}")


@pytest.mark.parametrize("kind", ["nan", "constant", "truncated"])
@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_unusable_labeled_image(do_import, raw: Path, folders: Path, toy, kind: str, ending: str):
    (folders / "labeled/case1.nii.gz").unlink()
    path = folders / f"labeled/case1{ending}"
    array = sitk.GetArrayFromImage(toy.scan(1, "float32"))
    if kind == "nan":
        array[0, 0, 0] = np.nan
    image = sitk.GetImageFromArray(array * 0 if kind == "constant" else array)
    image.CopyInformation(toy.scan(1))
    toy.write(image, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    refused(do_import(), raw, "case1", {"nan": "NaN", "constant": "constant", "truncated": "readable"}[kind])


def test_label_on_another_grid(do_import, raw: Path, folders: Path, toy):
    mask = toy.mask(1)
    mask.SetSpacing((1.5, 1.25, 3.3))
    toy.write(mask, folders / "masks/case1.nii.gz")
    refused(do_import(), raw, "one grid", "case1", "spacing")


def test_label_value_without_name(do_import, raw: Path):
    refused(do_import("--label_names", "front"), raw, "1 names for values up to 2")


def test_label_value_missing_in_the_map(do_import, raw: Path):
    refused(do_import("--label_map", "1:1"), raw, "--label_map names every value", "add 2:0")


def test_error_in_a_worker_process_leaves_nothing(do_import, raw: Path):
    result = do_import("--label_map", "1:1", "-np", 2)
    refused(result, raw, "--label_map names every value")
    assert "cannot open" not in result[2]


def test_fractional_label(do_import, raw: Path, folders: Path, toy):
    half = sitk.Cast(toy.mask(1), sitk.sitkFloat32) / 2
    toy.write(half, folders / "masks/case1.nii.gz")
    refused(do_import(), raw, "whole numbers", "0.5")


def test_colour_mask(do_import, raw: Path, folders: Path):
    for kind in ("photos", "png_masks"):
        (folders / kind).mkdir()
        io.imsave(folders / kind / "a.png", np.random.default_rng(0).integers(0, 255, (9, 8, 3)).astype(np.uint8))
    channels = ("--channels", "R", "G", "B")
    refused(do_import(*channels, labeled="photos", labels="png_masks", unlabeled=None), raw, "3 colour channels")


def test_image_with_a_time_axis(do_import, raw: Path, folders: Path):
    image = sitk.JoinSeries([sitk.ReadImage(str(folders / f"labeled/case{i}.nii.gz")) for i in range(2)])
    (folders / "labeled/case1.nii.gz").unlink()
    sitk.WriteImage(image, str(folders / "labeled/case1.nrrd"))
    refused(do_import(), raw, "4 axes", "CASE_0000")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--patient_pattern", "("), "regular expression"),
        (("--patient_pattern", "case"), "one group"),
        (("--patient_pattern", r"case(\d)"), "match every case id"),
        (("--label_map", "1=1"), "OLD:NEW"),
        (("--label_map", "1:2,2:2"), "without gaps"),
        (("--label_map", "0:1,1:1"), "keeps 0"),
        (("--label_names", "a", "a"), "must differ"),
        (("-n", "two words"), "no blanks"),
        (("-d", "1000"), "1 to 999"),
        (("--domains", "nowhere.csv"), "CSV"),
    ],
)
def test_options_out_of_range(do_import, raw: Path, options: tuple[str, ...], text: str):
    refused(do_import(*options), raw, text)


def test_domain_of_an_unknown_case(do_import, raw: Path, folders: Path):
    (folders / "domains.csv").write_text(CSV + "case7,siteA\n")
    refused(do_import("--domains", folders / "domains.csv"), raw, "case7")


@pytest.mark.parametrize("case", ["case1", "un0", "test0"])
def test_a_case_without_domain_is_refused(do_import, raw: Path, folders: Path, case: str):
    rows = [line for line in (CSV + "test0,siteA").splitlines() if not line.startswith(case)]
    (folders / "domains.csv").write_text("\n".join(rows))
    options = ("--test", folders / "new", "--domains", folders / "domains.csv")
    refused(do_import(*options), raw, "for every case or for none", f"none for {case}")


def test_a_domain_of_a_scan_that_is_set_aside_is_dropped(do_import, raw: Path, folders: Path, toy):
    (folders / "archive" / "torn.nii.gz").write_bytes(b"\x1f\x8b")
    toy.write(toy.scan(1) * 0, folders / "archive" / "flat.nii.gz")
    (folders / "domains.csv").write_text(CSV + "torn,siteD\nflat,siteE\n")
    code, out, err = do_import("--domains", folders / "domains.csv")
    assert code == 0
    assert "torn" in err
    assert "flat" in err
    assert RawDataset.load(raw / "Dataset501_Toy").nnssl["domains"] == HOME
    assert "domains: siteA: 2 labeled; siteB: 1 labeled, 1 unlabeled; siteC: 1 unlabeled\n" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CSV.replace("case1,siteA", "case1"), "CASE,DOMAIN,MODALITY"),
        (CSV.replace("case1,siteA", "case1,siteA,CT"), "one form"),
        (CSV + "case1,siteB\n", "two for case1"),
        ("".join(f"{c},{d},{'MR' if c == 'un1' else 'CT'}\n" for c, d in HOME.items()), "for siteB"),
    ],
)
def test_domain_files_with_a_fault(do_import, raw: Path, folders: Path, text: str, message: str):
    (folders / "domains.csv").write_text(text)
    refused(do_import("--domains", folders / "domains.csv"), raw, message)


@pytest.mark.parametrize(
    ("modalities", "channel"),
    [
        ({"siteA": "CT", "siteB": "MR", "siteC": "CT"}, "zscore"),
        ({"siteA": "CT", "siteB": "ct", "siteC": "CT"}, "CT"),
        (None, "zscore"),  # several domains, and nothing says that all are CT
    ],
)
def test_a_ct_channel_keeps_its_name_only_if_every_domain_is_ct(do_import, raw, folders, modalities, channel):
    lines = [f"{c},{d},{modalities[d]}" if modalities else f"{c},{d}" for c, d in HOME.items()]
    (folders / "domains.csv").write_text("\n".join(["case,domain" + ",modality" * bool(modalities), *lines]))
    code, _, err = do_import("--channels", "CT", "--domains", folders / "domains.csv")
    assert code == 0
    dataset = RawDataset.load(raw / "Dataset501_Toy")
    assert dataset.channel_names == {"0": channel}
    assert ("nnssl_import: warning: channel CT is named zscore" in err) == (channel == "zscore")
    assert dataset.nnssl.get("domain_modalities") == modalities


def test_id_in_use_is_refused_and_kept(do_import, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (raw / "Dataset501_Older").mkdir()
    code, _, err = do_import()
    assert code == 2
    assert "Dataset501_Older exists" in err
    assert names(raw) == ["Dataset501_Older"]
    (raw / "Dataset501_Older").rmdir()
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    (tmp_path / "results/Dataset501_Other").mkdir(parents=True)
    refused(do_import(), raw, "Dataset501_Other")


def test_unset_variable(do_import, raw: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("nnUNet_raw")
    refused(do_import(), raw, "nnUNet_raw", "unset")


def test_full_disk_leaves_nothing(do_import, raw: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", fail)
    refused(do_import(), raw, "No space left")


@pytest.mark.skipif("NNSSL_REAL_DATA" not in os.environ, reason="NNSSL_REAL_DATA names no folder of real scans")
def test_three_real_patients(run, raw: Path, tmp_path: Path):
    data = Path(os.environ["NNSSL_REAL_DATA"]) / "ACDC"
    patients = sorted({path.name[:10] for path in (data / "images").iterdir()})[:3]
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        for patient in patients:
            for path in (data / kind).glob(f"{patient}_*"):
                (tmp_path / kind / path.name).symlink_to(path)
    code, out, _ = run(
        main, "-d", 27, "-n", "ACDC", "--labeled", tmp_path / "images", "--labels", tmp_path / "labels",
        "--channels", "MRI", "--label_names", "RV", "MYO", "LV", "--patient_pattern", r"(patient\d+)_", "--link",
    )  # fmt: skip
    assert code == 0
    assert "6 labeled" in out
    assert {RawDataset.load(raw / "Dataset027_ACDC").patient(f"{p}_frame01") for p in patients} == set(patients)
