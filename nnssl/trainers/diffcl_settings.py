"""Settings of Diff-CL, and what they mean for the plan's architecture."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from nnssl.errors import UserError
from nnssl.networks.planned import choose_hfm_stage
from nnssl.trainers.settings import Settings, option
from nnssl.training.ramps import schedule

PLANNED = "nnssl.networks.planned.PlannedUNet"
VNET = "nnssl.networks.vnet.VNet"
VNET_STRIDES = (1, 2, 2, 2, 2)
_COURSE = "constant, linear, ramp, warmup1 to warmup99"


@dataclass(frozen=True)
class DiffCLSettings(Settings):
    """Settings of Diff-CL; symbols are the paper's (Table 2)."""

    mu_d: float = option(1.0, "mu_1: weight of DS's cross term", low=0)
    mu_c: float = option(1.0, "mu_2: weight of CS's unsupervised terms", low=0)
    trust: bool = option(True, "scale mu by the Dice of CS on the labeled batch: poor networks teach each other little")
    mu_schedule: str = option("ramp", f"course of mu over the run (the paper: constant): {_COURSE}")
    beta_d: float = option(1.0, "beta_1: weight of the cross-entropy in DS's supervised loss", low=0)
    beta_c: float = option(1.0, "beta_2: weight of the cross-entropy in CS's supervised loss", low=0)
    beta_schedule: str = option("constant", f"course of beta over the run (the paper: ramp): {_COURSE}")
    lambda_d: float = option(1.0, "lambda_1: weight of the cross-entropy in DS's cross term", low=0)
    lambda_c: float = option(1.0, "lambda_2: weight of the cross-entropy in CS's cross term", low=0)
    cross_dice: float = option(0.0, "weight of the Dice in both cross terms (the paper: 1)", low=0)
    eta: float = option(0.005, "weight of contrastive label propagation; 0 switches it off", low=0)
    network: str = option("plan", "topology of CS and DS: the plan's, or the paper's V-Net", choices=("plan", "vnet"))
    hfm: bool = option(True, "high-frequency Mamba module in CS")
    hfm_stages: str = option("auto", "encoder stages that get it: auto, or numbers separated by commas")
    hfm_threshold: float = option(0.5, "HF: normalized cut-off frequency, 1 = Nyquist of one axis", low=0)
    hfm_mask: str = option("radial", "shape of the high-pass filter", choices=("radial", "box", "ratio"))
    hfm_mode: str = option(
        "gated",
        "f + F_o; f + g F_o with a gate g that starts at zero; or F_o alone as eq. 10 prints",
        choices=("residual", "gated", "replace"),
    )
    timesteps: int = option(1000, "T of the diffusion", low=2)
    t_min_unlabeled: int = option(0, "smallest time step drawn for unlabeled items", low=0)
    y0_scale: str = option("pm1", "range of the one-hot labels that are noised: -1..1 or 0..1", choices=("pm1", "01"))
    ds_view: str = option(
        "strong", "view of unlabeled crops that DS sees; CS sees the strong one", choices=("strong", "weak")
    )
    ds_pseudo: str = option("one_step", "DS's pseudo-label: Algorithm 1's, or a chain", choices=("one_step", "ddim"))
    projection_dim: int = option(64, "d: dimension of the projected features", low=2)
    tau: float = option(0.1, "temperature of the contrast", low=1e-3)
    p: int = option(256, "bank features drawn per class", low=1)
    q: int = option(12800, "unlabeled voxels drawn per step", low=2)
    k: int = option(64, "positives, and negatives, per class", low=1)
    bank_capacity: int = option(2048, "features kept per case and class", low=16)
    cl_min_pred: bool = option(False, "limit k to the sampled voxels that CS predicts as the class")

    def validate(self) -> None:
        schedule(self.mu_schedule)
        schedule(self.beta_schedule)
        self.stages()
        if self.t_min_unlabeled >= self.timesteps:
            raise UserError("t_min_unlabeled must be below timesteps", self.t_min_unlabeled, f"< {self.timesteps}")
        if self.network == "vnet" and self.deep_supervision:
            raise UserError("the V-Net has no deep supervision", "deep_supervision=True", "False", "set it to False")

    def stages(self) -> list[int] | None:
        """Return the encoder stages that get an HFM; None = choose from the plan."""
        if self.hfm_stages == "auto":
            return None
        try:
            return [int(part) for part in self.hfm_stages.split(",")]
        except ValueError as error:
            raise UserError(
                "hfm_stages must be auto or stage numbers", repr(self.hfm_stages), "auto, 3, 2,3"
            ) from error


def segmentation_architecture(plans: dict, configuration: str, settings: DiffCLSettings) -> None:
    """Replace the configuration's planned network by CS (idempotent).

    Args:
        plans: a run's own copy of the plans.
        configuration: the configuration that is trained.
        settings: the method's settings.
    """
    config = plans["configurations"][configuration]
    arch = config["architecture"]
    if arch["network_class_name"] in (PLANNED, VNET):
        return
    vnet = settings.network == "vnet"
    strides = VNET_STRIDES if vnet else arch["arch_kwargs"]["strides"]
    hfm = None
    if settings.hfm:
        hfm = {
            "stages": settings.stages() or [choose_hfm_stage(config["patch_size"], strides)],
            "threshold": settings.hfm_threshold,
            "mask": settings.hfm_mask,
            "mode": settings.hfm_mode,
        }
    if vnet:
        kwargs = {"ndim": len(config["patch_size"]), "hfm": hfm}
        config["architecture"] = {"network_class_name": VNET, "arch_kwargs": kwargs, "_kw_requires_import": []}
    else:
        kwargs = {**copy.deepcopy(arch["arch_kwargs"]), "base": arch["network_class_name"], "hfm": hfm}
        config["architecture"] = {**arch, "network_class_name": PLANNED, "arch_kwargs": kwargs}


def diffusion_architecture(segmentation: dict) -> dict:
    """Return DS's architecture: CS's topology without HFM, conditioned on time."""
    arch = copy.deepcopy(segmentation)
    arch["arch_kwargs"] |= {"hfm": None, "conditioning": True}
    return arch
