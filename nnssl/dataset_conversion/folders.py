"""Plain folders of scans -> raw data set (``nnssl_import``)."""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnssl.dataset_conversion.base import Case, Source
from nnssl.dataset_conversion.labels import label_names
from nnssl.dataset_conversion.writer import RawDatasetWriter, check_domains
from nnssl.errors import UserError
from nnssl.imageio import ENDINGS, ImageReadError, read_array, split_ending
from nnssl.plans.domains import Domains, channels_by_themselves
from nnssl.plans.verify import listed, misnumbered

_IGNORED = (".raw", ".zraw", ".img")  # data files that belong to a header file beside them


@dataclass(frozen=True)
class FolderImport:
    """What ``nnssl_import`` is asked for; see its ``--help``.

    Args:
        labeled: folder with the labeled images.
        labels: folder with their label maps, named as the images.
        unlabeled: folder with the unlabeled images, or None.
        test: folder with images to predict, or None.
        channels: names of the channels, e.g. ``("MRI",)``; ``CT`` chooses nnU-Net's CT normalization.
        label_names: names of the values 1, 2, ... after mapping.
        label_map: old value -> new value.
        patient_pattern: regular expression with one group that finds the patient in a case id.
        domains: CSV with the columns case, domain and, optionally, the modality of the domain.
        link: symbolic links instead of copies.
    """

    labeled: Path
    labels: Path
    unlabeled: Path | None = None
    test: Path | None = None
    channels: tuple[str, ...] | None = None
    label_names: tuple[str, ...] | None = None
    label_map: dict[int, int] | None = None
    patient_pattern: str | None = None
    domains: Path | None = None
    link: bool = False


@dataclass
class FoundFolder:
    """The cases of one folder, and the files in it that are no image."""

    cases: dict[str, list[Path]] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)
    suffixed: bool = False  # file names end in a channel number

    def files(self) -> Iterator[Path]:
        """Yield every image file."""
        for paths in self.cases.values():
            yield from paths


def import_folders(dataset_id: int, name: str, request: FolderImport, num_processes: int = 1) -> tuple[Path, dict]:
    """Make the raw data set ``DatasetXXX_name`` from folders of scans.

    Returns:
        its folder, and the unlabeled cases and files that were set aside with the reason.

    Raises:
        UserError: on input that cannot be used; nothing is left behind.
    """
    pattern = _checked_pattern(request.patient_pattern)
    labeled, unlabeled, test = _find_all(request)
    labels = _find_labels(request.labels, labeled)
    ending = _target_ending(labeled, labels)
    _check_test_ending(test, ending)
    aside = {stray: "is no image" for stray in unlabeled.strays}
    for case, paths in list(unlabeled.cases.items()):
        reason = misnumbered(paths) if unlabeled.suffixed else None
        if _is_png(paths[0]) != (ending == ".png"):
            reason = f"{paths[0].name}: PNG and volumes do not mix"
        if reason:
            aside[case] = reason
            del unlabeled.cases[case]
    if request.link:
        _say_what_is_converted([*labeled.files(), *unlabeled.files(), *test.files()], ending)
    channels = _channel_names(request.channels, next(iter(labeled.cases.values())))  # before hours of copying
    domains = read_domains(request.domains) if request.domains else Domains()
    check_domains(domains, {*labeled.cases, *unlabeled.cases, *test.cases}, aside)
    channels, note = channels_by_themselves(channels, domains)
    if note:
        warnings.warn(note, stacklevel=2)
    with RawDatasetWriter(dataset_id, name, ending, request.link) as writer:
        cases = [_case(n, p, "imagesTr", labels[n]) for n, p in labeled.cases.items()]
        cases += [_case(n, p, "imagesUn") for n, p in unlabeled.cases.items()]
        cases += [_case(n, p, "imagesTs") for n, p in test.cases.items()]
        written = writer.write(cases, request.label_map, num_processes)
        aside |= {key.partition("/")[2]: w.left_out for key, w in written.items() if w.left_out}
        settings: dict[str, Any] = {"set_aside": aside} if aside else {}
        if pattern:
            settings["patient_pattern"] = pattern
        present = {key.partition("/")[2] for key, w in written.items() if not w.left_out}
        settings |= domains.restricted_to(present).to_json()
        values = {v for w in written.values() for v in w.label_values}
        names = list(request.label_names) if request.label_names else None
        dataset_json = {
            "channel_names": channels,
            "labels": label_names(values | set((request.label_map or {}).values()), names),
            "nnssl": settings,
        }
        return writer.folder, writer.finish(dataset_json, num_processes)


