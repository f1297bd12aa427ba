"""The demo's report: one HTML file that opens offline. Loads no torch."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1d232b; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .35rem .9rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #1d232b; }
tbody td { border-bottom: 1px solid #d5dae1; } .best { font-weight: 700; }
img { max-width: 100%; display: block; margin: 1rem 0; border: 1px solid #d5dae1; }
pre { background: #f3f5f8; padding: .9rem; overflow-x: auto; font-size: .85rem; }
.note { border-left: 4px solid #e69f00; padding: .2rem 1rem; background: #fdf7ea; }
@media (prefers-color-scheme: dark) {
  body { background: #14181d; color: #e3e7ec; }
  thead th { border-color: #e3e7ec; } tbody td, img { border-color: #3a424d; }
  pre { background: #1f252c; } .note { background: #2a2415; }
}
"""


def write_report(path: Path, summary: Mapping, pictures: Sequence[Path], styles: Mapping[str, str]) -> None:
    """Write the report.

    Args:
        path: the HTML file.
        summary: content of ``summary.json``.
        pictures: PNG files to embed.
        styles: {test case: scanner style}.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(build_report(summary, pictures, styles), encoding="utf-8")
    temporary.replace(path)


def build_report(summary: Mapping, pictures: Sequence[Path], styles: Mapping[str, str]) -> str:
    """Return the HTML text; see :func:`write_report`."""
    sections = [
        "<h1>nnssl demo: few labeled scans, many unlabeled ones</h1>",
        _what(summary),
        "<h2>Results on the test scans</h2>",
        _results(summary["trainers"]),
        _caveats(summary),
        "<h2>Pictures</h2><p>The first test scans in name order, on the slice with the largest reference area. "
        "They were not selected by result.</p>",
        *(_picture(p) for p in pictures),
        "<h2>Every test scan</h2>",
        _cases(summary["trainers"], styles),
        "<h2>Commands</h2><p>nnU-Net's three variables pointed into the demo's folder. To repeat a step by hand:</p>",
        f"<pre>{escape(chr(10).join(summary['commands']))}</pre>",
        _footer(summary),
    ]
    head = f'<meta charset="utf-8"><title>nnssl demo</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{chr(10).join(sections)}\n</body></html>\n'


def _what(summary: Mapping) -> str:
    data, plan = summary["data"], summary["configuration"]
    return (
        f"<p>{data['labeled']} labeled and {data['unlabeled']} unlabeled scans to train on, {data['test']} others to "
        "test on. The scans are invented: a muscular ring around a cavity, a crescent beside it, look-alike structures "
        f"around them, seen by {len(data['styles'])} scanner styles ({escape(', '.join(data['styles']))}). "
        "The masks of the unlabeled scans were never written to disk.</p>"
        f"<p>Each trainer ran {summary['iterations']} steps from the same plan ({escape(plan['name'])}, patch "
        f"{'x'.join(map(str, plan['patch_size']))}, {plan['batch_size']} labeled items a step) and the same seed "
        f"({summary['seed']}). SupervisedTrainer sees the labeled scans only; DiffCLTrainer sees the unlabeled ones as "
        "well.</p>"
    )


def _results(trainers: Mapping) -> str:
    classes = list(dict.fromkeys(name for scores in trainers.values() for name in scores["dice"]))
    header = ["trainer", "mean Dice", *(f"Dice {c}" for c in classes), "HD95 (mm)", "training (s)"]
    columns = {
        name: [s["dice_mean"], *(s["dice"].get(c) for c in classes), s["hd95_mm"]] for name, s in trainers.items()
    }
    best = []
    for i in range(len(classes) + 2):
        values = [v[i] for v in columns.values() if v[i] is not None]
        best.append((min if i == len(classes) + 1 else max)(values) if values else None)
    rows = []
    for name, values in columns.items():
        cells = [
            _cell(v, 1 if i == len(values) - 1 else 3, v is not None and v == best[i]) for i, v in enumerate(values)
        ]
        rows.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}{_cell(trainers[name]['seconds'], 0)}</tr>")
    return _table(header, rows)


def _cases(trainers: Mapping, styles: Mapping[str, str]) -> str:
    cases = sorted({case for scores in trainers.values() for case in scores["cases"]})
    rows = []
    for case in cases:
        cells = "".join(_cell(scores["cases"].get(case), 3) for scores in trainers.values())
        rows.append(f"<tr><td>{escape(case)}</td><td>{escape(styles.get(case, ''))}</td>{cells}</tr>")
    return _table(["scan", "style", *(f"Dice {name}" for name in trainers)], rows)


def _caveats(summary: Mapping) -> str:
    return (
        '<div class="note"><p><b>What these numbers are not.</b> The scans are synthetic, there is one seed, and '
        f"{summary['data']['test']} test scans: a small difference is within what another seed would change. Both "
        "trainers had the same number of steps, not the same time: a step of DiffCLTrainer costs several supervised "
        "steps. Neither was tuned for this data, and the training is far shorter than a real one. The demo shows that "
        "the chain works on this machine; evidence on real scans is on the documentation's results page.</p></div>"
    )


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{escape(path.stem)}: image, reference and predictions" src="data:image/png;base64,{data}">'


def _footer(summary: Mapping) -> str:
    used = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    machine = summary["machine"]
    total = f"{summary['seconds_total']:.0f} s in all; " if "seconds_total" in summary else ""
    return f"<h2>Made with</h2><p>{escape(total + used)}; {escape(machine['platform'])}, {machine['cores']} cores.</p>"


def _table(header: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(value: float | None, digits: int, best: bool = False) -> str:
    text = "n/a" if value is None else f"{value:.{digits}f}"
    return f'<td class="best">{text}</td>' if best else f"<td>{text}</td>"
