"""Multi-Object Segmentation in X-ray Angiography Videos: coronary vessels, catheters and balloons, frame by frame."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnssl.dataset_conversion.base import Case, Converter, Source
from nnssl.dataset_conversion.pictures import as_image, is_grey, load_picture, read_grey, read_rgb
from nnssl.dataset_conversion.published import load_published
from nnssl.errors import UserError
from nnssl.imageio import ImageReadError
from nnssl.plans.verify import listed

#: Colors of the values 0 to 5 in masks that are stored as RGB.
COLORS = ((0, 0, 0), (85, 170, 255), (170, 255, 0), (249, 193, 0), (255, 0, 0), (244, 108, 59))
_MASKS = "Annotations_Semantic"  # Annotations/ beside it numbers the instances of the video task: no classes
_PREFIX = {"trainval": "tv", "test": "te"}  # both parts call their sequences v00, v01, ...
_ROLES = {"train": "imagesTr", "val": "imagesVal", "test": "imagesTs"}
_ENDINGS = (".jpg", ".jpeg", ".png")


class MOSXAV(Converter):
    """Frames with a semantic mask; a sequence has one role."""

    NAME = "MOSXAV"
    TITLE = "Multi-Object Segmentation in X-ray Angiography Videos: vessel, two kinds of catheter, balloon"
    LICENCE = "CC BY-NC-SA 4.0"
    SOURCE_URL = "https://github.com/xilin-x/MOSXAV"
    LAYOUTS = {
        "frames": "trainval/JPEGImages/vNN/NNNNN.jpg with trainval/Annotations_Semantic/vNN/NNNNN.png, "
        "trainval/ImageSets/train.txt and val.txt [and test/]"
    }
    EXPECTED = {"frames": {"imagesTr": 275, "imagesVal": 197, "imagesTs": 488}}
    CHANNELS = {"0": "rgb_to_0_1"}  # of grey frames
    # 5 (others) occurs in test masks only: no method can learn it
    LABELS = {"background": 0, "vessel": 1, "contrast_catheter": 2, "catheter": 3, "balloon": 4, "ignore": 5}
    FILE_ENDING = ".png"
    PATIENT_PATTERN = r"^(t[ve]_[^_]+)_"
    PUBLISHED = "mosxav.json"
    PAGE = "mosxav"

    def detect(self, source: Path) -> str | None:
        return "frames" if _root(source) else None

    def cases(self, source: Path, layout: str) -> Iterator[Case]:
        frames = _frames(_root(source) or source)
        _compare_with_published(frames)
        read = read_grey if all(_is_grey(frame.image) for frame in frames) else read_rgb
        for frame in frames:
            mask = Source(frame.mask, read_mask) if frame.mask else None
            yield Case(frame.name, (Source(frame.image, read),), mask, frame.folder)

    def channels(self, cases: list[Case]) -> dict[str, str]:
        colored = cases[0].images[0].read is read_rgb
        return {str(i): "rgb_to_0_1" for i in range(3)} if colored else dict(self.CHANNELS)


class Frame(NamedTuple):
    """One frame of a sequence, its mask if it has one, and the folder it goes to."""

    name: str
    image: Path
    mask: Path | None
    folder: str


def read_mask(path: Path) -> Any:
    """Read a semantic mask as classes: the indices of a palette or grey picture, or the published colors of RGB.

    Raises:
        ImageReadError: if an index, or a color, is no class.
    """
    picture = load_picture(path)
    pixels = np.asarray(picture)
    if picture.mode == "RGB":
        return as_image(_classes_of_colors(pixels))
    if picture.mode not in ("P", "L"):
        raise ImageReadError(f"a picture of kind {picture.mode}; a palette, grey or RGB is expected")
    if odd := sorted(set(np.unique(pixels).tolist()) - set(range(len(COLORS)))):
        raise ImageReadError(f"values {listed(odd)}; 0 to 5 are expected")
    if picture.mode == "P":
        _check_palette(picture.getpalette() or [], np.unique(pixels).tolist())
    return as_image(pixels)


def _check_palette(palette: list[int], indices: list[int]) -> None:
    """Refuse a palette that shows an index in the published color of another class: its indices are no class ids."""
    for index in indices:
        shown = tuple(palette[3 * index : 3 * index + 3])
        if shown in COLORS[1:] and COLORS.index(shown) != index:
            raise ImageReadError(f"index {index} has the color of class {COLORS.index(shown)}")


def _classes_of_colors(pixels: np.ndarray) -> np.ndarray:
    classes = np.full(pixels.shape[:2], len(COLORS), np.uint8)
    for value, color in enumerate(COLORS):
        classes[(pixels == color).all(-1)] = value
    if (unknown := classes == len(COLORS)).any():
        raise ImageReadError(f"the color {tuple(pixels[unknown][0].tolist())} is that of no class")
    return classes


def _root(source: Path) -> Path | None:
    return next((p for p in (source, *sorted(source.glob("*"))) if (p / "trainval" / _MASKS).is_dir()), None)


def _frames(root: Path) -> list[Frame]:
    """Return the frames that have a role: with a mask, of the test part, or without a mask in a training sequence."""
    roles = _roles_of_trainval(root)
    frames: list[Frame] = []
    for part, prefix in _PREFIX.items():
        for sequence in sorted({p.name for p in (root / part).glob("JPEGImages/*") if p.is_dir()}):
            images = {p.stem: p for p in _pictures(root / part / "JPEGImages" / sequence)}
            masks = {p.stem: p for p in _pictures(root / part / _MASKS / sequence)}
            if lonely := sorted(masks.keys() - images.keys()):
                got = f"none for {part}/{_MASKS}/{sequence}: {listed(lonely)}"
                raise UserError("every mask has its frame", got, None, "download the release again")
            name = f"{prefix}_{sequence}"
            role = "test" if part == "test" else roles.get(name)
            for stem, image in images.items():
                folder = _ROLES[role] if role else None
                if role == "train" and stem not in masks:
                    folder = "imagesUn"
                if folder and (stem in masks or role != "val"):  # the patient of an unlabeled val frame is held out
                    frames.append(Frame(f"{name}_{stem}", image, masks.get(stem), folder))
    if not any(frame.folder == "imagesTr" for frame in frames):
        remedy = "download the release again, or mend trainval/ImageSets/train.txt"
        raise UserError("the training sequences have masks", f"none in {root / 'trainval' / _MASKS}", None, remedy)
    return frames


def _roles_of_trainval(root: Path) -> dict[str, str]:
    """Return sequence -> train or val, from ImageSets, or from the published lists where that is missing."""
    published = load_published("mosxav.json")
    roles: dict[str, str] = {}
    for role in ("train", "val"):
        path = root / "trainval" / "ImageSets" / f"{role}.txt"
        if path.is_file():
            lines = path.read_text(encoding="utf-8").split()
            names = sorted({f"tv_{line.partition('/')[0]}" for line in lines})
        else:
            warnings.warn(f"no {path}: the sequences of {role} are taken from the published lists", stacklevel=2)
            names = published[role]
        if both := sorted(set(names) & roles.keys()):
            raise UserError("a sequence has one role", f"in train and val: {listed(both)}", None, "mend ImageSets")
        roles |= dict.fromkeys(names, role)
    present = {f"tv_{p.name}" for p in (root / "trainval" / "JPEGImages").glob("*") if p.is_dir()}
    if without := sorted(present - roles.keys()):
        warnings.warn(f"sequences in neither train nor val are left out: {listed(without)}", stacklevel=2)
    return roles


def _compare_with_published(frames: list[Frame]) -> None:
    """Warn where the labeled frames are not those of the published lists."""
    published = load_published("mosxav.json")
    for role, folder in _ROLES.items():
        found = {frame.name for frame in frames if frame.folder == folder and frame.mask}
        expected = {f"{name}_{number:05d}" for name in published[role] for number in published["frames"][name]}
        differences = {"have no mask in the download": expected - found, "have a mask unpublished": found - expected}
        for what, names in differences.items():
            if found and names:
                listing = listed(sorted(names), 3)
                warnings.warn(f"{len(names)} frames of {role} {what}; the files count: {listing}", stacklevel=2)


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if p.suffix.lower() in _ENDINGS and not p.name.startswith("."))


def _is_grey(path: Path) -> bool:
    """Whether a frame is grey; one that cannot be read has no say, and is reported when it is written."""
    try:
        return is_grey(path)
    except ImageReadError:
        return True
