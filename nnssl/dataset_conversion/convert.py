"""A public data set as downloaded -> raw data set (``nnssl_convert``)."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from nnssl.dataset_conversion import CONVERTERS
from nnssl.dataset_conversion.base import Case, Converter, RawDatasetWriter, write_json
from nnssl.dataset_conversion.published import FILE_NAME, load_published
from nnssl.errors import UserError, nearest
from nnssl.plans.verify import listed


def convert(
    source_name: str,
    source: Path,
    dataset_id: int,
    name: str | None = None,
    channels: list[str] | None = None,
    link: bool = False,
    num_processes: int = 1,
    with_unlabeled: bool = False,
) -> tuple[Path, dict[str, str]]:
    """Convert a download and check every case of it.

    Args:
        source_name: a key of :data:`nnssl.dataset_conversion.CONVERTERS`.
        source: folder of the download.
        dataset_id: id of the new data set.
        name: its name; default ``source_name``.
        channels: channel names instead of the converter's, e.g. ``["noNorm"]`` for scans normalized already.
        link: link files that need no conversion.
        num_processes: worker processes.
        with_unlabeled: also write the release's images without labels, to imagesUn.

    Returns:
        folder of the raw data set, and what was set aside.

    Raises:
        UserError: if source or name are unknown, or a case cannot be used; nothing is left behind.
    """
    if source_name not in CONVERTERS:
        raise UserError("a converter must exist", repr(source_name), nearest(source_name, CONVERTERS), "mend the name")
    converter = CONVERTERS[source_name]
    layout = converter.detect(Path(source)) if Path(source).is_dir() else None
    if layout is None:
        allowed = " or ".join(converter.LAYOUTS.values())
        raise UserError(f"a download of {source_name} has a known layout", source, allowed, "unpack it; check the path")
    cases = _with_or_without_pool(list(converter.cases(Path(source), layout)), with_unlabeled)
    _check_cases(converter, layout, cases)
    content = _dataset_json(converter, layout, cases, channels)
    with RawDatasetWriter(dataset_id, name or source_name, converter.FILE_ENDING, link) as writer:
        written = writer.write(cases, None, num_processes)
        if aside := {key.partition("/")[2]: found.left_out for key, found in written.items() if found.left_out}:
            content["nnssl"]["set_aside"] = aside
        if converter.PUBLISHED:
            write_json(writer.temporary / FILE_NAME, load_published(converter.PUBLISHED))
        return writer.folder, writer.finish(content, num_processes)


def _with_or_without_pool(cases: list[Case], with_unlabeled: bool) -> list[Case]:
    """Return the cases to write: the unlabeled ones only if asked for."""
    pool = sum(case.folder == "imagesUn" for case in cases)
    if with_unlabeled and not pool:
        rule = "--with_unlabeled needs images without labels for training"
        raise UserError(rule, "none in this download", None, "leave --with_unlabeled out")
    if with_unlabeled:
        return cases
    if pool:
        warnings.warn(f"{pool} images without labels are left out; --with_unlabeled adds them", stacklevel=3)
    return [case for case in cases if case.folder != "imagesUn"]


def _check_cases(converter: Converter, layout: str, cases: list[Case]) -> None:
    """Refuse a case found twice; warn when the release is not complete."""
    counts = Counter(case.name for case in cases)
    if doubled := sorted(name for name, count in counts.items() if count > 1):
        raise UserError("every case is found once", listed(doubled), None, "remove the second copy from the folder")
    for folder, expected in converter.EXPECTED[layout].items():
        found = sum(case.folder == folder for case in cases)
        if found != expected and (found or folder == "imagesTr"):
            warnings.warn(f"{found} cases for {folder}; the whole release has {expected}", stacklevel=3)


def _dataset_json(converter: Converter, layout: str, cases: list[Case], channels: list[str] | None) -> dict[str, Any]:
    names = converter.channels(cases)
    if channels is not None and len(channels) != len(names):
        raise UserError("--channels names every channel", len(channels), len(names), "mend --channels")
    settings: dict[str, Any] = {"source": converter.NAME, "layout": layout}
    if converter.PATIENT_PATTERN:
        settings["patient_pattern"] = converter.PATIENT_PATTERN
    if provenance := converter.provenance(layout):
        settings["provenance"] = provenance
    return {
        "channel_names": dict(zip(names, channels, strict=True)) if channels else names,
        "labels": dict(converter.LABELS),
        "description": converter.TITLE,
        "reference": converter.SOURCE_URL,
        "licence": converter.LICENCE,
        "nnssl": settings,
    }
