"""Checks of the Python environment."""

from __future__ import annotations


def check_environment() -> None:
    """Refuse to run beside the self-supervised ``nnssl`` of MIC-DKFZ."""
