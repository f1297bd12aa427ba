"""Settings of prototype-anchored label diffusion, and the network they describe for a plan."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnssl.errors import UserError
from nnssl.networks.label_diffusion import CHOICES, SAMPLING_CHOICES
from nnssl.networks.visual_encoders import PATCH, VITS
from nnssl.trainers.settings import Settings, option
from nnssl.training.prototypes import ASSIGNMENTS, UPDATES

NETWORK = "nnssl.networks.label_diffusion.LabelDiffusionNet"
#: Levels the decoder reads.
LEVELS = 4
#: Width beside a ViT.
VIT_WIDTH = 384
#: Beside a planned encoder it is the plan's at that stride, up to these multiples of the base features.
MAX_WIDTH = {2: 12, 3: 6}
#: Cells along the longest axis that an automatic stride leaves.
CELLS = {2: 32, 3: 16}
#: Plans with a smaller batch get group norm.
MIN_NORM_BATCH = 4
#: nnU-Net's normalization scheme that leaves images in 0..1, as a ViT's own statistics expect them.
UNIT_RANGE = "RGBTo01Normalization"


@dataclass(frozen=True)
class ProtoDiffSettings(Settings):
    """Settings of ProtoDiff; symbols are the paper's."""

    deep_supervision: bool = option(False, "must stay off: auxiliary heads stand in its place")
    loss: str = option("dc_ce", "loss on real labels: nnU-Net's, or cross-entropy (the paper)", choices=("dc_ce", "ce"))
    # ------------------------------------------------------------------ visual encoder
    backbone: str = option("plan", "visual encoder: the plan's, or a ViT of timm", choices=("plan", *VITS))
    backbone_weights: str | None = option(None, "local weights file of a ViT; read when training starts, never later")
    backbone_lr: float = option(
        0.1, "factor of the learning rate of a ViT that starts from weights (the paper: 1)", low=0
    )
    drop_path: float = option(0.15, "largest rate of stochastic depth of a ViT", low=0, high=0.9)
    stride: int | None = option(
        None,
        "voxels of a decoder cell; none = 16, 8 or 4, by the patch, and 16 for a ViT (the paper)",
        choices=(2, 4, 8, 16, 32),
    )
    # ------------------------------------------------------------------ decoder
    width: int | None = option(
        None, "E: decoder channels; none = 384 for a ViT, else stride (at most 12, 3D: 6) times base features", low=4
    )
    norm: str = option(
        "auto",
        "norm of the decoder; auto = batch (the paper) from 4 items a step on, else group",
        choices=("auto", *CHOICES["norm"]),
    )
    level_fusion: str = option("sigmoid", "spatial maps of the levels", choices=CHOICES["level_fusion"])
    aux: str = option("joint", "auxiliary head on all levels, or one a level", choices=CHOICES["aux"])
    aux_weight: float = option(0.125, "weight of the auxiliary loss", low=0)
    # ------------------------------------------------------------------ label embedding and diffusion
    diffusion: bool = option(True, "noised label embeddings; without them zeros take their place")
    scale: float = option(0.01, "s: half range of a label embedding beside unit noise", low=1e-6)
    label_down: str = option(
        "nearest", "label of a cell: its center's, or the shares of its voxels", choices=CHOICES["label_down"]
    )
    time: str = option("continuous", "t uniform in 0..0.999, or k / T", choices=("continuous", "discrete"))
    timesteps: int = option(1000, "T of discrete time", low=2)
    steps: int = option(3, "S: sampling steps of a prediction", low=1)
    time_difference: float = option(1.0, "t_diff: asymmetry of the sampling steps, in steps", low=0)
    randsteps: int = option(1, "random starts whose logits are averaged", low=1)
    accumulate: bool = option(False, "average the probabilities of all sampling steps")
    reencode: str = option("hard", "how a step's prediction is encoded", choices=SAMPLING_CHOICES["reencode"])
    intermediate_stride: str = option(
        "fine",
        "resolution of all sampling steps but the last (TaskDiffusion: coarse)",
        choices=SAMPLING_CHOICES["intermediate_stride"],
    )
    noise_seed: int = option(0, "seed of the noise of predictions", low=0)
    # ------------------------------------------------------------------ prototypes
    w_inter: float = option(0.01, "weight of L_inter", low=0)
    w_intra: float = option(0.001, "weight of L_intra", low=0)
    num_prototypes: int = option(10, "K: prototypes a class", low=1)
    embedding: int | None = option(None, "D: dimension of the projected embedding; none = 2/3 of E", low=2)
    tau: float = option(0.1, "temperature of L_inter", low=1e-3)
    prototype_momentum: float = option(0.999, "momentum of the prototypes", low=0, high=0.999999)
    assign: str = option("sinkhorn_dedup", "how embeddings are assigned to prototypes", choices=ASSIGNMENTS)
    assign_update: str = option(
        "argmax", "what moves a prototype: assigned embeddings, or a random sample (ProtoSeg)", choices=UPDATES
    )
    prototype_patience: int = option(
        1000, "steps of its class after which an unused prototype starts again; 0 = never", low=0
    )
    cells_per_class: int = option(4096, "cells a class and step, boundaries first", low=1)
    proto_on: str = option(
        "gt", "embedding the prototype losses see: the label's (the paper), or the prediction's", choices=("gt", "pred")
    )

    def validate(self) -> None:
        if self.deep_supervision:
            rule = "label diffusion has auxiliary heads in place of deep supervision"
            raise UserError(rule, "deep_supervision=True", "False", "leave it out")
        if self.backbone == "plan" and self.backbone_weights is not None:
            rule = "backbone_weights are for a ViT"
            raise UserError(rule, "backbone=plan", ", ".join(VITS), "choose the backbone, or leave the weights out")
        if self.backbone != "plan" and self.stride not in (None, PATCH):
            raise UserError("a ViT's cells are its patches", f"stride={self.stride}", PATCH, "leave stride out")
        if self.width is not None and self.width % 4:
            raise UserError("width must be a multiple of 4", self.width)

    @property
    def has_prototypes(self) -> bool:
        """Whether a prototype loss counts."""
        return self.w_inter > 0 or self.w_intra > 0

    @property
    def discrete_steps(self) -> int | None:
        """T in discrete time, None in continuous time."""
        return self.timesteps if self.time == "discrete" else None


