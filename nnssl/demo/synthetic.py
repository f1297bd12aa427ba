"""Invented scans for the demonstration: seeded, small, with real-looking difficulty. Loads no torch.

The scene resembles a cardiac short-axis stack but is no anatomy: a muscular ring (class 2) around a cavity (class 1),
with a crescent (class 3) leaning on one side. Size, position, shape, rotation and taper along the stack vary between
cases. Three scanner styles differ in contrast, bias field, blur and noise. Structures of the same intensity that are
no target (small rings, vessels, blobs) make appearance alone a poor guide, so that a handful of labeled cases does
not cover what the test cases show.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK
from scipy.ndimage import gaussian_filter

#: Foreground classes: label value -> name.
CLASSES = {1: "cavity", 2: "muscle", 3: "crescent"}
#: Cases per split. The unlabeled cases never had a mask on disk.
SPLITS = {"labeled": 3, "unlabeled": 40, "test": 12}
#: Voxels of a scan (z, y, x).
SHAPE = (8, 64, 64)
#: Voxel size in mm (z, y, x).
SPACING = (8.0, 1.5, 1.5)
#: Mask folder of a split of images; None: no mask is written.
MASK_FOLDERS = {"labeled": "masks", "unlabeled": None, "test": "test_masks"}


@dataclass(frozen=True)
class Style:
    """How a scanner shows the scene.

    Args:
        name: name of the style.
        cavity, muscle, crescent, body, fat, lung: mean intensity of a tissue (arbitrary units, 0 to 1).
        texture: amplitude of the tissue texture, same units.
        bias: amplitude of the logarithm of the multiplicative bias field.
        blur: standard deviation of the in-plane point spread, pixels.
        noise: standard deviation of the Rician noise's two channels, intensity units.
        gain: intensity units -> stored integers.
    """

    name: str
    cavity: float
    muscle: float
    crescent: float
    body: float
    fat: float
    lung: float
    texture: float
    bias: float
    blur: float
    noise: float
    gain: float


STYLES = (
    Style("bright-blood", 0.95, 0.42, 0.90, 0.55, 0.80, 0.08, 0.05, 0.20, 0.6, 0.05, 900.0),
    Style("low-contrast", 0.80, 0.50, 0.77, 0.60, 0.68, 0.15, 0.05, 0.35, 0.9, 0.06, 400.0),
    Style("dark-muscle", 0.58, 0.22, 0.54, 0.46, 0.95, 0.05, 0.07, 0.30, 0.7, 0.09, 2200.0),
)


@dataclass(frozen=True)
class SyntheticCase:
    """One invented scan.

    Args:
        image: int16 (z, y, x).
        label: uint8 (z, y, x), values 0 and the keys of :data:`CLASSES`.
        style: name of the scanner style.
        origin: position of the first voxel in mm (x, y, z).
        angle: rotation of the slice plane about z in radians.
    """

    image: np.ndarray = field(repr=False)
    label: np.ndarray = field(repr=False)
    style: str
    origin: tuple[float, float, float]
    angle: float


def make_case(seed: int, index: int, shape: tuple[int, int, int] = SHAPE) -> SyntheticCase:
    """Draw case ``index`` of the data set ``seed``; the same arguments give the same voxels.

    The styles take turns, so every run of three cases holds each style once.

    Args:
        seed: seed of the data set, >= 0.
        index: number of the case in the data set, >= 0.
        shape: voxels (z, y, x).
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    style = STYLES[(seed + index) % len(STYLES)]
    label, center = _draw_targets(rng, shape)
    clean = _paint(rng, style, label, center)
    image = _scan(rng, style, clean)
    x, y, z = (float(v) for v in rng.uniform(-80, 80, 3).round(2))
    return SyntheticCase(image, label, style.name, (x, y, z), float(rng.uniform(-0.3, 0.3)))


def write_dataset(
    folder: Path, seed: int, splits: dict[str, int] | None = None, shape: tuple[int, int, int] = SHAPE
) -> dict[str, dict[str, str]]:
    """Write plain NIfTI folders: ``labeled/ masks/ unlabeled/ test/ test_masks/``.

    Args:
        folder: created when absent.
        seed: seed of the data set.
        splits: number of cases per split, default :data:`SPLITS`.
        shape: voxels of a scan (z, y, x).

    Returns:
        ``{split: {case id: style}}``.
    """
    written: dict[str, dict[str, str]] = {}
    index = 0
    for split, count in (SPLITS if splits is None else splits).items():
        masks = MASK_FOLDERS[split]
        (folder / split).mkdir(parents=True, exist_ok=True)
        if masks:
            (folder / masks).mkdir(parents=True, exist_ok=True)
        written[split] = {}
        for _ in range(count):
            case, name = make_case(seed, index, shape), f"scan_{index + 1:03d}"
            _write(case, case.image, folder / split / f"{name}.nii.gz")
            if masks:
                _write(case, case.label, folder / masks / f"{name}.nii.gz")
            written[split][name] = case.style
            index += 1
    return written


def _write(case: SyntheticCase, array: np.ndarray, path: Path) -> None:
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    image.SetOrigin(case.origin)
    cos, sin = float(np.cos(case.angle)), float(np.sin(case.angle))
    image.SetDirection((cos, -sin, 0.0, sin, cos, 0.0, 0.0, 0.0, 1.0))
    SimpleITK.WriteImage(image, str(path), useCompression=True)


