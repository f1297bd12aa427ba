"""Presets: one JSON file with sections ``plan``, ``train`` and ``predict``; each command applies its own.

``nnssl/plans/presets/NAME.json`` holds the published ones. A preset may name another one as ``"extends"``: what it says
itself replaces the other's values, key by key. Without a trainer in its train section it is a recipe for any trainer.
Loads no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nnssl.errors import UserError, nearest

PRESET_FOLDER = Path(__file__).parent / "presets"


def available_presets() -> dict[str, Path]:
    """Return ``{name: file}`` of the presets that come with the package."""
    return {path.stem: path for path in sorted(PRESET_FOLDER.glob("*.json"))}


def load_preset(name_or_path: str) -> dict[str, Any]:
    """Read a preset by name or, for anything that ends in ``.json``, by path; its ``name`` is filled in.

    Raises:
        UserError: if there is no such preset, the file is no JSON object, or presets extend each other in a circle.
    """
    content = _read(str(name_or_path))
    chain = [content["name"]]
    while "extends" in content:
        base = _read(str(content.pop("extends")))
        if base["name"] in chain:
            rule = "a preset must not extend itself"
            raise UserError(rule, " > ".join([*chain, base["name"]]), None, "mend the presets")
        chain.append(base["name"])
        content = _merged(base, content)
    return content


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the values of ``own``; objects are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _read(name_or_path: str) -> dict[str, Any]:
    known = available_presets()
    path = Path(name_or_path) if name_or_path.endswith(".json") else known.get(name_or_path)
    if path is None or not path.is_file():
        allowed = f"a .json file or {nearest(name_or_path, known)}"
        raise UserError("--preset must name a preset or a file", repr(name_or_path), allowed, "see nnssl_info presets")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError("a preset must be valid JSON", f"{path}: {error}", None, "repair the file") from error
    if not isinstance(content, dict):
        raise UserError("a preset must be a JSON object", f"{type(content).__name__} in {path}", "plan, train, predict")
    return {"name": path.stem, **content}
