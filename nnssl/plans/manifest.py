"""The manifest ``nnssl_unlabeled.json``: which images were preprocessed, from which content, under which plan.

Training reads it through :func:`require_current` and refuses folders that are stale or mixed up. Loads no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nnssl.errors import UserError, nearest

MANIFEST_NAME = "nnssl_unlabeled.json"
#: What earlier runs read from the images, kept to save time: the scans of verify, and shapes and spacings.
SCANS_NAME, IMAGE_FINGERPRINT_NAME = "nnssl_verified.json", "nnssl_image_fingerprint.json"
VERSION = 1
#: Folders of preprocessed cases: part of the manifest -> suffix behind the data identifier.
SUFFIXES = {"labeled": "", "unlabeled": "_unlabeled", "monitoring": "_monitoring", "pseudo": "_pseudo"}
#: Where a part's cases and hashes are recorded in the manifest.
CASE_KEYS = {"labeled": "labeled", "unlabeled": "cases", "monitoring": "monitoring", "pseudo": "pseudo"}
#: nnU-Net's normalizations that ignore the intensity statistics of the plan.
NORMALIZATIONS_WITHOUT_STATISTICS = frozenset(
    {"ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization"}
)
_VOXEL_FIELDS = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_seg",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg_kwargs",
)


def empty_manifest() -> dict[str, Any]:
    """Return a manifest that records nothing yet."""
    return {
        "version": VERSION,
        "cases": {},
        "labeled": {},
        "monitoring": {},
        "pseudo": {},
        "pseudo_source": {},
        "test": {},
        "set_aside": {},
        "configurations": {},
    }


def load_manifest(preprocessed_folder: Path) -> dict[str, Any]:
    """Read the manifest of a preprocessed data set.

    Raises:
        UserError: if it is missing, unreadable or of another version.
    """
    path = Path(preprocessed_folder) / MANIFEST_NAME
    remedy = "run nnssl_plan_and_preprocess"
    if not path.is_file():
        raise UserError("the data set must be preprocessed by nnssl before it is used", f"no {path}", None, remedy)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{MANIFEST_NAME} must be valid JSON", f"{path}: {error}", None, remedy + " --clean") from error
    if manifest.get("version") != VERSION:
        got = f"version {manifest.get('version')} in {path}"
        raise UserError(f"{MANIFEST_NAME} must have a known version", got, VERSION, remedy + " --clean")
    return manifest


def save_manifest(preprocessed_folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest atomically: readers see the old file or the new one, never a part."""
    write_json_atomically(Path(preprocessed_folder) / MANIFEST_NAME, manifest)


def write_json_atomically(path: Path, content: Any) -> bool:
    """Write ``content`` as JSON through a temporary file in the same folder; leave an equal file untouched.

    Returns:
        Whether the file changed.
    """
    text = json.dumps(content, indent=2) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix="." + path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 would lock out a research group's other members
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return True


