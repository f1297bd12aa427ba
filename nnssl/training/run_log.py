"""The record of a run: JSON lines, a CSV table and a picture, one line an epoch."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any


class RunLog:
    """Appends one record an epoch to ``progress.jsonl`` and keeps ``progress.csv`` and ``losses.png`` in step.

    Args:
        folder: the fold's results folder.
        first_epoch: records of this and later epochs are dropped (they will be written again after a resume).
    """

    def __init__(self, folder: Path, first_epoch: int = 0, tensorboard: bool = False) -> None:
        self.folder = Path(folder)
        self.lines = self.folder / "progress.jsonl"
        self.records = [r for r in self._read() if r["epoch"] < first_epoch]
        self._rewrite(self.lines, "".join(json.dumps(r) + "\n" for r in self.records))
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_epoch)

    def _read(self) -> list[dict[str, Any]]:
        if not self.lines.is_file():
            return []
        records = []
        for line in self.lines.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:  # the last line of a killed run may be cut
                break
        return records

    @staticmethod
    def _rewrite(path: Path, text: str) -> None:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)

    def write(self, record: dict[str, Any]) -> None:
        """Add the record of an epoch: ``{"epoch", "step", "seconds", "lr", "losses": {}, "branches": {}, ...}``."""
        self.records.append(record)
        with open(self.lines, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        self._write_csv()
        self.plot()
        if self.writer is not None:
            for name, value in flatten(record).items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(name, value, record["epoch"])
            self.writer.flush()

    def _write_csv(self) -> None:
        rows = [flatten(r) for r in self.records]
        names = list(dict.fromkeys(name for row in rows for name in row))
        temporary = self.folder / "progress.csv.tmp"
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, names)
            table.writeheader()
            table.writerows(rows)
        os.replace(temporary, self.folder / "progress.csv")

    def plot(self) -> None:
        """Draw ``losses.png``: loss terms above, the Dice of each branch on the monitoring cases below."""
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt

        with plt.rc_context(matplotlib.rcParamsDefault):  # nnU-Net sets seaborn's poster-sized theme for all figures
            figure, axes = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
            watched = self.records[-1].get("monitored_on", "monitoring cases")
            self._draw(axes[0], "losses", "loss terms", "loss_")
            self._draw(axes[1], "branches", f"Dice of branches on {watched}", "")
            axes[1].set_ylim(0, 1)
            axes[1].set_xlabel("epoch")
            figure.savefig(self.folder / "losses.png", dpi=90)
            plt.close(figure)

    def _draw(self, axis: Any, part: str, title: str, prefix: str) -> None:
        """Draw every curve of one part of the records."""
        epochs = [r["epoch"] for r in self.records]
        for name in dict.fromkeys(n for r in self.records for n in r.get(part, {})):
            values = [r.get(part, {}).get(name) for r in self.records]
            values = [float("nan") if v is None else v for v in values]
            axis.plot(epochs, values, label=name.removeprefix(prefix), marker="." if len(epochs) < 30 else None)
        axis.set_title(title)
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize="small")


def flatten(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested records as one level of ``part/name`` keys."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[prefix + key] = value
    return flat
