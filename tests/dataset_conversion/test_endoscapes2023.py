"""nnssl_convert Endoscapes2023 on a tiny copy of the published layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nnssl.cli.convert import main
from nnssl.dataset_conversion import CONVERTERS
from nnssl.dataset_conversion.published import load_published
from nnssl.imageio import read_array
from nnssl.layout import RawDataset

SIZE = (8, 14)
NAMES = ["background", "cystic_plate", "calot_triangle", "cystic_artery", "cystic_duct", "gallbladder", "tool"]
#: Seg50's frames by split; videos 4, 126 and 165 are in the published lists of train, val and test.
SEG50 = {"train": ["4_100", "4_125", "9_50"], "val": ["126_75"], "test": ["165_25", "165_50"]}
#: Frames with boxes; those of Seg50 are among them.
BBOX = {"train": ["4_100", "4_125", "9_50", "9_80", "77_10"], "val": ["126_75", "130_5"], "test": ["165_25", "165_50"]}


def seed(name: str) -> int:
    return int(name.replace("_", ""))


def mask(name: str) -> np.ndarray:
    array = np.random.default_rng(seed(name)).integers(0, 7, SIZE).astype(np.uint8)
    array.flat[:8] = [*range(7), 255]
    return array


def save_frame(folder: Path, name: str) -> None:
    y, x = np.indices(SIZE)
    base = 40 + 5 * x + 3 * y + seed(name) % 47
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([base, base // 2, base // 3], -1).astype(np.uint8)).save(folder / f"{name}.jpg")


def save_mask(root: Path, name: str, values: np.ndarray) -> None:
    (root / "semseg").mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.repeat(values[..., None], 3, axis=-1)).save(root / "semseg" / f"{name}.png")


def save_coco(folder: Path, names: list[str]) -> None:
    """Write a COCO file; its category ids are not the values of the masks."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [{"id": i, "file_name": f"{name}.jpg", "width": 14, "height": 8} for i, name in enumerate(names)]
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES[1:])]
    (folder / "annotation_coco.json").write_text(json.dumps({"images": images, "categories": categories}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "download" / "endoscapes"
    for frames, ending in ((SEG50, "_seg"), (BBOX, "")):
        for role, names in frames.items():
            save_coco(folder / f"{role}{ending}", names)
            for name in [*names, f"{names[0][:-1]}9"]:  # the last one has no annotation
                save_frame(folder / f"{role}{ending}", name)
    for name in [name for names in SEG50.values() for name in names]:
        save_mask(folder, name, mask(name))
    published = load_published("endoscapes2023.json")
    for role, names in SEG50.items():
        videos = sorted({name.split("_")[0] for name in names})
        (folder / f"{role}_seg_vids.txt").write_text("".join(f"{int(v):.18e}\n" for v in videos))
        (folder / f"{role}_vids.txt").write_text("".join(f"{int(v):.18e}\n" for v in published[role]))
    (folder / "seg_label_map.txt").write_text("\n".join(NAMES) + "\n")
    return folder


@pytest.fixture
def convert(run, raw: Path, root: Path) -> Callable[..., tuple[int, str, str]]:
    return lambda *options: run(main, "Endoscapes2023", root.parent, "-d", 60, *options)


@pytest.fixture
def refused(convert, raw: Path) -> Callable[..., None]:
    def check(message: str, *options: str) -> None:
        code, _, err = convert(*options)
        assert code == 2
        assert message in err
        assert list(raw.glob("Dataset*")) == []

    return check


def dataset(raw: Path) -> RawDataset:
    return RawDataset.load(raw / "Dataset060_Endoscapes2023")


def label(data: RawDataset, folder: str, case: str) -> np.ndarray:
    return read_array(data.label_file(folder, case))[0][0, 0]


def test_seg50_takes_its_roles_and_nothing_that_has_no_annotation(convert, raw: Path):
    code, out, err = convert()
    assert code == 0
    assert "3 labeled, 0 unlabeled, 1 val, 2 test" in out
    data = dataset(raw)
    for folder, role in (("imagesTr", "train"), ("imagesVal", "val"), ("imagesTs", "test")):
        assert list(data.cases(folder)) == sorted(SEG50[role])
    assert data.patient("165_25") == "165"
    assert data.json["labels"] == CONVERTERS["Endoscapes2023"].LABELS
    assert "the whole release has 343" in err
    assert "2 images without labels are left out" in err
    assert "*_vids.txt" not in err


def test_frames_are_written_as_png_without_another_loss(convert, root: Path, raw: Path):
    convert()
    data = dataset(raw)
    array, _ = read_array(data.cases("imagesTr")["4_125"][0])
    assert (array.shape, array.dtype) == ((3, 1, *SIZE), np.uint8)
    with Image.open(root / "train_seg/4_125.jpg") as source:
        np.testing.assert_array_equal(array[:, 0], np.asarray(source).transpose(2, 0, 1))
    assert data.channel_names == {"0": "rgb_to_0_1", "1": "rgb_to_0_1", "2": "rgb_to_0_1"}


def test_uncertain_pixels_and_a_stray_7_are_ignored(convert, root: Path, raw: Path):
    values = mask("126_75")
    values[-1] = 7
    save_mask(root, "126_75", values)
    convert()
    data = dataset(raw)
    np.testing.assert_array_equal(label(data, "imagesVal", "126_75"), np.where(values == 255, 7, values))
    found = label(data, "imagesTr", "4_100")
    np.testing.assert_array_equal(found, np.where(mask("4_100") == 255, 7, mask("4_100")))
    assert found.dtype == np.uint8


def test_values_are_mapped_by_the_names_of_the_classes(convert, root: Path, raw: Path):
    order = [0, 6, 5, 4, 3, 2, 1]  # value 1 of a mask is now the tool
    (root / "seg_label_map.txt").write_text("\n".join(NAMES[i] for i in order) + "\n")
    convert()
    expected = np.array([*order, *[0] * 248, 7])[mask("4_100")]
    np.testing.assert_array_equal(label(dataset(raw), "imagesTr", "4_100"), expected)


def test_label_map_with_other_names_is_refused_and_a_missing_one_is_a_warning(convert, refused, root: Path, raw: Path):
    (root / "seg_label_map.txt").write_text("\n".join([*NAMES[:-1], "stapler"]))
    refused("seg_label_map.txt names the classes")
    (root / "seg_label_map.txt").unlink()
    code, _, err = convert()
    assert code == 0
    assert "taken to be background, cystic_plate" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: np.where(m == 3, 9, m), "values 9; 0 to 6 and 255"),
        (lambda m: np.stack([m, m, np.zeros_like(m)], -1), "three channels of a mask differ"),
    ],
)
def test_masks_that_hold_something_else_are_refused(refused, root: Path, change, message: str):
    values = change(mask("4_100")).astype(np.uint8)
    Image.fromarray(values).save(root / "semseg" / "4_100.png")
    refused(message)