def find_cases(folder: Path) -> FoundFolder:
    """List the cases of a folder.

    Images are files with a known ending and sub-folders (one DICOM series each). If any stem ends in ``_0000``, the
    folder follows nnU-Net: a four-digit suffix is the channel. Otherwise every file is a case of one channel.

    Raises:
        UserError: if the folder does not exist or holds one case twice.
    """
    if not Path(folder).is_dir():
        raise UserError("an image folder must exist", folder, None, "check the path")
    stems: dict[str, Path] = {}
    found = FoundFolder()
    for path in sorted(Path(folder).iterdir()):
        stem, ending = (path.name, "/") if path.is_dir() else split_ending(path.name)
        if path.name.startswith(".") or path.suffix.lower() in _IGNORED:
            continue
        if not ending or (path.is_dir() and not any(path.iterdir())):
            found.strays.append(path.name)
        elif stem in stems:
            raise UserError("a case has one file a channel", f"{stems[stem].name} and {path.name}", None, "remove one")
        else:
            stems[stem] = path
    found.suffixed = any(stem.endswith("_0000") for stem in stems)
    for stem, path in stems.items():
        match = re.fullmatch(r"(.+)_\d{4}", stem) if found.suffixed else None
        found.cases.setdefault(match[1] if match else stem, []).append(path)
    return found


