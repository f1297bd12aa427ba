"""Where runs lie: names of result folders. Loads no torch."""

from __future__ import annotations

import re
from pathlib import Path

from nnssl.errors import UserError
from nnssl.layout import variable


def plans_name_of_run(plans: str, run: str | None) -> str:
    """Return the plans name in the results folder: ``PLANS`` or ``PLANS-RUN``.

    nnU-Net takes folder names apart at ``__``, so a run's name must not hold it.
    """
    if run is None:
        return plans
    if not re.fullmatch(r"[A-Za-z0-9.\-]+(_[A-Za-z0-9.\-]+)*", run):
        raise UserError("--run must be a plain name", repr(run), "letters, digits, '.', '-', single '_'")
    return f"{plans}-{run}"


def model_folder(dataset: str, trainer: str, plans: str, run: str | None, configuration: str) -> Path:
    """Return ``nnUNet_results/DATASET/TRAINER__PLANS[-RUN]__CONFIGURATION``."""
    name = f"{trainer}__{plans_name_of_run(plans, run)}__{configuration}"
    return variable("nnUNet_results") / dataset / name
