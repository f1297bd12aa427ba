"""nnssl_convert MOSXAV on a tiny copy of the published layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nnssl.cli import make_subset
from nnssl.cli.convert import main
from nnssl.dataset_conversion.mosxav import COLORS
from nnssl.dataset_conversion.published import load_published
from nnssl.imageio import read_array
from nnssl.layout import RawDataset

SIZE = (8, 12)


def classes(seed: int, count: int = 5) -> np.ndarray:
    array = np.random.default_rng(seed).integers(0, count, SIZE).astype(np.uint8)
    array.flat[:count] = range(count)
    return array


def frame(seed: int, gray: bool = True) -> np.ndarray:
    """Return a smooth picture, which survives JPEG nearly unchanged."""
    y, x = np.indices(SIZE)
    base = (60 + 5 * x + 3 * y + seed % 40).astype(np.uint8)
    return base if gray else np.stack([base, base // 2, base // 3], -1)


def save_frame(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, quality=95)


def save_palette(path: Path, indices: np.ndarray, colors=COLORS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("P", indices.shape[::-1])
    picture.putpalette([value for color in colors for value in color])
    picture.putdata(indices.ravel().tolist())
    picture.save(path)


def add(download: Path, part: str, sequence: str, images: int, masks: tuple[int, ...], count: int = 5) -> None:
    for i in range(images):
        seed = 100 * int(sequence[1:]) + i + (5 if part == "test" else 0)
        save_frame(download / part / "JPEGImages" / sequence / f"{i:05d}.jpg", frame(seed))
        if i in masks:
            save_palette(download / part / "Annotations_Semantic" / sequence / f"{i:05d}.png", classes(seed, count))
            instances = np.full(SIZE, 9, np.uint8)  # must never be read
            save_palette(download / part / "Annotations" / sequence / f"{i:05d}.png", instances)


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """Sequences v00 (train), v01 (val) of trainval and v00 of test; every second frame of trainval has a mask."""
    folder = tmp_path / "MOSXAV_Dataset"
    add(folder, "trainval", "v00", 4, (0, 2))
    add(folder, "trainval", "v01", 4, (0, 2))
    add(folder, "test", "v00", 2, (0, 1), count=6)
    sets = folder / "trainval" / "ImageSets"
    sets.mkdir()
    (sets / "train.txt").write_text("v00\n")
    (sets / "val.txt").write_text("v01\n")
    (folder / "test" / "ImageSets").mkdir()
    (folder / "test" / "ImageSets" / "test.txt").write_text("v00\n")
    return folder


@pytest.fixture
def convert(run, raw: Path, download: Path) -> Callable[..., tuple[int, str, str]]:
    return lambda *options: run(main, "MOSXAV", download, "-d", 60, *options)


@pytest.fixture
def refused(convert, raw: Path) -> Callable[[str], None]:
    def check(message: str) -> None:
        code, _, err = convert()
        assert code == 2
        assert message in err
        assert list(raw.glob("Dataset*")) == []

    return check


def dataset(raw: Path) -> RawDataset:
    return RawDataset.load(raw / "Dataset060_MOSXAV")


def label(data: RawDataset, folder: str, case: str) -> np.ndarray:
    return read_array(data.label_file(folder, case))[0][0, 0]


def test_sequences_of_both_parts_keep_their_names_apart_and_their_roles(convert, raw: Path):
    code, out, err = convert()
    assert code == 0
    assert "2 labeled, 0 unlabeled, 2 val, 2 test" in out
    data = dataset(raw)
    assert list(data.cases("imagesTr")) == ["tv_v00_00000", "tv_v00_00002"]
    assert list(data.cases("imagesVal")) == ["tv_v01_00000", "tv_v01_00002"]
    assert list(data.cases("imagesTs")) == ["te_v00_00000", "te_v00_00001"]
    assert data.patient("te_v00_00001") == "te_v00"
    assert "the whole release has 275" in err
    assert "frames of train have no mask in the download" in err
    assert "2 images without labels are left out; --with_unlabeled" in err


def test_grey_frames_become_one_channel_of_png(convert, download: Path, raw: Path):
    convert()
    data = dataset(raw)
    array, _ = read_array(data.cases("imagesTr")["tv_v00_00002"][0])
    assert array.shape == (1, 1, *SIZE)
    assert array.dtype == np.uint8
    with Image.open(download / "trainval/JPEGImages/v00/00002.jpg") as source:
        np.testing.assert_array_equal(array[0, 0], np.asarray(source))
    assert data.channel_names == {"0": "rgb_to_0_1"}
    assert data.file_ending == ".png"


def test_one_colored_frame_makes_all_of_them_rgb(convert, download: Path, raw: Path):
    save_frame(download / "test/JPEGImages/v00/00001.jpg", frame(1, gray=False))
    assert convert("--channels", "R", "G", "B")[0] == 0
    data = dataset(raw)
    for folder in ("imagesTr", "imagesVal", "imagesTs"):
        for paths in data.cases(folder).values():
            assert read_array(paths[0])[0].shape == (3, 1, *SIZE)
    assert data.channel_names == {"0": "R", "1": "G", "2": "B"}
    with Image.open(download / "test/JPEGImages/v00/00001.jpg") as source:
        written = read_array(data.cases("imagesTs")["te_v00_00001"][0])[0][:, 0]
        np.testing.assert_array_equal(written, np.asarray(source).transpose(2, 0, 1))


def test_number_of_channel_names_follows_the_frames(convert, raw: Path):
    code, _, err = convert("--channels", "R", "G", "B")
    assert code == 2
    assert "--channels names every channel; got 3; allowed 1" in err


def test_masks_are_the_semantic_ones_from_palette_grey_or_rgb(convert, download: Path, raw: Path):
    colors = np.array(COLORS, np.uint8)
    folder = download / "trainval/Annotations_Semantic"
    Image.fromarray(colors[classes(0)]).save(folder / "v00/00000.png")
    Image.fromarray(classes(102)).save(folder / "v01/00002.png")
    convert()
    data = dataset(raw)
    for role, case, seed in (
        ("imagesTr", "tv_v00_00000", 0),
        ("imagesTr", "tv_v00_00002", 2),
        ("imagesVal", "tv_v01_00002", 102),
    ):
        np.testing.assert_array_equal(label(data, role, case), classes(seed))
    assert label(data, "imagesTr", "tv_v00_00000").dtype == np.uint8


def test_others_of_the_test_masks_are_ignored_or_background(convert, run, raw: Path):
    convert()
    data = dataset(raw)
    assert data.json["labels"]["ignore"] == 5
    np.testing.assert_array_equal(label(data, "imagesTs", "te_v00_00000"), classes(5, 6))
    dropped = ["--labeled", "all", "--label_map", "1:1,2:2,3:3,4:4,5:0"]
    assert run(make_subset.main, "-d", 60, "-o", 61, "-n", "Background", *dropped)[0] == 0
    subset = RawDataset.load(raw / "Dataset061_Background")
    assert "ignore" not in subset.json["labels"]
    expected = np.where(classes(5, 6) == 5, 0, classes(5, 6))
    np.testing.assert_array_equal(label(subset, "imagesTs", "te_v00_00000"), expected)
    assert list(subset.cases("imagesVal")) == ["tv_v01_00000", "tv_v01_00002"]


def test_pool_holds_frames_without_masks_of_training_sequences_only(convert, raw: Path):
    code, out, err = convert("--with_unlabeled")
    assert code == 0
    assert list(dataset(raw).cases("imagesUn")) == ["tv_v00_00001", "tv_v00_00003"]
    assert "set aside" not in out + err
    assert "next: nnssl_plan_and_preprocess" in out


def test_unreadable_frame_of_the_pool_is_set_aside_and_a_labeled_one_refused(convert, refused, download, raw: Path):
    path = download / "trainval/JPEGImages/v00/00001.jpg"
    path.write_bytes(path.read_bytes()[:200])
    code, out, err = convert("--with_unlabeled")
    assert code == 0
    assert "set aside: tv_v00_00001: 00001.jpg: not readable" in err
    assert "1 set aside" in out
    assert "tv_v00_00001" in dataset(raw).nnssl["set_aside"]
    for folder in raw.iterdir():
        folder.rename(folder.parent.parent / "done")
    path.with_name("00000.jpg").write_bytes(b"")
    refused("every labeled and test image must be readable")


def test_pool_of_a_release_without_one_cannot_be_asked_for(convert, download: Path, raw: Path):
    for i in (1, 3):
        (download / f"trainval/JPEGImages/v00/{i:05d}.jpg").unlink()
    code, _, err = convert("--with_unlabeled")
    assert code == 2
    assert "--with_unlabeled needs images without labels" in err
    assert list(raw.glob("Dataset*")) == []


def test_image_sets_count_and_their_absence_is_a_warning(convert, download: Path, raw: Path):
    sets = download / "trainval/ImageSets"
    (sets / "train.txt").write_text("v01\n")
    (sets / "val.txt").write_text("v00\n")
    assert "have a mask unpublished" in convert()[2]
    assert list(dataset(raw).cases("imagesTr")) == ["tv_v01_00000", "tv_v01_00002"]


def test_without_image_sets_the_published_sequences_decide(convert, download: Path, raw: Path):
    for name in ("train.txt", "val.txt"):
        (download / "trainval/ImageSets" / name).unlink()
    add(download, "trainval", "v77", 1, (0,))
    _, out, err = convert()
    assert err.count("published lists") == 2
    assert "sequences in neither train nor val are left out: tv_v77" in err
    assert "2 labeled, 0 unlabeled, 2 val, 2 test" in out


def test_a_sequence_in_train_and_val_is_refused(refused, download: Path):
    (download / "trainval/ImageSets/val.txt").write_text("v00\nv01\n")
    refused("a sequence has one role")


def test_a_mask_without_its_frame_is_refused(refused, download: Path):
    (download / "trainval/JPEGImages/v00/00002.jpg").unlink()
    refused("every mask has its frame")


def test_training_sequences_without_masks_are_refused(refused, download: Path):
    (download / "trainval/ImageSets/train.txt").write_text("v05\n")
    refused("the training sequences have masks")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full(SIZE, 6, np.uint8), "values 6; 0 to 5"),
        (np.full((*SIZE, 3), 1, np.uint8), "the color (1, 1, 1) is that of no class"),
        (np.zeros((*SIZE, 4), np.uint8), "kind RGBA"),
    ],
)
def test_masks_with_other_values_are_refused(refused, download: Path, mask: np.ndarray, message: str):
    Image.fromarray(mask).save(download / "trainval/Annotations_Semantic/v00/00000.png")
    refused(message)


def test_a_palette_in_another_order_than_the_classes_is_refused(refused, download: Path):
    order = (COLORS[0], *COLORS[:0:-1])
    save_palette(download / "trainval/Annotations_Semantic/v00/00000.png", classes(0), order)
    refused("index 1 has the color of class 5")


def test_published_frames_lie_in_sequences_of_one_role():
    published = load_published("mosxav.json")
    roles = [published[role] for role in ("train", "val", "test")]
    assert [len(role) for role in roles] == [18, 12, 12]
    assert sorted(published["frames"]) == sorted(name for role in roles for name in role)
    assert [sum(len(published["frames"][name]) for name in role) for role in roles] == [275, 197, 488]
