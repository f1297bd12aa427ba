"""Check the images to predict and the output folder before a model is loaded. Loads no torch."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nnssl.errors import UserError
from nnssl.imageio import ImageReadError, check_image, count_channels
from nnssl.layout import require_writable


def list_inputs(folder: Path, file_ending: str, channels: int) -> dict[str, list[str]]:
    """Return ``{case: channel files in order}`` of a folder of images ``CASE_0000.ending``.

    Args:
        folder: the input folder.
        file_ending: ending of the training data set, such as ``.nii.gz``.
        channels: number of channels the model was trained with.

    Raises:
        UserError: for a missing folder, no image, cases with missing or surplus channels, and for files
            that are no complete image or hold NaN.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("-i must name a folder", f"no {folder}", None, "check the path")
    pattern = re.compile(r"(.+)_(\d{4})" + re.escape(file_ending))
    found: dict[str, dict[int, str]] = {}
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match and not path.name.startswith("."):
            found.setdefault(match[1], {})[int(match[2])] = str(path)
    if not found:
        others = sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
        got = f"{others[0]} and the like" if others else "an empty folder"
        allowed = f"CASE_0000{file_ending}, one file a channel"
        raise UserError("-i must hold images named as in training", f"{got} in {folder}", allowed, "rename the files")
    _require_channels(found, channels)
    cases = {case: [files[c] for c in sorted(files)] for case, files in found.items()}
    _require_readable(cases)
    return cases


def _require_channels(found: dict[str, dict[int, str]], channels: int) -> None:
    wrong = {case: sorted(files) for case, files in found.items() if not _has_channels(files, channels)}
    if wrong:
        named = [f"{case} (has {', '.join(f'{c:04d}' for c in have)})" for case, have in wrong.items()]
        allowed = "0000" if channels == 1 else f"0000 to {channels - 1:04d}"
        remedy = "add the missing channels or move these cases away"
        raise UserError(f"every case needs the channels of training ({channels})", _some(named), allowed, remedy)


def _has_channels(files: dict[int, str], channels: int) -> bool:
    """Whether the files of a case hold the channels of training; an RGB PNG or a time axis is several in one file."""
    one_each = sorted(files) == list(range(channels))
    png = next(iter(files.values())).lower().endswith(".png")
    if (one_each and not png) or len(files) > channels or sorted(files) != list(range(len(files))):
        return one_each
    try:
        return sum(count_channels(Path(file)) for file in files.values()) == channels
    except ImageReadError:
        return one_each  # the check that follows says why it can't be read


def _require_readable(cases: dict[str, list[str]]) -> None:
    """Decode every image once: stock readers fill a truncated file with whatever lies in memory, and NaN with zeros."""
    files = [(case, file) for case, channels in cases.items() for file in channels]
    with ThreadPoolExecutor(min(4, len(files))) as pool:  # decompression releases the interpreter lock
        reasons = list(pool.map(_why_unreadable, (file for _, file in files)))
    broken = [f"{case} ({reason})" for (case, _), reason in zip(files, reasons, strict=True) if reason]
    if broken:
        raise UserError("every image must be readable", _some(broken), None, "repair these files or move them away")


def _why_unreadable(file: str) -> str | None:
    try:
        check_image(Path(file))
    except ImageReadError as error:
        return str(error)
    return None


def _some(names: list[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def prepare_output(folder: Path, inputs: Path) -> None:
    """Create the output folder and make sure that it can be written.

    Raises:
        UserError: if it can't, or if it is the input folder.
    """
    folder = Path(folder)
    if folder.exists() and folder.resolve() == Path(inputs).resolve():
        raise UserError("-o must be another folder than -i", folder, None, "choose a folder of its own")
    require_writable(folder, "-o must be a writable folder", "choose another or mend it")
