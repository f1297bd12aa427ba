"""Errors of the user's making: they name the rule, what was found, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A refusal that reads as one line: ``RULE; got X; allowed Y; do Z``.

    The commands print it behind their own name and exit with code 2, without a traceback.

    Args:
        rule: what must hold, as a short clause.
        got: what was found instead.
        allowed: what would be accepted.
        remedy: what the user can do about it.
    """

    def __init__(self, rule: str, got: object = None, allowed: object = None, remedy: str | None = None) -> None:
        self.rule, self.got, self.allowed, self.remedy = rule, got, allowed, remedy
        parts = [rule]
        if got is not None:
            parts.append(f"got {got}")
        if allowed is not None:
            parts.append(f"allowed {allowed}")
        if remedy is not None:
            parts.append(f"do: {remedy}")
        super().__init__("; ".join(parts).replace("\n", " "))

    def __reduce__(self):  # crosses process pools without losing its parts
        return type(self), (self.rule, self.got, self.allowed, self.remedy)


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return the known names closest to ``name``, or all of them (at most 20) when none is close."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), known, n=count, cutoff=0.5)
    if not close:  # a capital letter must not hide the right name
        by_lower = {k.lower(): k for k in known}
        close = [by_lower[k] for k in difflib.get_close_matches(str(name).lower(), by_lower, n=count, cutoff=0.5)]
    if close:
        return "nearest: " + ", ".join(close)
    return ", ".join(known[:20]) + (", ..." if len(known) > 20 else "") if known else "none exist"
