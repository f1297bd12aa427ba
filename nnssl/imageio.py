"""Read and write the image formats of the raw data set. Loads no torch; SimpleITK and scikit-image on first use.

ITK reads a truncated ``.nii.gz`` without complaint, filling the rest with whatever lies in memory, and turns NaN voxels
of a NIfTI file into zeros. Every NIfTI file is therefore checked before ITK reads it.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import SimpleITK as sitk

#: File endings that can be read as one image; a folder is read as one DICOM series.
ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".png")
#: Begins what :func:`share_grid` says of a label that it has turned.
TURNED = "turned by its header"
_NIFTI_HEADER = 348  # bytes of a NIfTI-1 header; those of NIfTI-2 that matter here lie in the first 348 too
_BLOCK = 1 << 20  # bytes, a multiple of every voxel size


class ImageReadError(ValueError):
    """A file that is no complete, readable image; the message is one line without the path."""


@dataclass(frozen=True)
class Geometry:
    """The grid of an image.

    Args:
        size: voxels along x, y(, z).
        spacing: mm along x, y(, z).
        origin: mm, position of the first voxel.
        direction: row-major direction cosines.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @classmethod
    def of(cls, image: sitk.Image | sitk.ImageFileReader) -> Geometry:
        """Return the grid of an image, or of the file whose header a reader has read."""
        return cls(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    def difference(self, other: Geometry) -> str | None:
        """Name the first property in which two grids differ, or return None.

        Tolerances: spacing as nnU-Net's own check (1e-5 relative), origin 1 % of the finest spacing but at least
        1e-3 mm, direction cosines 1e-3.
        """
        tolerances = {"size": (0, 0), "spacing": (1e-5, 1e-8), "origin": (0, self.shift), "direction": (0, 1e-3)}
        for name, (rtol, atol) in tolerances.items():
            a, b = getattr(self, name), getattr(other, name)
            if a != b and (len(a) != len(b) or not np.allclose(a, b, rtol=rtol, atol=atol)):
                return f"{name} {_numbers(a)} and {_numbers(b)}"
        return None

    @property
    def shift(self) -> float:
        """Millimetres by which origins of one grid may differ."""
        return max(1e-3, 0.01 * min(self.spacing))

    def turned(self, other: Geometry) -> bool:
        """Whether directions differ."""
        mine, theirs = self.direction, other.direction
        return len(mine) != len(theirs) or not np.allclose(mine, theirs, rtol=0, atol=1e-3)

    def alike(self, other: Geometry) -> bool:
        """Whether sizes agree, and spacings up to 0.1 %."""
        return self.size == other.size and np.allclose(self.spacing, other.spacing, rtol=1e-3)

    def rounded(self) -> tuple:
        """Return the grid at a precision that every format keeps (NIfTI stores single precision)."""
        spacing, origin, direction = (
            [round(float(v), digits) + 0.0 for v in values]
            for values, digits in ((self.spacing, 4), (self.origin, 3), (self.direction, 3))
        )
        return list(self.size), spacing, origin, direction


def split_ending(name: str) -> tuple[str, str]:
    """Split a file name into stem and image ending; the ending is empty when it is no image's.

    The ending is returned as it stands in the name (``.NRRD`` stays ``.NRRD``).
    """
    for ending in ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)], name[-len(ending) :]
    return name, ""


def read_image(path: Path) -> sitk.Image:
    """Read one file, or one DICOM series folder, as a SimpleITK image.

    Raises:
        ImageReadError: if it is missing, truncated, no image, or a NIfTI file with NaN or infinite voxels.
    """
    import SimpleITK as sitk

    path = Path(path)
    if path.is_dir():
        return read_dicom_series(path)
    try:
        if not path.is_file():
            raise ImageReadError("file not found")
        if path.name.lower().endswith((".nii.gz", ".nii")):
            _check_nifti(path)
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise ImageReadError(_one_line(error)) from error


def check_image(path: Path) -> None:
    """Make sure that a file is a complete image, at the price of decoding it once.

    Raises:
        ImageReadError: as :func:`read_image`.
    """
    path = Path(path)
    if not path.is_file():
        raise ImageReadError("file not found")
    if path.name.lower().endswith((".nii.gz", ".nii")):
        _check_nifti(path)
    elif split_ending(path.name)[1]:  # formats of nnU-Net that are not known here are its own business
        read_array(path)


def read_array(path: Path) -> tuple[np.ndarray, Geometry]:
    """Read one file as nnU-Net does: channels first.

    Returns:
        The voxels (c, z, y, x) in the file's own type (z = 1 in 2D) and the grid. A time axis and RGB count as
        channels.
    """
    if str(path).lower().endswith(".png"):
        return _read_png(Path(path))
    import SimpleITK as sitk

    image = read_image(path)
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise ImageReadError(f"{image.GetNumberOfComponentsPerPixel()} values a voxel; one is supported")
    geometry = Geometry.of(image)
    array = sitk.GetArrayFromImage(image)
    if array.ndim == 4:
        return array, geometry
    return array[None] if array.ndim == 3 else array[None, None], geometry