def digest(content: Any) -> str:
    """Return the SHA-256 of ``content`` as canonical JSON (tuples equal lists, key order does not count)."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=float)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def configuration_of(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """Return a configuration of a plan with what it inherits from others filled in.

    Raises:
        UserError: if the plan has no such configuration.
    """
    known = plans["configurations"]
    if configuration not in known:
        rule = f"the configuration must be in the plan {plans.get('plans_name', '')}".rstrip()
        raise UserError(rule, repr(configuration), nearest(configuration, known), "check -c and -p")
    own = known[configuration]
    if "inherits_from" not in own:
        return dict(own)
    return {**configuration_of(plans, own["inherits_from"]), **own}


def plans_on_disk(preprocessed_folder: Path) -> dict[str, dict[str, Any]]:
    """Return the plans of a preprocessed data set by name; other JSON files and unreadable ones are passed over."""
    found = {}
    for path in sorted(Path(preprocessed_folder).glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(content, dict) and "plans_name" in content and "configurations" in content:
            found[path.stem] = content
    return found


def preprocessing_hash(plans: dict[str, Any], configuration: str) -> str:
    """Hash what changes preprocessed voxels: spacing, normalization, masks, resampling, transpose, reader.

    Patch size, batch size and network do not count, so plans that differ only there share preprocessed data. The
    intensity statistics count only for channels whose normalization uses them.
    """
    config = configuration_of(plans, configuration)
    statistics = plans.get("foreground_intensity_properties_per_channel", {})
    used = {
        str(channel): statistics.get(str(channel), statistics.get(channel))
        for channel, scheme in enumerate(config["normalization_schemes"])
        if scheme not in NORMALIZATIONS_WITHOUT_STATISTICS
    }
    return digest(
        {
            "configuration": {field: config.get(field) for field in _VOXEL_FIELDS},
            "transpose_forward": plans["transpose_forward"],
            "image_reader_writer": plans["image_reader_writer"],
            "intensities": used,
        }
    )


def part_folder(preprocessed_folder: Path, data_identifier: str, part: str) -> Path:
    """Return where the preprocessed cases of ``part`` (a key of :data:`SUFFIXES`) lie."""
    return Path(preprocessed_folder) / (data_identifier + SUFFIXES[part])


def cases_on_disk(folder: Path) -> set[str]:
    """Return the ids of the preprocessed cases in ``folder`` (each case has one ``.pkl``)."""
    return {path.name[: -len(".pkl")] for path in folder.glob("*.pkl")} if folder.is_dir() else set()


def require_current(preprocessed_folder: Path, plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """Return the manifest's entry of a configuration after checking that it fits the plan and the folders.

    Args:
        preprocessed_folder: ``nnUNet_preprocessed/DatasetXXX_Name``.
        plans: the plan that training uses.
        configuration: a configuration of that plan.

    Returns:
        ``{"preprocessing_hash", "labeled", "unlabeled", "monitoring", "pseudo"}`` with sorted lists of case ids;
        the last one is absent where nothing was preprocessed since masks of unknown quality are supported.

    Raises:
        UserError: if the configuration was not preprocessed, was preprocessed under another plan, or its folders
            hold other cases than the manifest records.
    """
    manifest = load_manifest(preprocessed_folder)
    config = configuration_of(plans, configuration)
    identifier = config["data_identifier"]
    entry = manifest["configurations"].get(identifier)
    remedy = f"run nnssl_plan_and_preprocess -c {configuration} again"
    if entry is None:
        known = ", ".join(manifest["configurations"]) or "none"
        raise UserError("the configuration must be preprocessed before it is used", identifier, known, remedy)
    if entry["preprocessing_hash"] != preprocessing_hash(plans, configuration):
        rule = f"{identifier} must have been preprocessed under the plan in use"
        raise UserError(
            rule, "data of another plan (spacing, normalization, resampling or transpose differ)", None, remedy
        )
    for part in SUFFIXES:
        if part in entry:
            folder = part_folder(preprocessed_folder, identifier, part)
            _require_same(f"{folder.name} and {MANIFEST_NAME}", cases_on_disk(folder), entry[part], remedy)
            _require_same(
                f"{identifier} and the data set's {part} cases", entry[part], manifest[CASE_KEYS[part]], remedy
            )
    return entry


def unlabeled_cases(preprocessed_folder: Path, plans: dict[str, Any], configuration: str) -> list[str]:
    """Return the sorted ids of the unlabeled cases of a configuration that is current (:func:`require_current`)."""
    return sorted(require_current(preprocessed_folder, plans, configuration)["unlabeled"])


def monitoring_cases(preprocessed_folder: Path, plans: dict[str, Any], configuration: str) -> list[str]:
    """Return the sorted ids of the monitoring cases of a configuration that is current (:func:`require_current`)."""
    return sorted(require_current(preprocessed_folder, plans, configuration)["monitoring"])


def manifest_digest(manifest: dict[str, Any], data_identifier: str) -> str:
    """Hash the unlabeled images of a configuration: their ids, contents and preprocessing. Checkpoints keep it."""
    entry = manifest["configurations"][data_identifier]
    hashes = {case: manifest["cases"][case]["hash"] for case in entry["unlabeled"]}
    return digest({"preprocessing_hash": entry["preprocessing_hash"], "unlabeled": hashes})


def _require_same(rule: str, found: Iterable[str], expected: Iterable[str], remedy: str) -> None:
    found, expected = set(found), set(expected)
    if found != expected:
        missing, extra = sorted(expected - found), sorted(found - expected)
        got = "; ".join(
            f"{len(c)} {word} ({', '.join(c[:3])}{', ...' if len(c) > 3 else ''})"
            for word, c in (("missing", missing), ("unexpected", extra))
            if c
        )
        raise UserError(f"{rule} must hold the same cases", got.replace("; ", " and "), None, remedy)