def read_domains(path: Path) -> Domains:
    """Read a CSV with the columns case, domain and, if wanted, modality; a first line ``case,...`` is a header.

    Raises:
        UserError: if a line has another form, or two lines contradict each other.
    """
    form = "lines CASE,DOMAIN or CASE,DOMAIN,MODALITY"
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as stream:
            rows = [[cell.strip() for cell in row] for row in csv.reader(stream) if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError("--domains names a CSV file", error, form, "check the path") from error
    rows = rows[1:] if rows and rows[0][0].lower() == "case" else rows
    for row in rows:
        if len(row) not in (2, 3) or len(row) != len(rows[0]) or not all(row):
            raise UserError("every line of --domains has one form", repr(",".join(row)), form, f"mend {path}")
    domains = Domains(dict(row[:2] for row in rows), {row[1]: row[2] for row in rows if len(row) == 3})
    for case, domain, *modality in rows:
        if domains.of_case[case] != domain:
            raise UserError("a case has one domain", f"two for {case}", None, f"mend {path}")
        if modality and domains.modalities[domain] != modality[0]:
            got = f"{modality[0]} and {domains.modalities[domain]} for {domain}"
            raise UserError("a domain has one modality", got, None, f"mend {path}, or make two domains of it")
    return domains


def _find_all(request: FolderImport) -> tuple[FoundFolder, FoundFolder, FoundFolder]:
    labeled = find_cases(request.labeled)
    unlabeled = find_cases(request.unlabeled) if request.unlabeled else FoundFolder()
    test = find_cases(request.test) if request.test else FoundFolder()
    if not labeled.cases:
        remedy = "check --labeled"
        raise UserError("at least one labeled case is needed", f"no image in {request.labeled}", _formats(), remedy)
    if both := sorted(labeled.cases.keys() & unlabeled.cases.keys()):
        rule = "a case is either labeled or unlabeled"
        raise UserError(rule, f"in --labeled and --unlabeled: {listed(both)}", None, "rename or remove one of the two")
    for option, folder in (("--labeled", labeled), ("--test", test)):
        wrong = [case for case, paths in folder.cases.items() if folder.suffixed and misnumbered(paths)]
        if wrong:
            rule = "channel files are CASE_0000, CASE_0001, ... without a gap"
            raise UserError(rule, f"{option}: {listed(wrong)}", None, "rename them or add the missing files")
        if folder.strays:
            warnings.warn(f"files in {option} that are no image are ignored: {listed(folder.strays)}", stacklevel=3)
    if request.unlabeled and not unlabeled.cases:
        warnings.warn(f"no image in {request.unlabeled}", stacklevel=3)
    return labeled, unlabeled, test


def _find_labels(folder: Path, labeled: FoundFolder) -> dict[str, Path]:
    """Match label files to cases by name; nnU-Net's labels carry no channel suffix."""
    found = find_cases(folder)
    labels: dict[str, Path] = {}
    for path in found.files():
        labels[path.name if path.is_dir() else split_ending(path.name)[0]] = path
    without_label = sorted(labeled.cases.keys() - labels.keys())
    without_image = sorted(labels.keys() - labeled.cases.keys())
    if without_label or without_image:
        parts = [f"images without label: {listed(without_label)}"] if without_label else []
        parts += [f"labels without image: {listed(without_image)}"] if without_image else []
        rule = "every case has one image in --labeled and one label of the same name in --labels"
        raise UserError(rule, ", ".join(parts), "CASE.ending for both", "rename them, or move unlabeled images away")
    if found.strays:
        warnings.warn(f"files in --labels that are no image are ignored: {listed(found.strays)}", stacklevel=3)
    return labels


def _target_ending(labeled: FoundFolder, labels: dict[str, Path]) -> str:
    kinds = {_is_png(path) for path in [*labeled.files(), *labels.values()]}
    if len(kinds) > 1:
        rule = "images and labels are either all PNG (2D) or all volumes"
        raise UserError(rule, "both", None, "import them as two data sets")
    return ".png" if kinds == {True} else ".nii.gz"


def _check_test_ending(test: FoundFolder, ending: str) -> None:
    if wrong := [path.name for path in test.files() if _is_png(path) != (ending == ".png")]:
        raise UserError("test images have the format of the labeled ones", listed(wrong), ending, "mend --test")


def _say_what_is_converted(files: list[Path], ending: str) -> None:
    if converted := [path.name for path in files if path.is_dir() or not path.name.endswith(ending)]:
        warnings.warn(f"--link: {len(converted)} files are converted, not linked: {listed(converted, 3)}", stacklevel=3)


def _channel_names(names: tuple[str, ...] | None, images: list[Path]) -> dict[str, str]:
    """Return ``channel_names`` of dataset.json; the number of channels is that of the first labeled case."""
    count = len(images)
    if _is_png(images[0]):
        try:
            count = sum(len(read_array(path)[0]) for path in images)
        except ImageReadError as error:
            raise UserError(
                "a labeled image must be readable", f"{images[0].name}: {error}", None, "repair it"
            ) from error
    if names is None:
        names = tuple("RGBA"[:count]) if _is_png(images[0]) and count in (3, 4) else ()
        names = names or (("image",) if count == 1 else tuple(f"channel{i}" for i in range(count)))
        warnings.warn(f"no --channels: named {', '.join(names)} and z-scored; CT needs --channels CT", stacklevel=3)
    if len(names) != count:
        rule = "--channels names every channel of the labeled images"
        raise UserError(rule, f"{len(names)} names for {count} channels", None, "name each channel once, in order")
    return {str(i): name for i, name in enumerate(names)}


def _checked_pattern(pattern: str | None) -> str | None:
    if pattern is None:
        return None
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise UserError(
            "--patient_pattern is a regular expression", f"{pattern!r}: {error}", None, "mend it"
        ) from error
    if groups < 1:
        raise UserError("--patient_pattern holds one group", repr(pattern), r"e.g. (patient\d+)_", "add parentheses")
    return pattern


def _case(name: str, paths: list[Path], folder: str, label: Path | None = None) -> Case:
    return Case(name, tuple(Source(path) for path in paths), Source(label) if label else None, folder)


def _is_png(path: Path) -> bool:
    return path.name.lower().endswith(".png")


def _formats() -> str:
    return ", ".join(ENDINGS) + " or DICOM folders"