def _grid(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return pixel coordinates (y, x) from the middle of a slice, in units of half its shorter side."""
    ny, nx = shape[1:]
    half = min(ny, nx) / 2
    return np.meshgrid((np.arange(ny) - (ny - 1) / 2) / half, (np.arange(nx) - (nx - 1) / 2) / half, indexing="ij")


def _draw_targets(rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw the label map and the in-plane center of the ring per slice (z, 2)."""
    y, x = _grid(shape)
    depth = shape[0]
    radius, wall = rng.uniform(0.26, 0.44), rng.uniform(0.09, 0.15)
    thickness, half_width = rng.uniform(0.13, 0.26), rng.uniform(0.9, 1.4)
    towards, tilt, flattening = rng.uniform(0.6, 2.5) * np.pi, rng.uniform(0, np.pi), rng.uniform(0.82, 1.0)
    waves = [(k, rng.normal(0, 0.05 / k), rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4)]
    uneven, uneven_at = rng.uniform(0, 0.3), rng.uniform(0, 2 * np.pi)
    start, drift = rng.uniform(-0.2, 0.2, 2), rng.normal(0, 0.015, 2)
    apex, reach = rng.uniform(depth - 1.5, depth + 1.5), rng.uniform(0.25, 0.5)
    label = np.zeros(shape, np.uint8)
    center = start + np.arange(depth)[:, None] * drift
    for z in range(depth):
        taper = np.sqrt(max(0.0, 1 - (z / apex) ** 2)) if z < apex else 0.0
        dy, dx = y - center[z, 0], x - center[z, 1]
        along, across = dx * np.cos(tilt) + dy * np.sin(tilt), (dy * np.cos(tilt) - dx * np.sin(tilt)) / flattening
        r, angle = np.hypot(along, across), np.arctan2(dy, dx)
        outer = radius * (reach + (1 - reach) * taper) * (1 + sum(a * np.cos(k * angle + p) for k, a, p in waves))
        outer = outer if taper > 0 else np.zeros_like(outer)
        inner = outer - wall * (1 + uneven * np.cos(angle - uneven_at))
        away = np.angle(np.exp(1j * (angle - towards - 0.03 * z))) / half_width
        lean = thickness * taper * np.where(np.abs(away) < 1, np.cos(np.pi / 2 * np.clip(away, -1, 1)) ** 0.7, 0)
        label[z][(r >= outer) & (r < outer + lean)] = 3
        label[z][r < outer] = 2
        label[z][r < inner] = 1
    return label, center


def _paint(rng: np.random.Generator, style: Style, label: np.ndarray, center: np.ndarray) -> np.ndarray:
    """Fill body, lungs, distractors and targets with the style's tissue intensities."""
    shape = label.shape
    y, x = _grid(shape)
    body = rng.uniform(0.85, 1.05, 2)
    outline = np.hypot(y / body[0], x / body[1])
    lungs = [(rng.uniform(-0.3, 0.3), side * rng.uniform(0.75, 0.95), *rng.uniform(0.25, 0.5, 2)) for side in (-1, 1)]
    plane = np.where(outline < 1, style.body, 0.02)
    plane[(outline > 0.9) & (outline < 1)] = style.fat
    for cy, cx, ry, rx in lungs:
        plane[(np.hypot((y - cy) / ry, (x - cx) / rx) < 1) & (outline < 0.9)] = style.lung
    volume = np.repeat(plane[None], shape[0], axis=0)
    _add_distractors(rng, style, volume, center)
    volume += style.texture * _field(rng, shape, (0.8, 2.5, 2.5))
    for value, name in CLASSES.items():
        inside = label == value
        tissue = getattr(style, name) * rng.normal(1, 0.05)
        volume[inside] = tissue + 0.6 * style.texture * _field(rng, shape, (0.8, 1.5, 1.5))[inside]
    return volume


def _add_distractors(rng: np.random.Generator, style: Style, volume: np.ndarray, center: np.ndarray) -> None:
    """Add structures that look like the targets but are none: vessels, small rings, blobs of muscle."""
    y, x = _grid(volume.shape)
    kinds = ["vessel"] * rng.integers(1, 4) + ["ring"] * rng.integers(0, 3) + ["blob"] * rng.integers(1, 3)
    for kind in kinds:
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.45, 0.8)
        size, stretch, turn = rng.uniform(0.09, 0.2), rng.uniform(0.6, 1.0), rng.uniform(0, np.pi)
        first, drift = rng.integers(0, 3), rng.normal(0, 0.02, 2)
        for z in range(first, volume.shape[0]):
            cy = center[z, 0] + distance * np.sin(angle) + drift[0] * z
            cx = center[z, 1] + distance * np.cos(angle) + drift[1] * z
            dy, dx = y - cy, x - cx
            r = np.hypot(dx * np.cos(turn) + dy * np.sin(turn), (dy * np.cos(turn) - dx * np.sin(turn)) / stretch)
            volume[z][r < size] = style.cavity if kind == "vessel" else style.muscle
            if kind == "ring":
                volume[z][r < 0.5 * size] = style.crescent


def _field(rng: np.random.Generator, shape: tuple[int, ...], sigma: tuple[float, ...]) -> np.ndarray:
    """Return smooth noise of unit standard deviation."""
    noise = gaussian_filter(rng.standard_normal(shape), sigma)
    return noise / max(float(noise.std()), 1e-12)


def _scan(rng: np.random.Generator, style: Style, clean: np.ndarray) -> np.ndarray:
    """Apply point spread, bias field and Rician noise, and round to int16."""
    image = gaussian_filter(clean, (0, style.blur, style.blur))
    reach = clean.shape[1] / 3
    image = image * np.exp(style.bias * _field(rng, clean.shape, (4, reach, reach)).clip(-2, 2))
    real, imaginary = style.noise * rng.standard_normal((2, *clean.shape))
    gain = style.gain * rng.uniform(0.8, 1.25)
    return np.rint(np.hypot(image + real, imaginary) * gain).clip(0, 32767).astype(np.int16)
