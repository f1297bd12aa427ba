"""Endoscapes2023: anatomy and tools in frames of laparoscopic gallbladder surgery."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.dataset_conversion.base import Case, Converter, Source
from nnssl.dataset_conversion.pictures import as_image, load_pixels, read_rgb
from nnssl.dataset_conversion.published import load_published
from nnssl.errors import UserError
from nnssl.imageio import ImageReadError
from nnssl.plans.verify import listed

_ROLES = {"train": "imagesTr", "val": "imagesVal", "test": "imagesTs"}
_COCO, _NAMES = "annotation_coco.json", "seg_label_map.txt"
_UNCERTAIN = (7, 255)  # 255: the annotators were not sure; 7 stands for no class and occurs in one frame
_FRAME = re.compile(r"(\d+)_\d+")


class Endoscapes2023(Converter):
    """Seg50 with its masks; the other frames of BBox201's training videos are the unlabeled pool."""

    NAME = "Endoscapes2023"
    TITLE = "Endoscapes2023: hepatocystic anatomy and tools in laparoscopic cholecystectomy"
    LICENCE = "CC BY-NC-SA 4.0"
    SOURCE_URL = "https://github.com/CAMMA-public/Endoscapes"
    LAYOUTS = {
        "Seg50": "{train,val,test}_seg/annotation_coco.json with VIDEO_FRAME.jpg, semseg/VIDEO_FRAME.png, "
        "seg_label_map.txt and *_vids.txt [and train/annotation_coco.json]"
    }
    EXPECTED = {"Seg50": {"imagesTr": 343, "imagesVal": 76, "imagesTs": 74}}
    CHANNELS = {"0": "rgb_to_0_1", "1": "rgb_to_0_1", "2": "rgb_to_0_1"}
    LABELS = {
        "background": 0,
        "cystic_plate": 1,
        "calot_triangle": 2,
        "cystic_artery": 3,
        "cystic_duct": 4,
        "gallbladder": 5,
        "tool": 6,
        "ignore": 7,
    }
    FILE_ENDING = ".png"
    PATIENT_PATTERN = r"^(\d+)_"
    PUBLISHED = "endoscapes2023.json"
    PAGE = "endoscapes2023"

    def detect(self, source: Path) -> str | None:
        return "Seg50" if _root(source) else None

    def cases(self, source: Path, layout: str) -> Iterator[Case]:
        root = _root(source) or source
        read = partial(read_mask, classes=_classes_of_values(root, self.LABELS))
        frames = {role: _frames(root / f"{role}_seg") for role in _ROLES}
        videos = _videos_of_seg50(root, frames)
        without_mask = []
        for role, folder in _ROLES.items():
            for name in frames[role]:
                mask = root / "semseg" / f"{name}.png"
                if not mask.is_file():
                    without_mask.append(name)
                    continue
                image = Source(root / f"{role}_seg" / f"{name}.jpg", read_rgb)
                yield Case(name, (image,), Source(mask, read), folder)
        if without_mask:
            text = f"frames of {_COCO} without a mask in semseg are left out: {listed(without_mask)}"
            warnings.warn(text, stacklevel=2)
        yield from _pool(root, videos, {name for names in frames.values() for name in names})


def read_mask(path: Path, classes: tuple[int, ...]) -> Any:
    """Read a semantic mask: three equal channels of class ids, ``classes`` of which are written; 7 and 255 are ignored.

    Args:
        path: the mask.
        classes: class of the values 0, 1, ..., the label ``ignore`` last.

    Raises:
        ImageReadError: if the channels differ, or a value is no class.
    """
    pixels = load_pixels(path)
    if pixels.ndim == 3 and not (pixels == pixels[..., :1]).all():
        raise ImageReadError("the three channels of a mask differ")
    values = pixels if pixels.ndim == 2 else pixels[..., 0]
    ignore = len(classes) - 1
    if odd := sorted(set(np.unique(values).tolist()) - set(range(ignore)) - set(_UNCERTAIN)):
        raise ImageReadError(f"values {listed(odd)}; 0 to {ignore - 1} and 255 are expected")
    table = np.full(256, classes[-1], np.uint8)
    table[:ignore] = classes[:-1]
    return as_image(table[values])


def _root(source: Path) -> Path | None:
    folders = (source, *sorted(source.glob("*")))
    return next((p for p in folders if (p / "semseg").is_dir() and (p / "train_seg" / _COCO).is_file()), None)


