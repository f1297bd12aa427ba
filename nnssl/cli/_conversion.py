"""What the commands that make raw data sets print."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def plain_warnings(command: str) -> Iterator[None]:
    """Print warnings as ``COMMAND: warning: TEXT`` instead of with file and line."""

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        print(f"{command}: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def finish(command: str, folder: Path, set_aside: dict[str, str]) -> None:
    """Name what was set aside, then the counts and the command to run next."""
    from nnssl.dataset_conversion.base import summary_line

    for name, reason in sorted(set_aside.items()):
        print(f"{command}: set aside: {name}: {reason}", file=sys.stderr)
    aside = f"; {len(set_aside)} set aside (listed above)" if set_aside else ""
    print(f"{command}: {summary_line(folder)}{aside}")
    print(f"next: nnssl_plan_and_preprocess -d {int(folder.name[7:10])} --verify_dataset_integrity")
