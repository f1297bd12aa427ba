"""Read masks with their geometry and match the files of a reference and a prediction folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnssl.errors import UserError
from nnssl.imageio import ENDINGS, Geometry, ImageReadError, read_array, split_ending


@dataclass(frozen=True)
class Mask:
    """A label map on its grid.

    Args:
        array: integer labels, axes in array order ((z, )y, x).
        geometry: the grid, in the order x, y(, z).
        has_spacing: whether the file format stores a spacing; a PNG counts in pixels.
    """

    array: np.ndarray
    geometry: Geometry
    has_spacing: bool

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size in mm in array order (pixels where ``has_spacing`` is False)."""
        return self.geometry.spacing[::-1]


def list_masks(folder: Path) -> dict[str, Path]:
    """Return ``{case: file}`` of the masks in a folder; other files (json, npz, pkl) are skipped.

    Raises:
        UserError: if the folder is absent, holds no mask, or holds two files of one case.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("a folder of masks must exist", folder, None, "check the path")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        case, ending = split_ending(path.name)
        if not ending or path.name.startswith(".") or not path.is_file():
            continue
        if case in found:
            got = f"{found[case].name} and {path.name} in {folder}"
            raise UserError("a folder must hold one mask per case", got, None, "move one of them away")
        found[case] = path
    if not found:
        raise UserError("a folder must hold masks", f"none in {folder}", ", ".join(ENDINGS), "check the path")
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
        UserError: if the file can't be read, has several channels, or holds other than integers.
    """
    try:
        array, geometry = read_array(path)
    except ImageReadError as error:
        raise UserError("a mask must be a readable image", f"{path}: {error}", None, "write the file again") from error
    if len(array) != 1:
        got = f"{len(array)} channels or time points in {path}"
        raise UserError("a mask must have one channel", got, None, "save the labels alone")
    if not np.issubdtype(array.dtype, np.integer):
        if not np.array_equal(array, np.rint(array)):
            raise UserError("a mask must hold integer labels", f"others in {path}", None, "save labels, not scores")
        array = array.astype(np.int64)
    array = array[0, 0] if len(geometry.size) == 2 else array[0]
    return Mask(array, geometry, not path.name.lower().endswith(".png"))


def require_same_geometry(case: str, reference: Mask, prediction: Mask) -> None:
    """Refuse a prediction that lies on another grid than its reference.

    Raises:
        UserError: naming what differs: size, spacing, origin or direction.
    """
    difference = reference.geometry.difference(prediction.geometry)
    if difference is not None:
        got = f"{case}: {difference} (reference and prediction)"
        remedy = "predict on the reference's own grid, or resample"
        raise UserError("reference and prediction must lie on the same grid", got, None, remedy)


def _some(names: list[str], count: int = 10) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