def count_channels(path: Path) -> int:
    """Return the channels of one file as :func:`read_array` counts them; volumes are not decoded for it.

    Raises:
        ImageReadError: if it is no image.
    """
    if str(path).lower().endswith(".png"):
        return len(_read_png(Path(path))[0])
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ImageReadError(_one_line(error)) from error
    size = reader.GetSize()
    return int(size[3]) if len(size) == 4 else 1


def view(image: sitk.Image) -> np.ndarray:
    """Return the voxels of an image in memory as :func:`read_array` orders them, without a copy.

    Args:
        image: 2D or 3D, one value a voxel; it must outlive the result.
    """
    import SimpleITK as sitk

    array = sitk.GetArrayViewFromImage(image)
    return array[None] if array.ndim == 3 else array[None, None]


def write_image(image: sitk.Image, path: Path) -> None:
    """Write a SimpleITK image, compressed.

    Raises:
        OSError: if it cannot be written in full.
    """
    import SimpleITK as sitk

    try:
        sitk.WriteImage(image, str(path), useCompression=True)
    except RuntimeError as error:
        raise OSError(f"{path}: {_one_line(error)}") from error
    if path.name.endswith(".nii.gz"):
        _require_whole(image, path)


def _require_whole(image: sitk.Image, path: Path) -> None:
    """Compare the length that ends a gzip file with that of the voxels: a full disk may cut a file without an error.

    Raises:
        OSError: if the file is shorter than the voxels.
    """
    with path.open("rb") as file:
        file.seek(-4, 2)
        length = int.from_bytes(file.read(4), "little")
    voxels = image.GetNumberOfPixels() * image.GetNumberOfComponentsPerPixel() * image.GetSizeOfPixelComponent()
    if not 348 <= (length - voxels) % 2**32 < 2**16:  # what comes before the voxels: a header of 352 bytes, or more
        raise OSError(f"{path}: cut short")