def _classes_of_values(root: Path, labels: dict[str, int]) -> tuple[int, ...]:
    """Return the class of each value of a mask by the names in seg_label_map.txt, a line a value; ignore comes last.

    The ids of the COCO files begin at another class and are not used.
    """
    path = root / _NAMES
    names = [name for name in labels if name != "ignore"]
    if not path.is_file():
        warnings.warn(f"no {path}: the values of the masks are taken to be {', '.join(names)}", stacklevel=2)
        return tuple(labels.values())
    found = [line.strip().lower() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if sorted(found) != sorted(names):
        got = f"{listed(found)} in {path}"
        raise UserError(f"{_NAMES} names the classes, a line each", got, names, "download the release again")
    return (*(labels[name] for name in found), labels["ignore"])


def _frames(folder: Path) -> list[str]:
    """Return the frames of a COCO file; the folder itself holds many more, which have no annotation."""
    path = folder / _COCO
    try:
        names = [str(image["file_name"]) for image in json.loads(path.read_text(encoding="utf-8"))["images"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = f"{_COCO} lists its frames as images with a file_name"
        raise UserError(rule, f"{path}: {error!r}", None, "download the release again") from error
    stems = [Path(name).stem for name in names]
    if odd := [name for name, stem in zip(names, stems, strict=True) if not _FRAME.fullmatch(stem)]:
        raise UserError("a frame is named VIDEO_FRAME.jpg", f"{listed(odd)} in {path}", None, "download it again")
    return stems


def _videos_of_seg50(root: Path, frames: dict[str, list[str]]) -> dict[str, set[int]]:
    """Return role -> videos, from *_seg_vids.txt, or from the frames themselves where these are missing."""
    videos = _video_lists(root, "_seg_vids.txt")
    if not videos:
        warnings.warn(f"no *_seg_vids.txt in {root}: the frames of {_COCO} decide", stacklevel=2)
        videos = {role: set(map(_video, names)) for role, names in frames.items()}
        _require_disjoint(videos, f"*_seg/{_COCO}")
    for role, names in frames.items():
        _require_videos(f"{role}_seg", names, videos[role])
    return videos


def _video_lists(root: Path, ending: str) -> dict[str, set[int]]:
    """Return role -> videos from ``train``, ``val`` and ``test`` + ``ending``; empty if no file exists.

    Raises:
        UserError: if a file holds no numbers, one is missing beside the others, or a video has two roles.
    """
    paths = {role: root / f"{role}{ending}" for role in _ROLES}
    if not any(path.is_file() for path in paths.values()):
        return {}
    videos: dict[str, set[int]] = {}
    for role, path in paths.items():
        try:  # the release writes 4 as 4.000000000000000000e+00
            videos[role] = {int(float(word)) for word in path.read_text(encoding="utf-8").split()}
        except (OSError, ValueError, OverflowError) as error:
            rule = f"*{ending} lists the videos of train, val and test, a number a line"
            raise UserError(rule, f"{path}: {error}", None, "download the release again") from error
    _require_disjoint(videos, f"*{ending}")
    return videos


def _require_disjoint(videos: dict[str, set[int]], where: str) -> None:
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        if both := sorted(videos[one] & videos[other]):
            got = f"video {listed(both)} in {one} and {other} of {where}"
            raise UserError("a video has one role", got, None, "download the release again")


def _require_videos(folder: str, frames: list[str], videos: set[int]) -> None:
    """Refuse frames whose video the lists do not give to their split."""
    if wrong := [name for name in frames if _video(name) not in videos]:
        got = f"{listed(wrong)} in {folder}, but not their videos in {folder}_vids.txt"
        raise UserError("a frame belongs to the split of its video", got, None, "download the release again")


def _pool(root: Path, seg50: dict[str, set[int]], labeled: set[str]) -> Iterator[Case]:
    """Yield the frames of BBox201's training videos that have no mask and whose video is not held out."""
    if not (root / "train" / _COCO).is_file():
        return
    published = {role: set(map(int, load_published("endoscapes2023.json")[role])) for role in _ROLES}
    videos = _video_lists(root, "_vids.txt")
    if videos and videos != published:
        warnings.warn("*_vids.txt differ from the published ranges of videos; the files count", stacklevel=2)
    videos = videos or published
    _require_disjoint({role: videos[role] | seg50[role] for role in _ROLES}, "Seg50 and BBox201 together")
    frames = _frames(root / "train")
    _require_videos("train", frames, videos["train"])
    for name in frames:
        if name not in labeled:
            yield Case(name, (Source(root / "train" / f"{name}.jpg", read_rgb),), None, "imagesUn")


def _video(frame: str) -> int:
    return int(frame.partition("_")[0])