def test_pool_is_the_rest_of_the_training_videos(convert, raw: Path):
    code, out, err = convert("--with_unlabeled")
    assert code == 0
    assert list(dataset(raw).cases("imagesUn")) == ["77_10", "9_80"]
    assert "set aside" not in out + err


def test_pool_never_holds_a_video_of_val_or_test(refused, root: Path):
    save_coco(root / "train", [*BBOX["train"], "126_999"])
    refused("126_999 in train, but not their videos in train_vids.txt", "--with_unlabeled")
    (root / "train_vids.txt").write_text("4\n9\n77\n126\n")
    (root / "val_vids.txt").write_text("130\n")
    refused("video 126 in train and val of Seg50 and BBox201 together", "--with_unlabeled")


def test_video_lists_of_the_download_count(convert, root: Path, raw: Path):
    (root / "train_vids.txt").write_text("4.0e+00\n9\n77\n500\n")
    assert "*_vids.txt differ from the published ranges" in convert("--with_unlabeled")[2]
    assert list(dataset(raw).cases("imagesUn")) == ["77_10", "9_80"]


def test_without_video_lists_frames_and_published_ranges_decide(convert, refused, root: Path, raw: Path):
    for path in root.glob("*_vids.txt"):
        path.unlink()
    save_coco(root / "val_seg", ["126_75", "9_50"])
    refused("video 9 in train and val of *_seg/annotation_coco.json")
    save_coco(root / "val_seg", ["126_75"])
    code, _, err = convert("--with_unlabeled")
    assert code == 0
    assert "no *_seg_vids.txt" in err
    assert list(dataset(raw).cases("imagesUn")) == ["77_10", "9_80"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("126\nnan", "a number a line"),
        ("4\n126", "video 4 in train and val of *_seg_vids.txt"),
        ("127", "126_75 in val_seg, but not their videos in val_seg_vids.txt"),
        (None, "a number a line"),
    ],
)
def test_video_lists_that_contradict_are_refused(refused, root: Path, text: str | None, message: str):
    path = root / "val_seg_vids.txt"
    path.unlink()
    if text is not None:
        path.write_text(text)
    refused(message)


def test_listed_frame_without_mask_is_a_warning_and_without_image_an_error(convert, refused, root: Path, raw: Path):
    (root / "train_seg/4_125.jpg").unlink()
    refused("4_125.jpg: file not found")
    (root / "semseg/4_125.png").unlink()
    code, out, err = convert()
    assert code == 0
    assert "without a mask in semseg are left out: 4_125" in err
    assert "2 labeled" in out


@pytest.mark.parametrize("text", ["{", "[]", '{"images": [{"id": 1}]}', '{"images": [{"file_name": "frame.jpg"}]}'])
def test_coco_file_of_another_form_is_refused(refused, root: Path, text: str):
    (root / "test_seg/annotation_coco.json").write_text(text)
    refused("annotation_coco.json")


def test_published_ranges_are_the_whole_of_bbox201():
    published = load_published("endoscapes2023.json")
    roles = [published[role] for role in ("train", "val", "test")]
    assert [len(role) for role in roles] == [120, 41, 40]
    assert sorted(int(name) for role in roles for name in role) == list(range(1, 202))
