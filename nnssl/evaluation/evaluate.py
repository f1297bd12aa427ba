"""Evaluate a folder of predictions against a folder of references, in parallel over cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnssl.errors import UserError
from nnssl.evaluation.labels import LabelSet, label_values, read_domains, read_provenance
from nnssl.evaluation.masks import match_masks, read_mask, require_same_geometry
from nnssl.evaluation.metrics import Emptiness, emptiness
from nnssl.evaluation.pooled import BACKGROUND, Counts, count, pooled_iou
from nnssl.evaluation.protocols import CaseMetrics, Protocol, get_protocol
from nnssl.plans.parallel import default_processes


def evaluate_folders(
    reference: str | Path,
    prediction: str | Path,
    labels: Mapping[str, int | Sequence[int]] | LabelSet | None = None,
    protocol: str = "mm",
    nsd_tolerance_mm: float = 1.0,
    num_processes: int | None = None,
    domains: Mapping[str, str] | None = None,
    provenance: str | None = None,
) -> dict[str, Any]:
    """Measure every case of ``reference`` in ``prediction``, matched by file name.

    Args:
        reference: folder of reference masks (NIfTI, NRRD, MHA, PNG).
        prediction: folder of predicted masks.
        labels: nnU-Net's block ``labels`` (values, or lists for regions; ``ignore``). Default: the ``dataset.json`` in
            the prediction folder, which nnU-Net writes there, else one class per value in the references.
        protocol: ``mm`` or one of the ``literature-*`` protocols.
        nsd_tolerance_mm: tolerance of the normalized surface Dice.
        num_processes: worker processes (1: none). Default: nnUNet_def_n_proc, else at most 8.
        domains: domain of each case (:func:`nnssl.evaluation.labels.read_domains`). Default: those of the
            ``dataset.json`` that the labels are taken from by default.
        provenance: what was done to the scans, such as a crop around the reference label; it is repeated as a note.
            Default: that of the ``dataset.json`` in the prediction folder.

    Returns:
        Plain JSON data without NaN (None where a value is undefined): ``protocol``, ``unit``, ``metrics``,
        ``nsd_tolerance_mm``, ``labels``, ``ignore_label``, ``reference``, ``prediction``, ``provenance``, ``notes``;
        ``cases`` {case: {class: {metric: value}}}; ``mean``, ``std`` and ``count`` over cases {class: {metric: value}};
        ``foreground_mean`` {metric: mean over classes of the class means} (nnU-Net's convention);
        ``case_foreground`` {case: {metric: mean over the classes not excluded}} with ``foreground_mean_over_cases`` and
        ``foreground_std_over_cases``; ``empty`` {class: {"both_empty": n, "one_empty": n, "cases": {case: which}}};
        ``miou``: IoU over the voxels of all cases together (:func:`nnssl.evaluation.pooled.pooled_iou`);
        ``domains`` {domain: {"cases": [...], and ``mean`` to ``miou`` as above over the domain's cases}}.

    Raises:
        UserError: if a prediction is missing, lies on another grid, or holds labels that dataset.json does not know.
    """
    chosen = get_protocol(protocol)
    if not (np.isfinite(nsd_tolerance_mm) and nsd_tolerance_mm >= 0):
        raise UserError("--nsd_tolerance must be a distance in mm", nsd_tolerance_mm, "0 or more")
    processes = default_processes() if num_processes is None else num_processes
    if processes < 1:
        raise UserError("-np must be a number of processes", processes, "1 or more")
    own = Path(prediction) / "dataset.json"
    if domains is None:
        domains = read_domains(own) if labels is None and own.is_file() else {}
    if provenance is None and labels is None and own.is_file():
        provenance = read_provenance(own)
    pairs, extra = match_masks(Path(reference), Path(prediction))
    with _workers(min(processes, len(pairs))) as mapper:
        label_set, notes = resolve_labels(labels, Path(prediction), [path for path, _ in pairs.values()], mapper)
        jobs = [_Job(case, *paths, label_set, chosen.name, float(nsd_tolerance_mm)) for case, paths in pairs.items()]
        scores = list(_progress(mapper(_evaluate_case, jobs), len(jobs), "evaluate"))
    if extra:
        notes.append(f"{len(extra)} predictions without a reference were left out, the first is {extra[0]}")
    notes += _notes_on_unknown(scores)
    by_domain = _by_domain(scores, domains)
    if by_domain and (without := [score.case for score in scores if score.case not in domains]):
        notes.append(f"{len(without)} cases have no domain, the first is {without[0]}")
    head = {
        "protocol": chosen.name,
        "unit": chosen.unit if chosen.unit != "mm" or all(s.has_spacing for s in scores) else "px",
        "metrics": list(chosen.metrics),
        "nsd_tolerance_mm": float(nsd_tolerance_mm) if "nsd" in chosen.metrics else None,
        "labels": label_set.as_json(),
        "ignore_label": label_set.ignore,
        "reference": str(reference),
        "prediction": str(prediction),
        "provenance": provenance,
        "notes": [*([f"the scans: {provenance}"] if provenance else []), *chosen.notes, *notes],
    }
    names = list(label_set.classes)
    return head | _aggregate(scores, names, chosen) | {"domains": _each_domain(by_domain, names, chosen)}


def resolve_labels(
    labels: Mapping[str, int | Sequence[int]] | LabelSet | None,
    prediction: Path,
    references: list[Path],
    mapper: Callable = map,
) -> tuple[LabelSet, list[str]]:
    """Return the label set to evaluate and notes on where it comes from."""
    if isinstance(labels, LabelSet):
        return labels, []
    if labels is not None:
        return LabelSet.from_block(labels), []
    path = prediction / "dataset.json"
    if path.is_file():
        return LabelSet.from_dataset_json(path), []
    found: set[int] = set()
    for values in _progress(mapper(_label_values, references), len(references), "read labels"):
        found.update(values)
    label_set = LabelSet.from_values(found)
    names = ", ".join(label_set.classes)
    return label_set, [f"no dataset.json given or in {prediction}: classes are the values in the references ({names})"]


@dataclass(frozen=True)
class _Job:
    case: str
    reference: Path
    prediction: Path
    labels: LabelSet
    protocol: str
    tolerance_mm: float


@dataclass(frozen=True)
class _Score:
    case: str
    metrics: dict[str, CaseMetrics]
    empty: dict[str, Emptiness]
    counts: dict[str, Counts]
    has_spacing: bool
    unknown: list[int]


def _evaluate_case(job: _Job) -> _Score:
    reference, prediction = read_mask(job.reference), read_mask(job.prediction)
    require_same_geometry(job.case, reference, prediction)
    unknown: set[int] = set()
    for mask, path in ((reference, job.reference), (prediction, job.prediction)):
        others = job.labels.unknown(mask.array)
        if others and job.labels.known is not None:
            allowed = sorted(job.labels.known)
            raise UserError("label values must be in dataset.json", f"{others} in {path}", allowed, "check -djfile")
        unknown.update(others)
    compute = get_protocol(job.protocol).compute
    metrics: dict[str, CaseMetrics] = {}
    empty: dict[str, Emptiness] = {}
    counts: dict[str, Counts] = {}
    ignore = job.labels.ignore
    valid = np.ones(reference.array.shape, bool) if ignore is None else reference.array != ignore
    rest_predicted, rest_referred = valid.copy(), valid.copy()  # background: valid and in no class
    for name in job.labels.classes:
        predicted, referred = (job.labels.mask(m.array, name) & valid for m in (prediction, reference))
        rest_predicted &= ~predicted
        rest_referred &= ~referred
        metrics[name] = compute(predicted, referred, reference.spacing, job.tolerance_mm)
        empty[name] = emptiness(predicted, referred)
        counts[name] = count(predicted, referred)
    counts[BACKGROUND] = count(rest_predicted, rest_referred)
    return _Score(job.case, metrics, empty, counts, reference.has_spacing, sorted(unknown))


def _label_values(path: Path) -> list[int]:
    return label_values(read_mask(path).array)


def _notes_on_unknown(scores: list[_Score]) -> list[str]:
    found = sorted({value for score in scores for value in score.unknown})
    return [f"label values {found} are in the masks but in no class: they count as background"] if found else []


@contextmanager
def _workers(processes: int) -> Iterator[Callable[..., Iterable]]:
    """Provide a ``map``, over a pool if there is more than one process; the first error ends the pool at once."""
    if processes <= 1:
        yield map
        return
    # spawn: a fork of a process in which torch or ITK threads run can hang
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        try:
            yield pool.map
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _progress(results: Iterable, total: int, what: str) -> Iterable:
    return tqdm(results, desc=what, total=total, unit="case", disable=None, leave=False)


def _aggregate(scores: list[_Score], names: list[str], protocol: Protocol) -> dict[str, Any]:
    table = {score.case: score.metrics for score in scores}
    per_class = {n: {m: _present(table[c][n][m] for c in table) for m in protocol.metrics} for n in names}
    case_mean = {
        case: {m: _mean(_present(by_class[n][m] for n in names)) for m in protocol.metrics}
        for case, by_class in table.items()
    }
    mean = _each(per_class, _mean)
    over_cases = {m: _present(case_mean[c][m] for c in case_mean) for m in protocol.metrics}
    return {
        "cases": table,
        "mean": mean,
        "std": _each(per_class, _std),
        "count": _each(per_class, len),
        "foreground_mean": {m: _mean(_present(mean[n][m] for n in names)) for m in protocol.metrics},
        "case_foreground": case_mean,
        "foreground_mean_over_cases": {m: _mean(v) for m, v in over_cases.items()},
        "foreground_std_over_cases": {m: _std(v) for m, v in over_cases.items()},
        "empty": {n: _count_empty(scores, n) for n in names},
        "miou": pooled_iou((score.counts for score in scores), names),
    }


def _by_domain(scores: list[_Score], domains: Mapping[str, str]) -> dict[str, list[_Score]]:
    groups: dict[str, list[_Score]] = {}
    for score in scores:
        if score.case in domains:
            groups.setdefault(domains[score.case], []).append(score)
    return groups


def _each_domain(by_domain: dict[str, list[_Score]], names: list[str], protocol: Protocol) -> dict[str, Any]:
    """Return the aggregates of each domain, without the values of single cases, which stand above."""
    result = {}
    for domain, scores in sorted(by_domain.items()):
        over = _aggregate(scores, names, protocol)
        result[domain] = over | {"cases": [score.case for score in scores]}
        del result[domain]["case_foreground"]
    return result


def _count_empty(scores: list[_Score], name: str) -> dict[str, Any]:
    cases = {score.case: score.empty[name] for score in scores if score.empty[name] != "none_empty"}
    counts: dict[str, Any] = {which: list(cases.values()).count(which) for which in ("both_empty", "one_empty")}
    return counts | {"cases": cases}


def _each(per_class: dict[str, dict[str, list[float]]], function: Callable[[list[float]], Any]) -> dict[str, dict]:
    return {n: {m: function(values) for m, values in by_metric.items()} for n, by_metric in per_class.items()}


def _present(values: Any) -> list[float]:
    return [v for v in values if v is not None]


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _std(values: list[float]) -> float | None:
    """Return the sample standard deviation; None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
