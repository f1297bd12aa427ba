"""Predict folders of images with nnU-Net's own predictor and nnssl's trainers.

The masks are those of stock ``nnUNetv2_predict``: the same predictor, the same defaults (tiles at half a patch,
Gaussian weights, mirroring), the same export on the input's own grid. What is added: the trainer look-up, checks
before the model is loaded, and no more worker processes than cases.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl.errors import UserError
from nnssl.inference.inputs import list_inputs, prepare_output
from nnssl.inference.models import TrainedModel

if TYPE_CHECKING:
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

#: What ``-device`` may be.
DEVICES = ("cuda", "mps", "cpu")


@dataclass(frozen=True)
class PredictOptions:
    """How to predict; the defaults are nnU-Net's.

    Args:
        step_size: distance of neighboring tiles in patch sizes, in (0, 1].
        stride: voxels between tiles, one number an axis of the patch in the plan's order, instead of ``step_size``; the
            probabilities of all tiles then count alike (:mod:`nnssl.inference.tiles`).
        mirroring: average over the mirror axes that the model was trained with.
        save_probabilities: also write ``CASE.npz`` and ``CASE.pkl``.
        overwrite: predict cases again whose mask exists.
        preprocessing_processes: workers that read and preprocess images; together with ``export_processes`` 0 means
            that everything runs in this process.
        export_processes: workers that resample and write masks.
        on_device: keep the aggregated logits on a GPU; ignored elsewhere.
        progress: show a progress bar.
        verbose: let nnU-Net report what it does.
    """

    step_size: float = 0.5
    stride: tuple[int, ...] | None = None
    mirroring: bool = True
    save_probabilities: bool = False
    overwrite: bool = True
    preprocessing_processes: int = 3
    export_processes: int = 3
    on_device: bool = True
    progress: bool = True
    verbose: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.step_size <= 1:
            raise UserError("-step_size must be a fraction of the patch", self.step_size, "0 < step_size <= 1")
        if self.stride is not None and (len(self.stride) not in (2, 3) or min(self.stride) < 1):
            allowed = "2 (2d) or 3 positive numbers"
            raise UserError("--stride must be distances of tiles in voxels", list(self.stride), allowed)
        processes = (self.preprocessing_processes, self.export_processes)
        if min(processes) < 0 or (0 in processes and any(processes)):
            allowed = "both at least 1, or both 0 (no worker processes)"
            raise UserError("-npp and -nps must be counts of processes", f"{processes[0]} and {processes[1]}", allowed)


def best_device(name: str | None = None) -> torch.device:
    """Return the device called ``name``, by default the best there is: cuda, else mps, else cpu.

    Raises:
        UserError: for an unknown device and for one that this machine does not have.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(d for d in DEVICES if there[d]))
    if name not in there:
        remedy = "choose the GPU with CUDA_VISIBLE_DEVICES" if name.startswith("cuda") else None
        raise UserError("-device must be a kind of device", repr(name), ", ".join(DEVICES), remedy)
    if not there[name]:
        raise UserError("-device must exist on this machine", name, ", ".join(d for d in DEVICES if there[d]))
    return torch.device(name)


def predict_folder(
    model: TrainedModel,
    inputs: Path,
    output: Path,
    options: PredictOptions | None = None,
    device: torch.device | None = None,
) -> list[str]:
    """Predict every case of a folder and write ``output/CASE.ending`` on the case's own grid.

    Args:
        model: from :func:`nnssl.inference.models.load_model`.
        inputs: folder of images ``CASE_0000.ending``.
        output: folder for the masks, created when absent.
        options: see :class:`PredictOptions`.
        device: default: the best there is.

    Returns:
        The cases of the input folder.

    Raises:
        UserError: for inputs that don't fit the model, an unwritable output, an unsafe checkpoint.
    """
    cases = list_inputs(inputs, model.file_ending, model.channels)
    prepare_output(output, inputs)
    predict_cases(model, cases, output, options, device)
    return list(cases)


