"""Splits for few labeled cases: patients, not cases, are the unit. Loads no torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from nnssl.errors import UserError

Split = dict[str, list[str]]


@dataclass(frozen=True)
class FoldCases:
    """The cases of one fold, each list sorted.

    Args:
        train: labeled cases to train on.
        val: labeled cases to validate on; for fold ``all`` the training cases themselves.
        unlabeled: unlabeled cases to train on; no case of a validation patient is among them.
    """

    train: list[str]
    val: list[str]
    unlabeled: list[str]


def make_splits(
    cases: list[str], patient: Callable[[str], str], seed: int = 12345, domain: Callable[[str], str] | None = None
) -> list[Split]:
    """Split labeled cases patient-wise: five folds from 5 patients on, leave-one-out for 2 to 4, none for 1.

    With one case a patient and at least 5 patients the folds equal nnU-Net's own (shuffled five-fold, seed 12345).
    Where the labeled cases come from several domains, the shuffled patients of each are dealt out to the folds in turn.

    Args:
        cases: ids of the labeled cases.
        patient: returns the patient of a case.
        seed: seed of the shuffle.
        domain: returns the domain of a case, if the data set has domains.

    Returns:
        One ``{"train": [...], "val": [...]}`` a fold; an empty list if only fold ``all`` makes sense.
    """
    by_patient: dict[str, list[str]] = {}
    for case in sorted(cases):
        by_patient.setdefault(patient(case), []).append(case)
    patients = sorted(by_patient)
    if len(patients) < 2:
        return []
    order = np.arange(len(patients))
    if len(patients) >= 5:
        np.random.RandomState(seed).shuffle(order)  # as scikit-learn's KFold does, which nnU-Net uses
    folds = min(5, len(patients))
    parts = np.array_split(order, folds)
    home = {p: sorted({domain(case) for case in by_patient[p]}) for p in patients} if domain else {}
    if len({tuple(names) for names in home.values()}) > 1:
        order = np.array(sorted(order, key=lambda i: home[patients[i]]))  # stable: shuffled within each domain
        parts = [order[i::folds] for i in range(folds)]
    splits = []
    for part in parts:
        held_out = {patients[i] for i in part}
        splits.append(
            {
                "train": sorted(c for p in patients if p not in held_out for c in by_patient[p]),
                "val": sorted(c for p in held_out for c in by_patient[p]),
            }
        )
    return splits


def fold_cases(
    splits: list[Split],
    fold: int | str,
    labeled: Iterable[str],
    unlabeled: Iterable[str],
    patient: Callable[[str], str],
) -> FoldCases:
    """Return the cases of a fold and keep every image of its validation patients out of training.

    Args:
        splits: content of ``splits_final.json``; an entry may restrict the fold's ``"unlabeled"`` cases.
        fold: index of a split, or ``"all"`` (train and validate on every labeled case).
        labeled: all labeled cases that were preprocessed.
        unlabeled: all unlabeled cases that were preprocessed.
        patient: returns the patient of a case.

    Raises:
        UserError: if the fold does not exist or its entry names unknown cases.
    """
    labeled, unlabeled = set(labeled), set(unlabeled)
    if str(fold) == "all":
        return FoldCases(sorted(labeled), sorted(labeled), sorted(unlabeled))
    index = int(fold) if str(fold).isdigit() else -1
    if not 0 <= index < len(splits):
        allowed = "all" + "".join(f", {i}" for i in range(len(splits)))
        raise UserError("the fold must exist", repr(fold), allowed, "choose an allowed fold or edit splits_final.json")
    split = splits[index]
    train, val = set(split["train"]), set(split["val"])
    pool = set(split["unlabeled"]) if "unlabeled" in split else unlabeled
    _require_known(index, "train and val", train | val, labeled)
    _require_known(index, "unlabeled", pool, unlabeled)
    val_patients = {patient(case) for case in val}
    shared = val_patients & {patient(case) for case in train}
    if shared:
        message = f"fold {index}: patients in train and val ({', '.join(sorted(shared)[:5])}); validation is too good"
        warnings.warn(message, stacklevel=2)
    return FoldCases(sorted(train), sorted(val), sorted(c for c in pool if patient(c) not in val_patients))


def _require_known(fold: int, what: str, named: set[str], known: set[str]) -> None:
    unknown = sorted(named - known)
    if unknown:
        got = f"{len(unknown)} unknown ({', '.join(unknown[:3])})"
        rule = f"fold {fold} of splits_final.json must name preprocessed cases under {what}"
        raise UserError(
            rule, got, f"{len(known)} cases", "delete or repair splits_final.json and run nnssl_plan_and_preprocess"
        )
