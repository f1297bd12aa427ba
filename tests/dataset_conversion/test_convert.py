"""nnssl_convert on tiny copies of every layout, and the published lists."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

import nnssl
from nnssl.cli import make_subset
from nnssl.cli.convert import main
from nnssl.dataset_conversion import CONVERTERS
from nnssl.dataset_conversion.published import find_protocol, load_published
from nnssl.dataset_conversion.subset import draw_order
from nnssl.imageio import read_array
from nnssl.layout import RawDataset

PUBLISHED = Path(nnssl.__file__).parent / "dataset_conversion" / "published"
LA_IDS = load_published("la.json")["train"][:3]
REAL = pytest.mark.skipif("NNSSL_REAL_DATA" not in os.environ, reason="NNSSL_REAL_DATA names no folder of real scans")


def scan(seed: int, shape: tuple[int, int, int] = (5, 7, 6)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, shape).astype(np.uint8)


def write(path: Path, array: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))


def write_h5(path: Path, image: np.ndarray, label: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = image, label


@pytest.fixture
def download(tmp_path: Path) -> Path:
    return tmp_path / "download"


@pytest.fixture
def convert(run, raw: Path, download: Path) -> Callable[..., tuple[int, str, str]]:
    return lambda name, *options: run(main, name, download, "-d", 60, *options)


@pytest.fixture
def la_challenge(download: Path) -> Path:
    for part, count in (("Training Set", 3), ("Testing Set", 1)):
        for i in range(count):
            name = LA_IDS[i] if part == "Training Set" else "TESTID"
            write(download / part / name / "lgemri.nrrd", scan(i + 10 * count), (0.625, 0.625, 0.625))
            mask = (scan(i + 50) > 128).astype(np.uint8) * 255
            write(download / part / name / "laendo.nrrd", mask, (0.625, 0.625, 0.625))
    return download


@pytest.fixture
def acdc_challenge(download: Path) -> Path:
    for part, patients in (("training", ("patient038", "patient099", "patient100")), ("testing", ("patient101",))):
        for patient in patients:
            folder = download / part / patient
            folder.mkdir(parents=True)
            (folder / "Info.cfg").write_text("ED: 1\nES: 9\nGroup: DCM\nNbFrame: 30\n")
            write(folder / f"{patient}_4d.nii.gz", scan(0))
            for frame in ("01", "09"):
                seed = int(patient[-3:]) * 100 + int(frame)
                write(folder / f"{patient}_frame{frame}.nii.gz", scan(seed), (1.5, 1.5, 10.0))
                write(folder / f"{patient}_frame{frame}_gt.nii.gz", scan(seed) % 4, (1.5, 1.5, 10.0))
    return download


# LA -------------------------------------------------------------------------------------------------------------------
def test_la_challenge_folders(convert, la_challenge: Path, raw: Path):
    code, out, err = convert("LA")
    assert code == 0
    assert "3 labeled, 0 unlabeled, 0 val, 1 test" in out
    assert "the whole release has 100" in err
    dataset = RawDataset.load(raw / "Dataset060_LA")
    assert list(dataset.cases("imagesTr")) == sorted(LA_IDS)
    assert list(dataset.cases("imagesTs")) == ["TESTID"]
    original = read_array(la_challenge / "Training Set" / LA_IDS[1] / "laendo.nrrd")[0]
    label, grid = read_array(dataset.label_file("imagesTr", LA_IDS[1]))
    np.testing.assert_array_equal(label, original == 255)
    assert grid.spacing == pytest.approx((0.625, 0.625, 0.625))
    assert dataset.json["labels"] == {"background": 0, "left_atrium": 1}
    assert dataset.nnssl == {"source": "LA", "layout": "challenge"}
    assert dataset.json["licence"] == CONVERTERS["LA"].LICENCE
    assert dataset.json["reference"] == CONVERTERS["LA"].SOURCE_URL


def test_name_of_the_download_does_not_make_it_a_test_set(run, la_challenge: Path, raw: Path):
    download = (la_challenge / "Training Set").rename(la_challenge / "test_LA")
    assert run(main, "LA", download, "-d", 60)[0] == 0
    assert len(list((raw / "Dataset060_LA" / "imagesTr").iterdir())) == 3


def test_la_header_without_spacing_gets_the_nominal_one(convert, la_challenge: Path, raw: Path):
    folder = la_challenge / "Training Set" / LA_IDS[0]
    write(folder / "lgemri.nrrd", scan(1))
    write(folder / "laendo.nrrd", (scan(2) > 9).astype(np.uint8) * 255)
    assert convert("LA")[0] == 0
    spacing = read_array(raw / f"Dataset060_LA/imagesTr/{LA_IDS[0]}_0000.nii.gz")[1].spacing
    assert spacing == pytest.approx((0.625, 0.625, 0.625))


def test_la_mask_with_other_values_is_refused(convert, la_challenge: Path, raw: Path):
    write(la_challenge / "Training Set" / LA_IDS[0] / "laendo.nrrd", scan(3), (0.625, 0.625, 0.625))
    code, _, err = convert("LA")
    assert code == 2
    assert "0, 1, 255 are expected" in err
    assert list(raw.glob("Dataset*")) == []


def test_la_h5_axes_are_x_y_z(convert, download: Path, raw: Path):
    for i, name in enumerate(LA_IDS):
        image = np.random.default_rng(i).normal(size=(6, 7, 5)).astype(np.float32)
        write_h5(download / name / "mri_norm2.h5", image, (image > 1).astype(np.uint8))
    code, _, _ = convert("LA", "--channels", "noNorm")
    assert code == 0
    dataset = RawDataset.load(raw / "Dataset060_LA")
    array, grid = read_array(dataset.cases("imagesTr")[LA_IDS[2]][0])
    np.testing.assert_array_equal(array[0], image.transpose(2, 1, 0))
    assert grid.size == (6, 7, 5)
    assert grid.spacing == (0.625, 0.625, 0.625)
    np.testing.assert_array_equal(read_array(dataset.label_file("imagesTr", LA_IDS[2]))[0], array > 1)
    assert dataset.nnssl["provenance"].startswith("label-cut crop")
    assert dataset.channel_names == {"0": "noNorm"}


# ACDC -----------------------------------------------------------------------------------------------------------------
def test_acdc_challenge_folders(convert, acdc_challenge: Path, raw: Path):
    code, out, err = convert("ACDC")
    assert code == 0
    assert "6 labeled, 0 unlabeled, 0 val, 2 test" in out
    assert "Info.cfg" not in err
    dataset = RawDataset.load(raw / "Dataset060_ACDC")
    assert "patient099_frame09" in dataset.cases("imagesTr")
    assert dataset.patient("patient099_frame09") == "patient099"
    assert dataset.label_file("imagesTs", "patient101_frame01").is_file()
    assert dataset.json["labels"] == {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
    source = acdc_challenge / "training/patient099/patient099_frame09.nii.gz"
    assert (dataset.folder / "imagesTr/patient099_frame09_0000.nii.gz").read_bytes() == source.read_bytes()


def test_acdc_frame_that_info_cfg_does_not_name_is_a_warning(convert, acdc_challenge: Path):
    (acdc_challenge / "training/patient099/Info.cfg").write_text("ED: 1\nES: 10\n")
    code, _, err = convert("ACDC")
    assert code == 0
    assert "patient099: frame 09 is neither ED nor ES" in err


def test_acdc_grid_and_values_are_checked(convert, acdc_challenge: Path, raw: Path):
    path = acdc_challenge / "training/patient099/patient099_frame01_gt.nii.gz"
    good = path.read_bytes()
    write(path, scan(1) % 4, (1.5, 1.5, 5.0))
    code, _, err = convert("ACDC")
    assert code == 2
    assert "one grid" in err
    path.write_bytes(good)
    write(path, scan(1) % 5, (1.5, 1.5, 10.0))
    code, _, err = convert("ACDC")
    assert code == 2
    assert "value 4 in" in err
    path.unlink()
    assert "every training frame has a label" in convert("ACDC")[2]
    assert list(raw.glob("Dataset*")) == []


def test_acdc_h5_volumes_take_the_original_frame_names(convert, download: Path, raw: Path):
    for patient in ("patient003", "patient090"):
        for frame in ("01", "02"):
            image = np.random.default_rng(int(patient[-3:]) + int(frame)).random((4, 7, 6))
            write_h5(download / f"ACDC_training_volumes/{patient}_frame{frame}.h5", image, (image * 4).astype(np.uint8))
        write_h5(download / f"ACDC_training_slices/{patient}_frame01_slice_1.h5", image[0], image[0])
    assert convert("ACDC")[0] == 0
    dataset = RawDataset.load(raw / "Dataset060_ACDC")
    assert list(dataset.cases("imagesTr")) == [
        "patient003_frame01",
        "patient003_frame15",
        "patient090_frame04",
        "patient090_frame11",
    ]
    array, grid = read_array(dataset.cases("imagesTr")["patient090_frame11"][0])
    np.testing.assert_array_equal(array[0], image.astype(np.float32))
    assert grid.spacing == (1.5625, 1.5625, 10.0)
    assert "spacing nominal" in dataset.nnssl["provenance"]


# Any converter --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(CONVERTERS))
def test_unknown_layout_is_refused_with_the_known_ones(convert, download: Path, raw: Path, name: str):
    for state in ("absent", "empty"):
        if state == "empty":
            download.mkdir()
        code, _, err = convert(name)
        assert code == 2
        assert next(iter(CONVERTERS[name].LAYOUTS.values())) in err
    assert list(raw.glob("Dataset*")) == []


def test_unknown_name_lists_the_nearest(convert, download: Path):
    download.mkdir()
    assert "nearest: ACDC" in convert("ADCC")[2]


def test_broken_h5_is_refused(convert, download: Path, raw: Path):
    path = download / LA_IDS[0] / "mri_norm2.h5"
    path.parent.mkdir(parents=True)
    path.write_text("no h5")
    code, _, err = convert("LA")
    assert code == 2
    assert "mri_norm2.h5" in err
    assert list(raw.glob("Dataset*")) == []


@pytest.mark.parametrize("name", sorted(CONVERTERS))
def test_converters_describe_themselves(name: str):
    converter = CONVERTERS[name]
    assert name == converter.NAME
    assert converter.EXPECTED.keys() == converter.LAYOUTS.keys()
    assert converter.LICENCE
    assert converter.TITLE
    assert converter.SOURCE_URL.startswith("https://")
    pages = Path(nnssl.__file__).parents[1] / "documentation"
    assert name in (pages / "datasets" / f"{converter.PAGE}.md").read_text(encoding="utf-8")
    assert f"datasets/{converter.PAGE}.md" in (pages / "README.md").read_text(encoding="utf-8")


# Published lists ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("LA-4", (4, 76, 0, 20)),
        ("LA-8", (8, 72, 0, 20)),
        ("LA-16", (16, 64, 0, 20)),
        ("ACDC-1", (1, 69, 10, 20)),
        ("ACDC-3", (3, 67, 10, 20)),
        ("ACDC-7", (7, 63, 10, 20)),
        ("ACDC-14", (14, 56, 10, 20)),
        ("BraTS19-25", (25, 225, 25, 60)),
        ("BraTS19-50", (50, 200, 25, 60)),
        ("Pancreas-6", (6, 55, 0, 19)),  # as published 56 and 20; two of these are withdrawn
        ("Pancreas-12", (11, 50, 0, 19)),  # as published 12 and 20
        ("Pancreas-CoraNet-12", (12, 50, 0, 18)),
        ("Synapse-4", (4, 16, 4, 6)),
        ("MMWHS-CT2MR", (16, 13, 3, 4)),
        ("MMWHS-MR2CT", (16, 13, 3, 4)),
        ("MnMs-A-2", (5, 220, 0, 95)),
        ("MnMs-A-5", (13, 212, 0, 95)),
        ("MnMs-B-2", (4, 191, 0, 125)),
        ("MnMs-B-5", (11, 184, 0, 125)),
        ("MnMs-C-2", (6, 264, 0, 50)),
        ("MnMs-C-5", (15, 255, 0, 50)),
        ("MnMs-D-2", (6, 264, 0, 50)),
        ("MnMs-D-5", (15, 255, 0, 50)),
        ("Prostate-2-own1", (2, 20, 0, 10)),
        ("Prostate-2-own2", (2, 20, 0, 10)),
        ("MSCMR-7-own1", (7, 28, 0, 10)),
        ("MSCMR-7-own2", (7, 28, 0, 10)),
    ],
)
def test_published_counts_and_disjoint_roles(tmp_path: Path, name: str, counts: tuple[int, ...]):
    protocol = find_protocol(name, tmp_path)
    roles = (protocol.labeled, protocol.unlabeled, protocol.val, protocol.test)
    assert tuple(map(len, roles)) == counts
    assert len(set().union(*roles)) == sum(counts)


def test_published_lists_begin_as_published(tmp_path: Path):
    assert find_protocol("LA-4", tmp_path).labeled == [
        "06SR5RBREL16DQ6M8LWS",
        "0RZDK210BSMWAA6467LU",
        "1D7CUD1955YZPGK8XHJX",
        "1GU15S0GJ6PFNARO469W",
    ]
    assert find_protocol("LA-4", tmp_path).test[0] == "UPT6DX9IQY9JAZ7HJKA7"
    assert find_protocol("ACDC-3", tmp_path).labeled == ["patient099", "patient038", "patient050"]
    frames = load_published("acdc.json")["frames"]
    assert sorted(frames) == [f"patient{i:03d}" for i in range(1, 101)]
    assert all(int(first) < int(second) for first, second in frames.values())


def test_ids_of_lists_are_told_from_names_of_lists(tmp_path: Path):
    lists = {
        "source": "here",
        "protocols": {"P-1": {"labeled": ["@few", "c"], "unlabeled": ["@all", "x"], "test": ["t", "gone"]}},
        "few": ["b"],
        "all": ["a", "b", "c", "gone"],
        "withdrawn": ["gone", "elsewhere"],
    }
    (tmp_path / "nnssl_published_splits.json").write_text(json.dumps(lists))
    protocol = find_protocol("P-1", tmp_path)
    assert protocol.labeled == ["b", "c"]
    assert protocol.unlabeled == ["a", "x"]
    assert protocol.test == ["t"]
    assert protocol.val == []
    assert protocol.withdrawn == ("gone",)
    assert not protocol.ours


@pytest.mark.parametrize("name", sorted(p.name for p in PUBLISHED.glob("*.json")))
def test_split_files_say_where_they_come_from(tmp_path: Path, name: str):
    lists = load_published(name)
    assert lists["dataset"]
    assert lists["unit"]
    assert ("nnssl" in lists["source"]) if lists.get("ours") else ("github.com/" in lists["source"])
    for protocol in lists["protocols"]:
        assert find_protocol(protocol, tmp_path).labeled
        assert ("own" in protocol) == lists.get("ours", False)


def test_own_splits_follow_their_rule():
    for name, prefix in (("prostate.json", "Prostate-2-own"), ("mscmr.json", "MSCMR-7-own")):
        lists = load_published(name)
        for split in (1, 2):
            held_out, rest = lists[f"test{split}"], lists[f"train{split}"]
            drawn = draw_order([*held_out, *rest], split)
            assert set(drawn[:10]) == set(held_out)
            assert drawn[10:] == rest
            assert lists["protocols"][f"{prefix}{split}"]["labeled"] == rest[: int(prefix.split("-")[1])]


def test_vendors_are_disjoint_and_have_two_frames_each():
    lists = load_published("mnms.json")
    subjects = [subject for vendor in "ABCD" for subject in lists[vendor]]
    assert len(subjects) == len(set(subjects)) == 320
    assert lists["frames"].keys() == set(subjects)
    assert all(len(set(frames)) == 2 for frames in lists["frames"].values())


def test_converted_data_set_carries_its_published_lists(convert, acdc_challenge: Path, raw: Path, run):
    convert("ACDC")
    carried = json.loads((raw / "Dataset060_ACDC/nnssl_published_splits.json").read_text())
    assert carried == load_published("acdc.json")
    code, out, err = run(make_subset.main, "-d", 60, "-o", 61, "--published", "ACDC-1")
    assert code == 0
    dataset = RawDataset.load(raw / "Dataset061_ACDC_labeled1")
    assert set(dataset.cases("imagesTr")) == {"patient099_frame01", "patient099_frame09"}
    assert len(dataset.cases("imagesUn")) == 4
    assert dataset.cases("imagesTs") == {}
    assert "20 published ids are not in the source" in err
    assert "left out: 2 cases: patient101_frame01, patient101_frame09" in out


@REAL
def test_real_la_scan_survives_the_h5_layout(convert, download: Path, raw: Path):
    data = Path(os.environ["NNSSL_REAL_DATA"]) / "LA"
    name = LA_IDS[0]
    image = read_array(data / f"images/{name}.nii.gz")[0][0]
    label = read_array(data / f"labels/{name}.nii.gz")[0][0]
    write_h5(download / name / "mri_norm2.h5", image.transpose(2, 1, 0), label.transpose(2, 1, 0))
    assert convert("LA")[0] == 0
    dataset = RawDataset.load(raw / "Dataset060_LA")
    np.testing.assert_array_equal(read_array(dataset.cases("imagesTr")[name][0])[0][0], image)
    np.testing.assert_array_equal(read_array(dataset.label_file("imagesTr", name))[0][0], label)
