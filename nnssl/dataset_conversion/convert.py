"""A public data set as downloaded -> raw data set (``nnssl_convert``)."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import nnssl
from nnssl.dataset_conversion import CONVERTERS
from nnssl.dataset_conversion.base import Case, Converter, Source, load_shared
from nnssl.dataset_conversion.crop import LabelCrop
from nnssl.dataset_conversion.published import FILE_NAME, load_published
from nnssl.dataset_conversion.writer import RawDatasetWriter, Written, write_json
from nnssl.errors import UserError, nearest
from nnssl.imageio import TURNED
from nnssl.plans.domains import Domains, channels_by_themselves
from nnssl.plans.verify import listed


@dataclass(frozen=True)
class ConvertOptions:
    """What the user may choose.

    Args:
        channels: channel names instead of the converter's, e.g. ``("noNorm",)`` for scans normalized already.
        link: link files that need no conversion.
        with_unlabeled: also write the release's images without labels, to imagesUn.
        literature_crop: cut every scan around its reference label, as the literature did.
    """

    channels: tuple[str, ...] | None = None
    link: bool = False
    with_unlabeled: bool = False
    literature_crop: bool = False


def convert(
    source_name: str,
    source: Path,
    dataset_id: int,
    name: str | None = None,
    options: ConvertOptions | None = None,
    num_processes: int = 1,
) -> tuple[Path, dict[str, str]]:
    """Convert a download and check every case of it, one case at a time in each process.

    A conversion that was killed goes on where it stopped when it is asked for again with equal arguments.

    Args:
        source_name: a key of :data:`nnssl.dataset_conversion.CONVERTERS`.
        source: folder of the download.
        dataset_id: id of the new data set.
        name: its name; default the converter's.
        options: see :class:`ConvertOptions`.
        num_processes: worker processes.

    Returns:
        folder of the raw data set, and what was set aside.

    Raises:
        UserError: if source or name are unknown, or a case cannot be used; there is no data set then, and what was
            finished is kept for the next call.
    """
    options = options or ConvertOptions()
    if source_name not in CONVERTERS:
        raise UserError("a converter must exist", repr(source_name), nearest(source_name, CONVERTERS), "mend the name")
    converter, source = CONVERTERS[source_name], Path(source)
    layout = converter.detect(source) if source.is_dir() else None
    if layout is None:
        allowed = " or ".join(converter.LAYOUTS.values())
        raise UserError(f"a download of {source_name} has a known layout", source, allowed, "unpack it; check the path")
    found = list(converter.cases(source, layout))
    aside = {case.name: case.left_out for case in found if case.left_out}
    cases = _with_or_without_pool([case for case in found if not case.left_out], options.with_unlabeled)
    _check_cases(converter, layout, cases)
    content = _dataset_json(converter, source, layout, cases, options)
    if options.literature_crop:
        crop = _crop_of(converter, layout)
        aside |= {case.name: "no label to crop around" for case in cases if case.label is None}
        cases = [_cropped(case, crop, converter.SHARED_VOXELS) for case in cases if case.label is not None]
        content["nnssl"]["provenance"] = crop.described()
    name = name or content.pop("name", source_name)
    request = {
        "converter": [source_name, layout, nnssl.__version__],
        "source": str(source.resolve()),
        "options": [options.link, options.with_unlabeled, options.literature_crop],
    }
    with RawDatasetWriter(dataset_id, name, converter.FILE_ENDING, options.link, request) as writer:
        written = writer.write(cases, None, num_processes, scan=True, share_voxels=converter.SHARED_VOXELS)
        _say_what_was_mended(written)
        aside |= {key.partition("/")[2]: found.left_out for key, found in written.items() if found.left_out}
        if aside:
            content["nnssl"]["set_aside"] = aside
        if converter.PUBLISHED:
            write_json(writer.temporary / FILE_NAME, load_published(converter.PUBLISHED))
        present = {key.partition("/")[2] for key, one in written.items() if not one.left_out}
        content["nnssl"] |= _domains(converter, cases).restricted_to(present).to_json()
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


def _crop_of(converter: Converter, layout: str) -> LabelCrop:
    if layout not in converter.CROPS:
        known = [f"{c.NAME} ({', '.join(c.CROPS)})" for c in CONVERTERS.values() if c.CROPS]
        rule = "--literature_crop needs a data set whose crop the literature describes"
        raise UserError(rule, f"{converter.NAME} ({layout})", ", ".join(known), "leave --literature_crop out")
    return converter.CROPS[layout]


def _cropped(case: Case, crop: LabelCrop, shared: bool) -> Case:
    """Return a case whose images and label are cut to the box of the label.

    Args:
        case: the case.
        crop: where to cut.
        shared: whether image and label share their voxels, whatever their headers say.
    """
    if case.label is None:
        raise ValueError(f"{case.name} has no label")
    load_label = partial(load_shared, case.label, case.images[0]) if shared else case.label.load
    loads = [*(image.load for image in case.images), load_label]
    parts = zip((*case.images, case.label), loads, strict=True)
    sources = [replace(one, read=crop.wrap(load, load_label)) for one, load in parts]
    return replace(case, images=tuple(sources[:-1]), label=Source(case.label.path, sources[-1].read))


def _say_what_was_mended(written: dict[str, Written]) -> None:
    notes = [f"{key} ({one.note})" for key, one in written.items() if one.note]
    turned = [note for note in notes if f"({TURNED}" in note]
    lost = [note for note in notes if note not in turned]
    if lost:
        text = f"{len(lost)} labels took over the grid of their image, whose voxels they share: {listed(lost, 3)}"
        warnings.warn(text, stacklevel=3)
    if turned:
        text = f"{len(turned)} labels were stored with other axes than their image, and turned: {listed(turned, 3)}"
        warnings.warn(text, stacklevel=3)


def _domains(converter: Converter, cases: list[Case]) -> Domains:
    return Domains({c.name: c.domain for c in cases if c.domain}, dict(converter.DOMAIN_MODALITIES))


def _dataset_json(
    converter: Converter, source: Path, layout: str, cases: list[Case], options: ConvertOptions
) -> dict[str, Any]:
    details = converter.details(source, layout)
    names = details.pop("channel_names", None) or converter.channels(cases)
    if options.channels is not None and len(options.channels) != len(names):
        raise UserError("--channels names every channel", len(options.channels), len(names), "mend --channels")
    if options.channels:
        names = dict(zip(names, options.channels, strict=True))
    names, note = channels_by_themselves(names, _domains(converter, cases))
    if note:
        warnings.warn(note, stacklevel=3)
    settings: dict[str, Any] = {"source": converter.NAME, "layout": layout}
    if converter.PATIENT_PATTERN:
        settings["patient_pattern"] = converter.PATIENT_PATTERN
    if provenance := converter.provenance(layout):
        settings["provenance"] = provenance
    return {
        "channel_names": names,
        "labels": dict(converter.LABELS),
        "description": converter.TITLE,
        "reference": converter.SOURCE_URL,
        "licence": converter.LICENCE,
        **details,
        "nnssl": settings,
    }
