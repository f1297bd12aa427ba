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


def finish(command: str, folder: Path, set_aside: dict[str, str], subset: bool = False) -> None:
    """Name what was set aside, then the counts and the command to run next.

    Args:
        command: name of the command.
        folder: the new raw data set.
        set_aside: unlabeled case or file -> reason.
        subset: the next step is to draw a subset, since every case is labeled.
    """
    from nnssl.dataset_conversion.writer import summary_line
    from nnssl.layout import RawDataset
    from nnssl.plans.domains import Domains, count_by_domain

    for name, reason in sorted(set_aside.items()):
        print(f"{command}: set aside: {name}: {reason}", file=sys.stderr)
    aside = f"; {len(set_aside)} set aside (listed above)" if set_aside else ""
    print(f"{command}: {summary_line(folder)}{aside}")
    dataset = RawDataset.load(folder)
    if (domains := Domains.of(dataset)).names:
        print(f"domains: {count_by_domain(dataset, domains)}")
    dataset_id = int(folder.name[7:10])
    if subset:
        print(f"next: nnssl_make_subset -d {dataset_id} -o NEW_ID --labeled N (or --published NAME)")
    else:
        print(f"next: nnssl_plan_and_preprocess -d {dataset_id} --verify_dataset_integrity")