def predict_cases(
    model: TrainedModel,
    cases: Mapping[str, list[str]],
    output: Path,
    options: PredictOptions | None = None,
    device: torch.device | None = None,
) -> None:
    """Predict cases that :func:`nnssl.inference.inputs.list_inputs` has checked; see :func:`predict_folder`."""
    options = options or PredictOptions()
    targets = [str(Path(output) / case) for case in cases]
    common = {"save_probabilities": options.save_probabilities, "overwrite": options.overwrite}
    with _Threads(device or best_device()) as used:
        predictor = make_predictor(model, options, used)
        if options.preprocessing_processes == 0:
            predictor.predict_from_files_sequential(list(cases.values()), targets, **common)
            return
        predictor.predict_from_files(
            list(cases.values()),
            targets,
            num_processes_preprocessing=min(options.preprocessing_processes, len(cases)),
            num_processes_segmentation_export=min(options.export_processes, len(cases)),
            **common,
        )


def make_predictor(model: TrainedModel, options: PredictOptions, device: torch.device) -> nnUNetPredictor:
    """Return nnU-Net's predictor with the model's folds loaded.

    Raises:
        UserError: for a checkpoint that does not load as weights only, or whose trainer can't be found.
    """
    from nnssl.trainers.registry import expose_to_nnunet
    from nnssl.training.checkpoints import require_safe

    expose_to_nnunet()  # before nnunetv2 looks a trainer up
    for file in model.checkpoint_files:
        require_safe(file)
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    build: Callable[..., nnUNetPredictor] = nnUNetPredictor
    if options.stride is not None:
        from nnssl.inference.tiles import StridePredictor

        build = partial(StridePredictor, options.stride)
    predictor = build(
        tile_step_size=options.step_size,
        use_gaussian=True,
        use_mirroring=options.mirroring,
        perform_everything_on_device=options.on_device and device.type == "cuda",
        device=device,
        verbose=options.verbose,
        verbose_preprocessing=options.verbose,
        allow_tqdm=options.progress,
    )
    with _trainer_lookup():
        predictor.initialize_from_trained_model_folder(str(model.folder), model.folds, model.checkpoint)
    return predictor


@contextlib.contextmanager
def _trainer_lookup() -> Iterator[None]:
    """Let nnU-Net's predictor find registered trainers at once, and say plainly when a trainer can't be found.

    nnU-Net imports every module of its own trainers before it looks elsewhere. That takes seconds and fails where one
    of them needs a package that is broken (a torchvision for another torch), although the model needs none of it.
    """
    from nnunetv2.inference import predict_from_raw_data

    from nnssl.trainers.registry import TRAINERS, trainer_class

    stock = predict_from_raw_data.recursive_find_trainer_class_by_name

    def find(name: str) -> type:
        if name in TRAINERS:
            return trainer_class(name)
        try:
            return stock(name)
        except Exception as error:
            remedy = "name the folder of its class in nnUNet_extTrainer"
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise UserError("the model's trainer must be importable", f"{name}: {reason}", None, remedy) from error

    predict_from_raw_data.recursive_find_trainer_class_by_name = find
    try:
        yield
    finally:
        predict_from_raw_data.recursive_find_trainer_class_by_name = stock


class _Threads:
    """Set torch's threads for prediction and set them back.

    As ``nnUNetv2_predict``, all cores on the CPU and one beside a GPU, but a user's ``OMP_NUM_THREADS`` holds: threads
    that wait for a busy core are far slower than fewer threads.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> torch.device:
        import torch

        self.before = torch.get_num_threads()
        if self.device.type == "cpu":
            torch.set_num_threads(_cpu_threads())
        elif self.device.type == "cuda":
            torch.set_num_threads(1)
        return self.device

    def __exit__(self, *exception: object) -> None:
        import torch

        torch.set_num_threads(self.before)


def _cpu_threads() -> int:
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
