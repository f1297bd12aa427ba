"""From a plan and a fold to the loaders of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnssl.data.loader import (
    IndexedLoader,
    InProcessBatches,
    LabeledLoader,
    PairedLoader,
    PseudoLoader,
    UnlabeledLoader,
    WorkerBatches,
    wrap_loader,
)
from nnssl.data.seeding import Stream
from nnssl.data.unlabeled import UnlabeledDataset
from nnssl.data.views import labeled_transforms
from nnssl.plans.manifest import part_folder

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


@dataclass(frozen=True)
class Loaders:
    """What a run draws from.

    Args:
        train: labeled, unlabeled and pseudo-labeled batches.
        validation: patches of nnU-Net's pseudo Dice.
        monitor: patches of the branch record, the same every round.
        monitor_name: what the monitored patches come from.
    """

    train: InProcessBatches | WorkerBatches
    validation: InProcessBatches | WorkerBatches
    monitor: IndexedLoader
    monitor_name: str


def build_loaders(trainer: SemiSupervisedTrainer, train: Any, val: Any) -> Loaders:
    """Build every loader of a run, each starting where the trainer stands.

    Args:
        trainer: an initialized trainer.
        train: nnU-Net data set of the training cases.
        val: nnU-Net data set of the validation cases.
    """
    rotation, dummy_2d, crop, mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    config, manager = trainer.configuration_manager, trainer.label_manager
    patch, masked, scales = config.patch_size, config.use_mask_for_norm, trainer._get_deep_supervision_scales()
    labels = {
        "is_cascaded": False,
        "foreground_labels": manager.foreground_labels,
        "regions": manager.foreground_regions if manager.has_regions else None,
        "ignore_label": manager.ignore_label,
    }
    # the label spaces differ by the ignore label alone, which is a channel of its own where there are regions
    stock, unsure = (
        trainer.training_views(
            trainer.get_training_transforms(
                patch, rotation, scales, mirror_axes, dummy_2d, masked, **{**labels, "ignore_label": ignore}
            )
        )
        for ignore in (manager.ignore_label, trainer.pseudo_manager.ignore_label)
    )
    val_transforms = trainer.get_validation_transforms(scales, **labels)

    def plain(dataset: Any) -> nnUNetDataLoader:
        oversample = trainer.oversample_foreground_percent
        return nnUNetDataLoader(
            dataset, trainer.batch_size, patch, patch, manager, oversample, transforms=val_transforms
        )

    def crops(kind: type[nnUNetDataLoader], dataset: Any, noisy: bool, count: int, transforms: Any) -> Any:
        known = trainer.pseudo_manager if noisy else manager
        drawn = trainer.pseudo_probabilities if noisy else None
        return kind(
            dataset, count, crop, patch, known, trainer.oversample_foreground_percent, drawn, transforms=transforms
        )

    alone = trainer.settings.supervision == "pseudo"  # masks stand in for labels, whatever method learns from them
    noisy = _noisy_cases(trainer) if trainer.pseudo_ids else None
    views = labeled_transforms(unsure if alone else stock, trainer.labeled_weak_view)
    labeled = crops(LabeledLoader, noisy if alone else train, alone, trainer.batch_size, views)
    pseudo = None
    if noisy is not None and not alone:
        pseudo = crops(PseudoLoader, noisy, True, trainer.pseudo_batch_size(), labeled_transforms(unsure))
    unlabeled = None
    if trainer.unlabeled_ids:
        pool = UnlabeledDataset(trainer.preprocessed_dataset_folder + "_unlabeled", trainer.unlabeled_ids, any(masked))
        views, count = trainer.unlabeled_views(stock), trainer.unlabeled_batch_size()
        unlabeled = UnlabeledLoader(pool, count, crop, patch, manager, 0.0, transforms=views)
    elif trainer.uses_unlabeled:
        trainer.warn("no unlabeled case: this run trains on the labeled cases alone, as SupervisedTrainer would")
    if trainer.monitoring_ids:
        folder = trainer.preprocessed_dataset_folder + "_monitoring"
        watched, name = infer_dataset_class(folder)(folder, trainer.monitoring_ids), "imagesVal"
    else:
        watched, name = val, "training cases" if trainer.fold == "all" else f"validation cases of fold {trainer.fold}"

    seed, rank = trainer.run_options.seed, trainer.local_rank
    workers, pin = get_allowed_n_proc_DA(), trainer.device.type == "cuda"
    validated = trainer.current_epoch * trainer.num_val_iterations_per_epoch
    paired = PairedLoader(labeled, unlabeled, pseudo, seed=seed, rank=rank, start_index=trainer.global_step)
    validation = IndexedLoader(plain(val), seed=seed, rank=rank, stream=Stream.VAL_BATCH, start_index=validated)
    monitor = IndexedLoader(plain(watched), seed=seed, stream=Stream.MONITORING_BATCH)
    return Loaders(wrap_loader(paired, workers, pin), wrap_loader(validation, (workers + 1) // 2, pin), monitor, name)


def _noisy_cases(trainer: SemiSupervisedTrainer) -> Any:
    """Return the preprocessed cases with masks of unknown quality as an nnU-Net data set."""
    identifier = trainer.configuration_manager.data_identifier
    folder = str(part_folder(Path(trainer.preprocessed_dataset_folder_base), identifier, "pseudo"))
    return infer_dataset_class(folder)(folder, trainer.pseudo_ids)
