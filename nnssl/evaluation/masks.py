"""Read masks with their geometry and match the files of a reference and a prediction folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnssl.errors import UserError

#: Formats that carry a geometry, and images that do not: their spacing counts as one pixel.
VOLUME_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl")
IMAGE_ENDINGS = (".png", ".bmp")
#: Headers store float32 and rotations as quaternions; larger differences are other grids.
SPACING_TOLERANCE = 1e-4  # relative
DIRECTION_TOLERANCE = 1e-3
ORIGIN_TOLERANCE = 0.05  # in units of the finest spacing


@dataclass(frozen=True)
class Mask:
    """A label map on its grid.

    Args:
        array: integer labels, axes in array order (z, y, x).
        spacing: voxel size in mm in array order (pixels where ``has_spacing`` is False).
        size, origin, direction: as SimpleITK reports them (x, y, z).
        has_spacing: whether the file format stores a geometry.
    """

    array: np.ndarray
    spacing: tuple[float, ...]
    size: tuple[int, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]
    has_spacing: bool


def list_masks(folder: Path) -> dict[str, Path]:
    """Return ``{case: file}`` of the masks in a folder; other files (json, npz, pkl) are skipped.

    Raises:
        UserError: if the folder is absent, holds no mask, or holds two files of one case.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("a folder of masks must exist", folder, None, "check the path")
    endings = VOLUME_ENDINGS + IMAGE_ENDINGS
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        ending = next((e for e in endings if path.name.endswith(e)), None)
        if ending is None or path.name.startswith(".") or not path.is_file():
            continue
        case = path.name[: -len(ending)]
        if case in found:
            got = f"{found[case].name} and {path.name} in {folder}"
            raise UserError("a folder must hold one mask per case", got, None, "move one of them away")
        found[case] = path
    if not found:
        raise UserError("a folder must hold masks", f"none in {folder}", ", ".join(endings), "check the path")
    return found


def match_masks(reference: Path, prediction: Path) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    """Match two folders by case name.

    Returns:
        ``{case: (reference file, prediction file)}`` and the predicted cases that have no reference.

    Raises:
        UserError: if a reference has no prediction.
    """
    references, predictions = list_masks(reference), list_masks(prediction)
    missing = [case for case in references if case not in predictions]
    if missing:
        got = f"none in {prediction} for {_some(missing)}"
        raise UserError("every reference needs a prediction of the same name", got, None, "predict these cases as well")
    pairs = {case: (path, predictions[case]) for case, path in references.items()}
    return pairs, [case for case in predictions if case not in references]


def read_mask(path: Path) -> Mask:
    """Read a label map.

    Raises:
        UserError: if the file can't be read, is no single-channel 2D or 3D image, or holds other than integers.
    """
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise UserError("a mask must be a readable image", path, None, "write the file again") from error
    if image.GetNumberOfComponentsPerPixel() != 1 or image.GetDimension() not in (2, 3):
        got = f"{path} with {image.GetDimension()} axes and {image.GetNumberOfComponentsPerPixel()} channels"
        raise UserError("a mask must have one channel and two or three axes", got, None, "save the labels alone")
    array = sitk.GetArrayFromImage(image)
    if not np.issubdtype(array.dtype, np.integer):
        if not np.array_equal(array, np.rint(array)):
            raise UserError(
                "a mask must hold integer labels", f"other values in {path}", None, "save labels, not scores"
            )
        array = array.astype(np.int64)
    has_spacing = not path.name.endswith(IMAGE_ENDINGS)
    spacing = tuple(image.GetSpacing()) if has_spacing else (1.0,) * image.GetDimension()
    return Mask(array, spacing[::-1], image.GetSize(), image.GetOrigin(), image.GetDirection(), has_spacing)


def require_same_geometry(case: str, reference: Mask, prediction: Mask) -> None:
    """Refuse a prediction that lies on another grid than its reference.

    Raises:
        UserError: naming what differs: size, spacing, origin or direction.
    """
    for name, same in _comparisons(reference, prediction):
        if not same:
            mine, theirs = (getattr(mask, name) for mask in (reference, prediction))
            got = f"{case}: {name} {_short(mine)} in the reference, {_short(theirs)} in the prediction"
            remedy = "predict on the reference's own grid, or resample"
            raise UserError("reference and prediction must lie on the same grid", got, None, remedy)


def _comparisons(reference: Mask, prediction: Mask):
    yield "size", reference.size == prediction.size
    if reference.has_spacing and prediction.has_spacing:
        yield "spacing", np.allclose(reference.spacing, prediction.spacing, rtol=SPACING_TOLERANCE, atol=0)
        slack = ORIGIN_TOLERANCE * min(reference.spacing)
        yield "origin", np.allclose(reference.origin, prediction.origin, rtol=0, atol=slack)
        yield "direction", np.allclose(reference.direction, prediction.direction, rtol=0, atol=DIRECTION_TOLERANCE)


def _short(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.6g}" for v in values) + ")"


def _some(names: list[str], count: int = 10) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