def read_grid(path: Path) -> Geometry:
    """Return the grid of an image file from its header."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return Geometry.of(reader)


def share_grid(label: sitk.Image, grid: Geometry) -> tuple[sitk.Image, str | None]:
    """Put a label onto its image's grid, if size and spacing (0.1 %) agree, in a release where the two share voxels.

    A release says that label and image share their voxels, and headers that were lost on the way contradict it: the
    label takes over origin, direction and rounding of the spacing. But a label may have been stored with other axes and
    a header that says so. Then its voxels are turned, which shows in that they come to lie just on the image's. Any
    other direction can be believed only where it was evidently never set: with the origin at zero, or at the image's.

    Returns:
        the label, and what differed, or None if nothing had to be done or size or spacing differ.

    Raises:
        ImageReadError: if the label's header turns it to another place than the image's.
    """
    own = Geometry.of(label)
    difference = grid.difference(own)
    if difference is None:
        return label, None
    if not grid.turned(own):
        if not grid.alike(own):
            return label, None
        return _stamped(label, grid), f"{difference} (image, label)"
    directions = f"direction {_numbers(grid.direction)} and {_numbers(own.direction)} (image, label)"
    turned = turned_onto(label, grid)
    if turned is not label:
        return _stamped(turned, grid), f"{TURNED}: {directions}"
    if not grid.alike(own):
        return label, None
    if any(own.origin) and not np.allclose(own.origin, grid.origin, rtol=0, atol=grid.shift):
        raise ImageReadError(
            f"{directions}, and turned by them it lies beside the image: which voxels belong together?"
        )
    return _stamped(label, grid), directions


def turned_onto(label: sitk.Image, grid: Geometry) -> sitk.Image:
    """Return a label whose axes are swapped and flipped by its header, if it then lies on the grid; else as it is."""
    import SimpleITK as sitk

    if len(grid.size) != 3 or label.GetDimension() != 3 or not grid.turned(Geometry.of(label)):
        return label
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(grid.direction)
    turned = sitk.DICOMOrient(label, code)
    found = Geometry.of(turned)
    near = np.allclose(found.origin, grid.origin, rtol=0, atol=0.5 * min(grid.spacing))
    return turned if near and grid.alike(found) and not grid.turned(found) else label


def _stamped(label: sitk.Image, grid: Geometry) -> sitk.Image:
    label.SetSpacing(grid.spacing)
    label.SetOrigin(grid.origin)
    label.SetDirection(grid.direction)
    return label


def write_label(label: np.ndarray, like: sitk.Image | None, path: Path) -> None:
    """Write a label map in the smallest type that holds its values.

    Args:
        label: (z, y, x), non-negative integers.
        like: image whose grid it takes; None for PNG.
        path: target, ``.png`` or an ITK format.
    """
    small = label.astype(np.uint8 if label.max(initial=0) < 256 else np.uint16)
    if path.name.endswith(".png"):
        from skimage import io

        io.imsave(str(path), small[0], check_contrast=False)
        return
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(small[0] if like is not None and like.GetDimension() == 2 else small)
    if like is not None:
        image.CopyInformation(like)
    write_image(image, path)


def read_dicom_series(folder: Path) -> sitk.Image:
    """Read a folder that holds exactly one DICOM series.

    Raises:
        ImageReadError: on none or several series, an unreadable slice, or slices that are missing or doubled.
    """
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    series = reader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        found = f": {', '.join(series)}" if series else ""
        raise ImageReadError(f"one DICOM series a folder is expected, {len(series)} found{found}")
    files = reader.GetGDCMSeriesFileNames(str(folder), series[0])
    try:
        _check_slice_distances(files)
        reader.SetFileNames(files)
        return reader.Execute()
    except RuntimeError as error:
        raise ImageReadError(_one_line(error)) from error


def _check_slice_distances(files: tuple[str, ...]) -> None:
    """Refuse a series with a gap: ITK would spread the remaining slices evenly."""
    import SimpleITK as sitk

    positions = []
    for name in files:
        reader = sitk.ImageFileReader()
        reader.SetFileName(name)
        reader.ReadImageInformation()
        if not reader.HasMetaDataKey("0020|0032"):
            return  # a single-file or position-less series has no gaps to find
        positions.append([float(v) for v in reader.GetMetaData("0020|0032").split("\\")])
    steps = np.linalg.norm(np.diff(np.asarray(positions), axis=0), axis=1)
    if steps.size and np.ptp(steps) > 0.05 * np.median(steps):
        raise ImageReadError(f"slices are {steps.min():.4g} to {steps.max():.4g} mm apart: one is missing or doubled")


def _read_png(path: Path) -> tuple[np.ndarray, Geometry]:
    from skimage import io

    try:
        array = np.asarray(io.imread(path))
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:
        raise ImageReadError(_one_line(error)) from error
    if array.ndim == 3 and array.shape[-1] in (2, 3, 4):
        array = array.transpose(2, 0, 1)[:, None]
    elif array.ndim == 2:
        array = array[None, None]
    else:
        raise ImageReadError(f"shape {array.shape}; grey or RGB is supported")
    return array, Geometry(array.shape[:0:-1][:2], (1.0, 1.0), (0.0, 0.0), (1.0, 0.0, 0.0, 1.0))


def _check_nifti(path: Path) -> None:
    """Walk through a NIfTI file once: its gzip checksum, its length against the header, and NaN or Inf voxels."""
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opened(path, "rb") as stream:
            dtype, offset, voxels = _nifti_header(stream.read(_NIFTI_HEADER))
            stream.seek(offset)
            present = bad = 0
            while block := stream.read(_BLOCK):
                present += len(block)
                if dtype is not None:
                    whole = block[: len(block) - len(block) % dtype.itemsize]
                    bad += int((~np.isfinite(np.frombuffer(whole, dtype))).sum())
    except EOFError as error:
        raise ImageReadError("truncated: the compressed data end too early") from error
    except (OSError, zlib.error) as error:
        raise ImageReadError(f"not readable: {_one_line(error)}") from error
    if present < voxels:
        raise ImageReadError(f"truncated: {present} of {voxels} bytes")
    if bad:
        raise ImageReadError(f"{bad} voxels are NaN or infinite")


def _nifti_header(header: bytes) -> tuple[np.dtype | None, int, int]:
    """Return the floating-point type of the voxels (None: integers), their offset and their number of bytes."""
    for order in "<>":
        size = struct.unpack_from(order + "i", header.ljust(4))[0]
        if size in (348, 540) and len(header) == _NIFTI_HEADER:
            break
    else:
        raise ImageReadError("no NIfTI header")
    if size == 348:
        dims = struct.unpack_from(order + "8h", header, 40)
        kind, bits = struct.unpack_from(order + "2h", header, 70)
        offset = int(struct.unpack_from(order + "f", header, 108)[0])
    else:
        kind, bits = struct.unpack_from(order + "2h", header, 12)
        dims = struct.unpack_from(order + "8q", header, 16)
        offset = struct.unpack_from(order + "q", header, 168)[0]
    voxels = math.prod(max(1, n) for n in dims[1 : 1 + max(0, min(7, dims[0]))]) * bits // 8
    floats = {16: "f4", 64: "f8"}
    return (np.dtype(order + floats[kind]) if kind in floats else None), offset, voxels


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    text = re.sub(r"^.*(sitk::ERROR|ITK ERROR):\s*", "", text)
    return re.sub(r""" (for|of|in) (file )?["']?/[^"']*["']?""", "", text)  # callers name the file


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.6g}" for v in values) + ")"