def network_architecture(plans: dict, configuration: str, settings: ProtoDiffSettings) -> None:
    """Replace the configuration's planned network by a `LabelDiffusionNet` (idempotent).

    Args:
        plans: a run's own copy of the plans.
        configuration: the configuration that is trained.
        settings: the method's settings.

    Raises:
        UserError: a ViT for 3D patches.
    """
    config = plans["configurations"][configuration]
    planned = config["architecture"]
    if planned["network_class_name"] == NETWORK:
        return
    patch, ndim = [int(n) for n in config["patch_size"]], len(config["patch_size"])
    base = copy.deepcopy(planned["arch_kwargs"])
    if settings.backbone == "plan":
        stages, cell = planned_levels(base["strides"], patch, settings.stride)
        encoder: dict[str, Any] = {"kind": "plan", "base": planned["network_class_name"], "stages": stages}
        encoder["cell"] = cell
        wide = min(max(cell), MAX_WIDTH[ndim]) * base["features_per_stage"][0]
        width = settings.width or -(-wide // 4) * 4
    else:
        if ndim != 2:
            raise UserError("a ViT reads 2D patches", f"{settings.backbone} for {configuration}", "2d", "backbone=plan")
        encoder = {
            "kind": "vit",
            "name": VITS[settings.backbone],
            "size": [-(-n // PATCH) * PATCH for n in patch],
            "drop_path": settings.drop_path,
            "unit_range": all(scheme == UNIT_RANGE for scheme in config["normalization_schemes"]),
        }
        base, cell, width = {}, [PATCH, PATCH], settings.width or VIT_WIDTH
    norm = settings.norm
    if norm == "auto":
        norm = "batch" if config["batch_size"] >= MIN_NORM_BATCH else "group"
    kwargs = {
        **base,
        "encoder": encoder,
        "decoder": {
            "width": width,
            "embedding": settings.embedding or max(2, width * 2 // 3),
            "norm": norm,
            "upsample": [min(4, max(1, n // 2)) for n in cell],
            "aux": settings.aux if settings.aux_weight > 0 else "none",
            "level_fusion": settings.level_fusion,
            "label_down": settings.label_down,
            "scale": settings.scale,
            "diffusion": settings.diffusion,
        },
        "sampling": {
            "steps": settings.steps,
            "difference": settings.time_difference,
            "starts": settings.randsteps,
            "accumulate": settings.accumulate,
            "intermediate_stride": settings.intermediate_stride,
            "reencode": settings.reencode,
            "seed": settings.noise_seed,
        },
    }
    imports = planned["_kw_requires_import"] if base else []
    config["architecture"] = {"network_class_name": NETWORK, "arch_kwargs": kwargs, "_kw_requires_import": imports}


def planned_levels(
    strides: Sequence[Sequence[int]], patch: Sequence[int], stride: int | None
) -> tuple[list[int], list[int]]:
    """Return (stages the decoder reads, voxels of a cell along each axis) for a plan.

    Args:
        strides: the plan's, one an encoder stage.
        patch: training patch, voxels.
        stride: wanted voxels of a cell; None: the largest of 16, 8 and 4 that leaves enough cells.
    """
    if stride is None:
        enough = [n for n in (16, 8, 4) if max(patch) // n >= CELLS[len(patch)]]
        stride = enough[0] if enough else 4
    total = np.cumprod(np.array(strides), axis=0)
    cell = [int(min(stride, n)) for n in total[-1]]
    first = next((i for i, n in enumerate(total.max(1)) if n * LEVELS >= stride), 0)
    stages = sorted({round(i) for i in np.linspace(first, len(total) - 1, LEVELS)})
    return stages, cell
