"""The trainer every method stands on: it owns loaders, steps, schedules, checkpoints, logging and refusals."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import Tensor, nn
from tqdm import tqdm

from nnssl.data.seeding import Stream, seed_everything
from nnssl.data.views import unlabeled_transforms
from nnssl.errors import UserError
from nnssl.layout import RawDataset
from nnssl.losses.precision import fp32
from nnssl.networks.planned import set_dropout
from nnssl.networks.small_maps import guard_small_maps
from nnssl.plans.manifest import load_manifest, manifest_digest, monitoring_cases, require_current, unlabeled_cases
from nnssl.plans.splits import fold_cases
from nnssl.trainers.batches import build_loaders
from nnssl.trainers.monitoring import branch_dice
from nnssl.trainers.pseudo_stream import seen_cases, take_pseudo_cases, unsure_label_manager
from nnssl.trainers.recording import epoch_line, epoch_record, memory_note, objective, write_run_manifest
from nnssl.trainers.run_options import RunOptions
from nnssl.trainers.settings import Settings
from nnssl.trainers.state import collect_state, require_own, restore_state
from nnssl.trainers.stepping import LossGroup, Partner, StepRunner, broadcast_weights, make_optimizer, unwrap
from nnssl.training.checkpoints import load_safely, require_space, save_atomically
from nnssl.training.ema import EMATeacher
from nnssl.training.foreground import ForegroundWatch
from nnssl.training.label_space import LabelSpace
from nnssl.training.run_log import RunLog
from nnssl.training.signals import EXIT_STOPPED, StopRequest

#: A run ends with an error after this many steps in a row with a loss that is not finite.
MAX_BAD_STEPS = 10


class SemiSupervisedTrainer(nnUNetTrainer):
    """Base of all methods.

    A method sets the class attributes below, builds what it needs in :meth:`build_method`, and implements
    :meth:`compute_losses`. It never touches devices, backward passes, optimizer steps, checkpoints or logs.
    ``self.network`` is always the network that predicts.
    """

    #: Settings dataclass of the method.
    settings_class: ClassVar[type[Settings]] = Settings
    #: Whether the method also wants the labeled crop without intensity augmentation (``batch['weak']``).
    labeled_weak_view: ClassVar[bool] = False
    #: Whether the method's mathematics covers overlapping regions (sigmoid heads).
    supports_regions: ClassVar[bool] = True
    #: Whether the method draws unlabeled batches.
    uses_unlabeled: ClassVar[bool] = True
    #: Whether the method computes the loss on ``batch['pseudo']`` itself; otherwise the base does.
    handles_pseudo: ClassVar[bool] = False
    #: Differences of two branches' Dice to record each round: name -> (branch, branch it is compared with).
    branch_differences: ClassVar[dict[str, tuple[str, str]]] = {}

    # ------------------------------------------------------------------ what a method implements
    def build_method(self) -> None:
        """Build partner networks and modules (:meth:`add_partner`, :meth:`add_teacher`, ``self.modules``)."""

    def compute_losses(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield the loss groups of one step; see :class:`nnssl.trainers.stepping.LossGroup`."""
        raise NotImplementedError(f"{type(self).__name__} must implement compute_losses")

    def before_step(self) -> None:
        """Run before the losses of each step."""

    def after_step(self) -> None:
        """Run after the optimizers have stepped, and after the teachers have followed."""

    def branches(self, x: Tensor) -> dict[str, Tensor]:
        """Return the logits of everything that makes pseudo-labels on images (b, c, ...), for the branch record."""
        return {"network": self.predict_logits(x)}

    def predict_logits(self, x: Tensor) -> Tensor:
        """Return the predicting network's logits at full resolution."""
        return full_resolution(self.network(x))

    @classmethod
    def adapt_plans(cls, plans: dict, configuration: str, settings: Settings) -> None:
        """Write into the run's plans what a network needs to be built (idempotent)."""

    @classmethod
    def network_plans(cls, plans: dict, configuration: str, settings: Settings) -> None:
        """Write everything that decides the run's network into its own copy of the plans (idempotent).

        Raises:
            UserError: dropout is asked for, and the network that the method builds is none that nnU-Net plans.
        """
        if settings.dropout > 0:
            set_dropout(plans["configurations"][configuration], settings.dropout)
        cls.adapt_plans(plans, configuration, settings)
        kwargs = plans["configurations"][configuration]["architecture"]["arch_kwargs"]
        if settings.dropout > 0 and not kwargs.get("dropout_op"):
            rule = "dropout is an option of the planned network"
            raise UserError(rule, f"dropout={settings.dropout} of another network", "0", "leave dropout out")

    # ------------------------------------------------------------------ construction
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature is frozen
    ) -> None:
        plans = copy.deepcopy(plans)
        plans.setdefault("continue_training", False)
        block = plans.setdefault("nnssl", {})
        self.settings = self.settings_class.from_mapping(block.get(type(self).__name__, {}))
        self.run_options = RunOptions.from_plans(plans)
        self.network_plans(plans, configuration, self.settings)
        block[type(self).__name__] = self.settings.to_dict()
        block["run"] = self.run_options.to_dict()
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.run_options.precision != "auto":
            self.grad_scaler = None  # bfloat16 has single precision's range, nothing underflows
        if self.is_ddp and device.type == "cpu":  # nnU-Net takes every process group for CUDA; gloo runs on CPUs
            self.device, self.grad_scaler = device, None
        self._refuse_unsupported()
        self.initial_lr = self.settings.initial_lr
        self.weight_decay = self.settings.weight_decay
        self.enable_deep_supervision = self.settings.deep_supervision
        self.num_epochs = self.run_options.epochs
        self.num_iterations_per_epoch = self.run_options.iterations_per_epoch
        self.num_val_iterations_per_epoch = self.run_options.validation_iterations
        self.save_every = 1
        self.pseudo_manager = unsure_label_manager(self)
        noisy = self.settings.supervision != "gt"  # targets may then hold unsure voxels, which every method must know
        self.label_space = LabelSpace.from_label_manager(self.pseudo_manager if noisy else self.label_manager)
        self.partners: dict[str, Partner] = {}
        self.initial_lrs: dict[str, float] = {}
        self.teachers: dict[str, tuple[str, EMATeacher]] = {}
        self.modules: dict[str, Any] = {}
        self.watch = ForegroundWatch()
        self.global_step = 0
        self.epoch_sums: dict[str, float] = {}
        self.bad_steps = 0
        self.unlabeled_ids: list[str] = []
        self.monitoring_ids: list[str] = []
        self.manifest_hash: str | None = None
        self.pseudo_ids: list[str] = []
        self.pseudo_probabilities: list[float] = []
        self.pseudo_hash: str | None = None
        self.saw: dict[str, dict[str, str] | None] = {}
        self.epoch_seconds = 0.0

    def _refuse_unsupported(self) -> None:
        if self.is_cascaded:
            rule = "cascades are not supported: unlabeled cases have no prediction of the previous stage"
            raise UserError(rule, self.configuration_name, "2d, 3d_fullres, 3d_lowres")
        if self.label_manager.has_regions and not self.supports_regions:
            rule = f"{type(self).__name__} needs exclusive classes (softmax)"
            raise UserError(rule, "a data set with regions", "labels without regions", "train another method")
        if self.settings.supervision != "gt" and self.label_manager.has_regions and not self.label_manager.ignore_label:
            rule = "masks with unsure voxels need an ignore label where a data set has regions"
            raise UserError(rule, "regions without one", "supervision=gt", "declare ignore in dataset.json")

    def initialize(self) -> None:
        """Build, place and seed every network and optimizer."""
        if self.was_initialized:
            raise RuntimeError("the trainer is initialized already")
        self._require_even("labeled", self.configuration_manager.batch_size)
        self._set_batch_size_and_oversample()
        self.num_input_channels = determine_num_input_channels(
            self.plans_manager, self.configuration_manager, self.dataset_json
        )
        seed_everything(self.run_options.seed, 0, Stream.INIT, 0)
        network = self.build_network_architecture(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            self.label_manager.num_segmentation_heads,
            self.enable_deep_supervision,
        )
        self.network = self.wrap(network)
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        self.loss = self._build_loss()
        self.noisy_loss = self._build_noisy_loss()
        if self.settings.supervision == "pseudo":
            self.loss = self.noisy_loss
        seed_everything(self.run_options.seed, 0, Stream.INIT, 1)  # partners do not depend on the network's draws
        self.build_method()
        optimizers = {"network": self.optimizer} | {name: p.optimizer for name, p in self.partners.items()}
        self.stepper = StepRunner(optimizers, self.grad_scaler, self.is_ddp, self.settings.gradient_clip)
        self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        self.was_initialized = True

    def _build_noisy_loss(self) -> nn.Module:
        """Return nnU-Net's loss for masks with unsure voxels, which it ignores."""
        own, self.label_manager = self.label_manager, self.pseudo_manager
        try:
            loss = self._build_loss()
        finally:
            self.label_manager = own
        if own.has_regions and own.ignore_label is None:
            # nnU-Net sums the cross-entropy over regions where it ignores voxels; the control's loss is their mean
            getattr(loss, "loss", loss).weight_ce /= own.num_segmentation_heads
        return loss

    def wrap(self, module: nn.Module, compiled: bool = True) -> nn.Module:
        """Place a network on the device, give it rank 0's weights, and compile it where nnU-Net compiles."""
        module = module.to(self.device)
        if self.device.type == "cpu" and self.run_options.precision == "bf16":
            guard_small_maps(module)
        if self.is_ddp:
            if self.device.type == "cuda":
                module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
            broadcast_weights(module)
        return torch.compile(module) if compiled and self._do_i_compile() else module

    def make_optimizer(self, module: nn.Module, kind: str | None = None) -> torch.optim.Optimizer:
        """Build the optimizer that every network of every method gets, unless the method names another ``kind``."""
        return make_optimizer(module, self.settings, self.lr_factor, kind)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, None]:
        """Return the optimizer of the network; the base steps the learning rate itself, per iteration."""
        return self.make_optimizer(self.network), None

    def add_partner(
        self, name: str, module: nn.Module, compiled: bool = True, optimizer: str | None = None, lr: float | None = None
    ) -> nn.Module:
        """Register a second trained network under the name its optimizer has in ``LossGroup.step``.

        Args:
            name: the partner's name.
            module: the network.
            compiled: compile it where nnU-Net compiles; not for inputs whose size changes from step to step.
            optimizer: "sgd", "adam" or "adamw"; None = that of the predicting network.
            lr: learning rate at the first step; None = that of the predicting network.
        """
        module = self.wrap(module, compiled)
        self.partners[name] = Partner(module, self.make_optimizer(module, optimizer))
        self.initial_lrs[name] = self.settings.initial_lr if lr is None else lr
        return module

    def add_teacher(self, name: str, source: str, decay: float) -> nn.Module:
        """Register an EMA teacher of ``source`` ("network" or a partner); the base updates it after each step."""
        teacher = EMATeacher(unwrap(self.trained_network(source)), decay)
        self.teachers[name] = (source, teacher)
        return teacher.module

    def trained_network(self, name: str) -> nn.Module:
        """Return the network behind an optimizer's name."""
        return self.network if name == "network" else self.partners[name].module

    def _networks(self) -> list[nn.Module]:
        return [
            self.network,
            *(p.module for p in self.partners.values()),
            *(t.module for _, t in self.teachers.values()),
        ]

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switch the low-resolution outputs of the trained networks; teachers never have them."""
        for name in ["network", *self.partners]:
            decoder = getattr(unwrap(self.trained_network(name)), "decoder", None)
            if decoder is not None and hasattr(decoder, "deep_supervision"):
                decoder.deep_supervision = enabled
        for _, teacher in self.teachers.values():
            decoder = getattr(teacher.module, "decoder", None)
            if decoder is not None and hasattr(decoder, "deep_supervision"):
                decoder.deep_supervision = False

    # ------------------------------------------------------------------ data
    def do_split(self) -> tuple[list[str], list[str]]:
        """Return training and validation ids of the fold, and remember its unlabeled ids."""
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        base, plans = Path(self.preprocessed_dataset_folder_base), self.plans_manager.plans
        require_current(base, plans, self.configuration_name)
        manifest = load_manifest(base)
        self.manifest_hash = manifest_digest(manifest, self.configuration_manager.data_identifier)
        splits_file = base / "splits_final.json"
        splits = json.loads(splits_file.read_text(encoding="utf-8")) if splits_file.is_file() else []
        labeled = self.dataset_class.get_identifiers(self.preprocessed_dataset_folder)
        unlabeled = unlabeled_cases(base, plans, self.configuration_name)
        chosen = fold_cases(splits, self.fold, labeled, unlabeled, RawDataset(base, self.dataset_json).patient)
        self.unlabeled_ids = list(chosen.unlabeled) if self.uses_unlabeled else []
        self.monitoring_ids = monitoring_cases(base, plans, self.configuration_name)
        take_pseudo_cases(self, manifest, chosen)
        self.saw = seen_cases(self, manifest, chosen)
        return list(chosen.train), list(chosen.val)

    def unlabeled_batch_size(self) -> int:
        """Return this rank's share of the unlabeled items of a step."""
        return self._share("unlabeled", self.settings.unlabeled_batch)

    def pseudo_batch_size(self) -> int:
        """Return this rank's share of the items of a step with masks of unknown quality."""
        self._require_even("pseudo", self.settings.pseudo_batch or self.configuration_manager.batch_size)
        return self._share("pseudo", self.settings.pseudo_batch)

    def _require_even(self, what: str, total: int) -> None:
        """Refuse shares of unequal size where nnU-Net's Dice gathers a row an item from every process."""
        if self.is_ddp and self.configuration_manager.batch_dice and total % dist.get_world_size():
            rule = f"with a Dice over the batch every process needs as many items of the {what} batch"
            got, world = f"{total} for {dist.get_world_size()} processes", dist.get_world_size()
            raise UserError(rule, got, f"multiples of {world}", "change -num_gpus or the batch size")

    def _share(self, what: str, wanted: int | None) -> int:
        total = wanted or self.configuration_manager.batch_size
        if not self.is_ddp:
            return total
        world, rank = dist.get_world_size(), dist.get_rank()
        if total < world:
            raise UserError(f"the {what} batch must give every process an item", total, f"{world} or more")
        return total // world + (rank < total % world)

    def get_dataloaders(self):
        """Build the paired training loader and the loaders of validation and monitoring patches."""
        loaders = build_loaders(self, *self.get_tr_and_val_datasets())
        self.monitor, self.monitor_name = loaders.monitor, loaders.monitor_name
        return loaders.train, loaders.validation

    def training_views(self, stock):
        """Return the training transforms of labeled and unlabeled crops; a method with its own overrides this."""
        return stock

    def unlabeled_views(self, stock):
        """Return the transforms of unlabeled crops; a method with its own strong view overrides this."""
        return unlabeled_transforms(stock)

    def validation_step(self, batch: dict) -> dict:
        """Run nnU-Net's validation step; on CUDA it takes half precision whatever the run's."""
        with self.precision():
            return super().validation_step(batch)

    # ------------------------------------------------------------------ one step
    @property
    def fraction(self) -> float:
        """Fraction of the run that is over, in [0, 1): the time of every schedule."""
        return self.global_step / self.run_options.total_steps

    def learning_rate(self, name: str = "network") -> float:
        """Return a network's learning rate at this step: nnU-Net's poly decay, per iteration, or constant."""
        s = self.settings
        decay = (1 - self.fraction) ** 0.9 if s.lr_schedule == "poly" else 1.0
        rate = self.initial_lrs.get(name, s.initial_lr) * decay
        return rate * min(1.0, (self.global_step + 1) / s.warmup) if s.warmup else rate

    def lr_factor(self, name: str) -> float:
        """Return the factor of the learning rate of a parameter, by its name in its network."""
        return 1.0

    def train_step(self, batch: dict) -> dict[str, float]:
        """Run one step of the method and return its named scalars (one device synchronization)."""
        seed_everything(self.run_options.seed, self.local_rank, Stream.STEP, self.global_step)
        batch = to_device(batch, self.device)
        for name, optimizer in self.stepper.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate(name) * group.get("lr_factor", 1.0)
        target = full_resolution(batch["target"])
        self.watch.update("labeled", self.label_space.foreground(target), self.label_space.valid(target))
        self.before_step()
        with self.precision():
            logged = self.stepper.run(self._loss_groups(batch))
        for source, teacher in self.teachers.values():
            teacher.update(unwrap(self.trained_network(source)), self.global_step)
        self.after_step()
        self.global_step += 1
        values = torch.stack([v.float() for v in logged.values()]).tolist() if logged else []
        scalars = dict(zip(logged, values, strict=True))
        self._watch_finiteness(scalars, batch)
        return scalars

    def _loss_groups(self, batch: dict[str, Any]) -> Iterator[LossGroup]:
        """Yield the loss on masks of unknown quality, which adds to the network's next step, then the method's."""
        noisy = batch.get("pseudo")
        if noisy is not None and not self.handles_pseudo:
            loss = self.pseudo_loss(self.network(noisy["data"]), noisy["target"])
            yield LossGroup({"loss_pseudo": self.settings.pseudo_weight * loss})
        yield from self.compute_losses(batch)

    def precision(self) -> contextlib.AbstractContextManager:
        """Return the run's autocast context: nnU-Net's half precision on CUDA by default, none elsewhere."""
        chosen = self.run_options.precision
        if chosen == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        half = chosen == "auto" and self.device.type == "cuda"
        return torch.autocast("cuda") if half else contextlib.nullcontext()

    @fp32
    def supervised_loss(self, output, target) -> Tensor:
        """Return nnU-Net's own loss (Dice + cross-entropy or BCE, deeply supervised), in single precision."""
        return self.loss(output, target)

    @fp32
    def pseudo_loss(self, output, target) -> Tensor:
        """Return nnU-Net's loss (deeply supervised) on masks of unknown quality, without their unsure voxels."""
        return self.noisy_loss(output, target)

    def watch_foreground(self, branch: str, hard: Tensor, valid: Tensor | None = None) -> None:
        """Count a branch's predicted foreground; a branch that runs away from the labeled fraction is warned of."""
        self.watch.update(branch, hard, valid)

    def _watch_finiteness(self, scalars: dict[str, float], batch: dict) -> None:
        bad = [name for name, value in scalars.items() if not np.isfinite(value)]
        found = bool(bad)
        if self.is_ddp:  # all ranks give up together, none waits for one that did
            flag = torch.tensor(float(found), device=self.device)
            dist.all_reduce(flag)
            found = flag.item() > 0
        self.bad_steps = self.bad_steps + 1 if found else 0
        if self.bad_steps >= MAX_BAD_STEPS:
            cases = ", ".join(map(str, batch["keys"]))
            rule = f"the loss must stay finite, {MAX_BAD_STEPS} steps in a row were not"
            raise UserError(rule, f"{', '.join(bad)} with labeled cases {cases}", None, "lower initial_lr or a weight")

    # ------------------------------------------------------------------ the loop
    def run_training(self) -> None:
        """Train to the end, or to a stop request (then exit with code 75 after saving)."""
        self.on_train_start()
        with StopRequest() as stop:
            while self.current_epoch < self.num_epochs:
                self._run_epoch(stop)
                self._leave_if_asked(stop)
        self.on_train_end()

    def _run_epoch(self, stop: StopRequest) -> None:
        position = self.global_step - self.current_epoch * self.num_iterations_per_epoch
        started = time.monotonic() - self.epoch_seconds
        if position == 0:
            self.epoch_sums, self.epoch_seconds = {}, 0.0
            self.watch.reset()
            started = time.monotonic()
            self.on_epoch_start()
            self.on_train_epoch_start()
        for network in self._networks():
            network.train()
        for _, teacher in self.teachers.values():
            teacher.module.eval()
        for _ in self._progress(position):
            for name, value in self.train_step(next(self.dataloader_train)).items():
                self.epoch_sums[name] = self.epoch_sums.get(name, 0.0) + value
            if self.global_step % self.num_iterations_per_epoch:
                self.epoch_seconds = time.monotonic() - started
                self._leave_if_asked(stop)
        self.epoch_seconds = time.monotonic() - started
        means = {name: total / self.num_iterations_per_epoch for name, total in self.epoch_sums.items()}
        self.on_train_epoch_end([{"loss": np.array(sum(objective(means).values()))}])
        with torch.no_grad():
            self.on_validation_epoch_start()
            batches = (next(self.dataloader_val) for _ in range(self.num_val_iterations_per_epoch))
            outputs = [self.validation_step(batch) for batch in batches]
            self.on_validation_epoch_end(outputs)
            branches = self.watched_dice()
        self.epoch_seconds = time.monotonic() - started
        self.on_epoch_end(means, branches)
        self.epoch_seconds = 0.0

    def _progress(self, position: int) -> Iterable[int]:
        """Return the epoch's remaining steps, with a bar on a terminal."""
        steps = range(position, self.num_iterations_per_epoch)
        shown = self.local_rank == 0 and sys.stderr.isatty()
        title = f"epoch {self.current_epoch + 1}/{self.num_epochs}"
        return tqdm(steps, title, initial=position, total=self.num_iterations_per_epoch, leave=False, disable=not shown)

    def _leave_if_asked(self, stop: StopRequest) -> None:
        requested = stop.requested is not None
        if self.is_ddp:  # every rank leaves at the same step, whichever got the signal
            flag = torch.tensor(float(requested), device=self.device)
            dist.all_reduce(flag)
            requested = flag.item() > 0
        if requested:
            self.save_checkpoint(os.path.join(self.output_folder, "checkpoint_latest.pth"))
            if self.is_ddp:  # no rank ends the run while rank 0 still writes
                dist.barrier()
            self.print_to_log_file(f"stopped by {stop.requested} after step {self.global_step}; continue with --c")
            self.close_loaders()
            raise SystemExit(EXIT_STOPPED)

    def on_train_start(self) -> None:
        """Check the disk, start the loaders and record what this run is made of."""
        if not self.was_initialized:
            self.initialize()
        size = sum(p.numel() * p.element_size() for network in self._networks() for p in network.parameters())
        if self.local_rank == 0:
            require_space(Path(self.output_folder), 2 * 2 * size)
        continued = self.manifest_hash, self.pseudo_hash  # the checkpoint's; None in a new run
        super().on_train_start()
        self._require_same_pool(*continued)
        self._sync_teachers()
        if self.local_rank == 0:
            tensorboard = self.run_options.tensorboard
            self.run_log = RunLog(Path(self.output_folder), self.current_epoch, tensorboard)
            write_run_manifest(self)
            if (note := memory_note(self)) is not None:
                self.print_to_log_file(note)
        self.print_to_log_file(f"branches are watched on {self.monitor_name}", also_print_to_console=True)
        if self.uses_unlabeled and getattr(self.settings, "unsupervised_weight", None) == 0:
            self.warn("unsupervised_weight=0 switches the unsupervised terms of the method off")

    def _require_same_pool(self, unlabeled: str | None, pseudo: str | None) -> None:
        """Refuse to go on with other unlabeled cases, or other masks of unknown quality, than the run began with."""
        if self.current_epoch >= self.num_epochs:
            return
        remedy = "put the old ones back, or start a new --run"
        if self.uses_unlabeled and unlabeled not in (None, self.manifest_hash):
            rule = "--c must continue on the unlabeled cases the run began with"
            raise UserError(rule, "other cases or another preprocessing", None, remedy)
        if pseudo not in (None, self.pseudo_hash):
            rule = "--c must continue on the masks of labelsPseudo the run began with"
            raise UserError(rule, "other masks, weights or another preprocessing", None, remedy)

    def _sync_teachers(self) -> None:
        """Start teachers from their source, which pretrained weights may have changed since they were built."""
        if self.global_step == 0:
            for source, teacher in self.teachers.values():
                teacher.load_state_dict(unwrap(self.trained_network(source)).state_dict())

    def plot_network_architecture(self) -> None:
        """Draw nothing: nnU-Net's drawing needs a package that no longer works."""

    def on_train_epoch_start(self) -> None:
        """Announce the epoch and log the learning rate (stepped per iteration by the base)."""
        self.print_to_log_file(f"\nEpoch {self.current_epoch}, learning rate {self.learning_rate():.5f}")
        self.logger.log("lrs", self.learning_rate(), self.current_epoch)

    def watched_dice(self) -> dict[str, float | None]:
        """Return the Dice of each branch on the same monitoring patches every round."""
        for network in self._networks():
            network.eval()
        batches = (self.monitor.batch_at(i) for i in range(self.num_val_iterations_per_epoch))
        seed_everything(self.run_options.seed, 0, Stream.SAMPLING, 0)  # branches that draw noise repeat it every round
        with self.precision():
            return branch_dice(self.branches, batches, self.label_space, self.device)

    def on_epoch_end(self, means: dict[str, float], branches: dict[str, float | None]) -> None:
        """Log the epoch, keep the best and the latest state, and go on to the next epoch."""
        epoch = self.current_epoch
        self.logger.log("epoch_end_timestamps", time.time(), epoch)
        best = self.logger.get_value("ema_fg_dice", step=-1)
        improved = bool(np.isfinite(best)) and (self._best_ema is None or best > self._best_ema)
        self.current_epoch += 1
        if self.local_rank == 0:
            self._record_epoch(epoch, means, branches)
            self.logger.plot_progress_png(self.output_folder)
        if improved:
            self._best_ema = best
            self.save_checkpoint(os.path.join(self.output_folder, "checkpoint_best.pth"))
        if self.current_epoch % self.save_every == 0 and self.current_epoch < self.num_epochs:
            self.save_checkpoint(os.path.join(self.output_folder, "checkpoint_latest.pth"))

    def _record_epoch(self, epoch: int, means: dict[str, float], branches: dict[str, float | None]) -> None:
        record = epoch_record(self, epoch, means, branches)
        self.run_log.write(record)
        self.print_to_log_file(epoch_line(self, record))
        for branch in self.watch.runaway():
            shown = record["foreground"]
            fractions = f"{shown[branch]:.4f} of the voxels, labels have {shown['labeled']:.4f}"
            self.warn(f"the foreground predicted by {branch} runs away ({fractions})")

    def warn(self, text: str) -> None:
        """Write a warning to the run's log and the console."""
        self.print_to_log_file(f"WARNING: {text}")

    def on_train_end(self) -> None:
        """Save the final state, drop the intermediate one and stop the workers."""
        self.save_checkpoint(os.path.join(self.output_folder, "checkpoint_final.pth"))
        latest = Path(self.output_folder, "checkpoint_latest.pth")
        if self.local_rank == 0 and not self.disable_checkpointing:
            latest.unlink(missing_ok=True)
        self.close_loaders()
        self.print_to_log_file("Training done.")

    def close_loaders(self) -> None:
        """Stop the loaders' worker processes."""
        for loader in (self.dataloader_train, self.dataloader_val):
            if loader is not None:
                loader.close()

    # ------------------------------------------------------------------ checkpoints
    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's nine keys and everything else under ``nnssl``, atomically."""
        if self.local_rank == 0 and not self.disable_checkpointing:
            save_atomically(collect_state(self), Path(filename))

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Continue from a checkpoint of the same method, plan and settings.

        Raises:
            UserError: if the checkpoint is unsafe, damaged or belongs to another run.
        """
        path = Path(filename_or_checkpoint)
        checkpoint = load_safely(path)
        require_own(self, checkpoint, path)
        if not self.was_initialized:
            self.initialize()
        restore_state(self, checkpoint, path)


def full_resolution(output: Tensor | list[Tensor]) -> Tensor:
    """Return logits or target at full resolution, with or without deep supervision."""
    return output[0] if isinstance(output, (list, tuple)) else output


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor of a nested batch to the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [to_device(v, device) for v in value]
    return value
