"""Settings of A&D, and what they mean for the plan's architecture."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from nnssl.diffusion.samplers import spaced_timesteps
from nnssl.errors import UserError
from nnssl.networks.diff_vnet_paper import DIVISOR
from nnssl.trainers.settings import UnsupervisedSettings, option
from nnssl.training.difficulty import MEMORIES, NORMS
from nnssl.training.ramps import schedule

PLANNED = "nnssl.networks.diff_vnet.PlannedDiffVNet"
PAPER = "nnssl.networks.diff_vnet_paper.DiffVNet"


@dataclass(frozen=True)
class GenericSSLSettings(UnsupervisedSettings):
    """Settings of A&D; xi, psi, theta and mu are the paper's symbols."""

    unsupervised_weight: float = option(1.0, "mu at the end: weight of L_u (the code: 10); 0 = no method", low=0)
    ramp_end: float = option(1.0, "fraction of the run at which mu's course is over", low=0.01, high=1)
    network: str = option("plan", "topology: the plan's, or the paper's V-Net", choices=("plan", "vnet"))
    batch_statistics: str = option(
        "image", "passes that batch norms, if any, remember (the code: all)", choices=("image", "all")
    )
    joint: bool = option(True, "one optimizer step for all three losses (Algorithm 1 as printed: false)")
    decoder_init: str = option(
        "shared", "start of xi and psi: theta's weights, or their own (the code)", choices=("shared", "independent")
    )
    blend: float = option(
        0.99, "share of theta that each step keeps; the rest is the mean of xi and psi", low=0, high=1
    )
    # ------------------------------------------------------------------ views
    views: str = option("nnunet", "augmentation: nnU-Net's, or the paper's SVDA", choices=("nnunet", "svda"))
    svda_count: int = option(3, "SVDA: operations drawn for a crop, of six", low=0, high=6)
    svda_probability: float = option(0.7, "SVDA: probability that a drawn operation is applied", low=0, high=1)
    pseudo_view: str = option(
        "strong", "unlabeled view that is pseudo-labeled; theta learns on the strong one", choices=("strong", "weak")
    )
    # ------------------------------------------------------------------ diffusion branch xi
    diffusion: bool = option(True, "diffusion branch; without it psi alone makes the pseudo-labels")
    timesteps: int = option(1000, "T of the diffusion", low=2)
    t_min: int = option(0, "smallest time step drawn in training: above it the label shows through less", low=0)
    sampling_steps: int = option(2, "DDIM steps of a sampling (the code: 10)", low=1)
    sampling_spacing: str = option(
        "trailing", "time steps visited: T/n - 1, 2T/n - 1, ..., or 0 to T - 1 (the code)", choices=("trailing", "ends")
    )
    sampling_interval: int = option(1, "xi votes in every n-th iteration, in the others psi alone", low=1)
    sampling_bf16: bool = option(False, "sample in bfloat16 (the networks; the diffusion stays in single precision)")
    x0_map: str = option(
        "softmax", "logits to x0: 2 softmax - 1, or clamped to -1..1 (the code)", choices=("softmax", "clamp")
    )
    # ------------------------------------------------------------------ pseudo-labels (RS)
    rs: bool = option(True, "reparameterize and smooth xi's vote; without it x0 votes as it is, scaled to 0..1")
    rs_input: str = option(
        "x0", "what RS reads as log-probabilities: x0 itself (the code), or ln((x0 + 1) / 2)", choices=("x0", "log")
    )
    rs_tau: float = option(1.0, "temperature of the Gumbel softmax", low=1e-3)
    rs_sigma: float = option(1.0, "width of the smoothing, voxels; 0 = none", low=0)
    pl_dice: float = option(0.0, "weight of the Dice against pseudo-labels (the paper: 1)", low=0)
    # ------------------------------------------------------------------ difficulty-aware re-weighting (DRS)
    drs: bool = option(True, "difficulty-aware class weights in psi's loss")
    drs_branch: str = option("psi", "branch whose Dice tells the difficulty (the code: xi)", choices=("xi", "psi"))
    drs_alpha: float = option(0.2, "alpha: exponent of the difficulty", low=0)
    drs_window: int = option(50, "tau: iterations remembered", low=1)
    drs_memory: str = option(
        "average", "how: a moving average (the code), or a sum over the last tau (the paper)", choices=MEMORIES
    )
    drs_norm: str = option("max", "W: K d w (the code), d w (the paper), K d w / max d w (DHC)", choices=NORMS)
    drs_floor: float = option(0.0, "smallest W: 1 keeps an easy class, such as background, at its full weight", low=0)
    drs_hold: bool = option(True, "leave absent classes alone (the code: an absent class has Dice 1/2)")
    drs_background: bool = option(False, "psi's Dice counts the background too (the paper: true)")

    def validate(self) -> None:
        super().validate()
        if self.timesteps <= 20:
            raise UserError("the diffusion needs more than 20 time steps", f"timesteps={self.timesteps}", "21 or more")
        if self.sampling_steps > self.timesteps:
            raise UserError("sampling_steps cannot exceed timesteps", self.sampling_steps, f"<= {self.timesteps}")
        first = self.visited()[0]
        if self.diffusion and self.t_min > first:
            rule = "xi must be trained at every time step it is sampled at"
            got = f"t_min={self.t_min}, sampled at {first}"
            raise UserError(rule, got, f"t_min <= {first}", "lower t_min, or take fewer trailing steps")
        if self.network == "vnet" and self.deep_supervision:
            raise UserError("the V-Net has no deep supervision", "deep_supervision=True", "False", "set it to False")

    def visited(self) -> list[int]:
        """Return the time steps of a sampling, ascending."""
        n, total = self.sampling_steps, self.timesteps
        if self.sampling_spacing == "ends":
            return spaced_timesteps(total, n)
        return [round((i + 1) * total / n) - 1 for i in range(n)]

    def unsupervised(self, fraction: float) -> float:
        """Return mu at a fraction of the run."""
        course = schedule(self.unsupervised_schedule)
        return self.unsupervised_weight * course(min(fraction / self.ramp_end, 1.0))


def network_architecture(plans: dict, configuration: str, settings: GenericSSLSettings) -> None:
    """Replace the configuration's planned network by a Diff-VNet (idempotent).

    Args:
        plans: a run's own copy of the plans.
        configuration: the configuration that is trained.
        settings: the method's settings.

    Raises:
        UserError: the V-Net is asked for and cannot take the plan's patch.
    """
    config = plans["configurations"][configuration]
    planned = config["architecture"]
    if planned["network_class_name"] in (PLANNED, PAPER):
        return
    shared = {"batch_statistics": settings.batch_statistics}
    if settings.network == "vnet":
        patch = config["patch_size"]
        if any(n % DIVISOR for n in patch):
            todo = "plan with --patch_size, or set network=plan"
            raise UserError(f"the V-Net needs patches divisible by {DIVISOR}", list(patch), "multiples", todo)
        kwargs = {"ndim": len(config["patch_size"]), **shared}
        config["architecture"] = {"network_class_name": PAPER, "arch_kwargs": kwargs, "_kw_requires_import": []}
        return
    kwargs = {**copy.deepcopy(planned["arch_kwargs"]), "base": planned["network_class_name"], **shared}
    config["architecture"] = {**planned, "network_class_name": PLANNED, "arch_kwargs": kwargs}
