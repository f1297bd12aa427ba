"""Masks of unknown quality in training: which cases a run may draw, and what it has seen when it ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from nnssl.errors import UserError
from nnssl.layout import PSEUDO_FOLDER
from nnssl.plans.pseudo import SAW, pseudo_cases, pseudo_digest, pseudo_weights, require_unseen, with_ignore

if TYPE_CHECKING:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    from nnssl.plans.splits import FoldCases
    from nnssl.trainers.base import SemiSupervisedTrainer


def unsure_label_manager(trainer: SemiSupervisedTrainer) -> LabelManager:
    """Return the data set's label manager with the value of unsure voxels as its ignore label."""
    return trainer.plans_manager.get_label_manager(with_ignore(trainer.dataset_json))


def take_pseudo_cases(trainer: SemiSupervisedTrainer, manifest: Mapping[str, Any], chosen: FoldCases) -> None:
    """Give the trainer the cases with masks that its fold may draw, their probabilities and their digest.

    Cases of validation patients are left out, as among the unlabeled ones.

    Raises:
        UserError: if the run needs masks and has none, or if their model saw a held-out case.
    """
    trainer.pseudo_ids, trainer.pseudo_probabilities, trainer.pseudo_hash = [], [], None
    s = trainer.settings
    if s.supervision == "gt":
        return
    if s.supervision == "gt+pseudo" and s.pseudo_weight == 0:
        trainer.warn(f"pseudo_weight=0: no mask of {PSEUDO_FOLDER} is drawn, as with supervision=gt")
        return
    identifier = trainer.configuration_manager.data_identifier
    allowed = set(chosen.unlabeled)
    cases = [case for case in pseudo_cases(manifest, identifier) if case in allowed]
    if not cases:
        rule = f"supervision={s.supervision} needs preprocessed masks in {PSEUDO_FOLDER}"
        remedy = "make them with nnssl_pseudo_label, then run nnssl_plan_and_preprocess"
        raise UserError(rule, f"none for fold {trainer.fold}", "supervision=gt without masks", remedy)
    held_out = {"imagesVal": manifest["monitoring"], "imagesTs": manifest["test"]}
    if trainer.fold != "all":
        held_out[f"val of fold {trainer.fold}"] = _hashes(manifest, chosen.val)
    require_unseen(manifest["pseudo_source"]["saw"], held_out)
    weights = pseudo_weights(manifest, cases)
    trainer.pseudo_ids, trainer.pseudo_probabilities = cases, [weight / sum(weights) for weight in weights]
    trainer.pseudo_hash = pseudo_digest(manifest, identifier, cases)


def seen_cases(
    trainer: SemiSupervisedTrainer, manifest: Mapping[str, Any], chosen: FoldCases
) -> dict[str, dict[str, str] | None]:
    """Return the labeled cases that a run sees, by their content: for ``nnssl_run.json``.

    Returns:
        ``labeled``: those that train; ``watched``: those that choose ``checkpoint_best``; ``inherited``: those that the
        model of its masks saw, None if that is unknown.
    """
    trained = [] if trainer.settings.supervision == "pseudo" else chosen.train
    inherited = all_seen(manifest["pseudo_source"]["saw"]) if trainer.pseudo_ids else {}
    return {"labeled": _hashes(manifest, trained), "watched": _hashes(manifest, chosen.val), "inherited": inherited}


def all_seen(saw: Mapping[str, Mapping[str, str]] | None) -> dict[str, str] | None:
    """Return every case of a record's ``saw`` by its content, whatever the reason; None if that is unknown."""
    if saw is None:
        return None
    found: dict[str, str] = {}
    for reason in SAW:
        for case, value in saw.get(reason, {}).items():
            clash = found.get(case, value) != value  # another data set may call another case so
            found[f"{case} ({value[:8]})" if clash else case] = value
    return found


def _hashes(manifest: Mapping[str, Any], cases: Iterable[str]) -> dict[str, str]:
    return {case: manifest["labeled"][case] for case in cases}
