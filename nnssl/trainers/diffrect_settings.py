"""Settings of DiffRect, and the rectifier they describe for a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nnssl.errors import UserError
from nnssl.networks.rectifier import (
    CHOICES,
    LATENT_DISTANCES,
    SAMPLERS,
    SCHEDULES,
    RectifierShape,
    Sampling,
    rectifier_levels,
)
from nnssl.trainers.settings import UnsupervisedSettings, option
from nnssl.training.coloring import SCHEMES
from nnssl.training.guidance import MEASURES
from nnssl.training.ramps import schedule

LITERATURE_UNET = "nnssl.networks.conv_unet.LiteratureUNet"
#: Channels of the rectifier at full resolution: at least, and beside the literature's U-Net.
MIN_WIDTH, LITERATURE_WIDTH = 4, 16


@dataclass(frozen=True)
class DiffRectSettings(UnsupervisedSettings):
    """Settings of DiffRect; tau, t and the loss names are the paper's."""

    unsupervised_weight: float = option(1.0, "weight of the weak-to-strong terms at the end (the code: 0.1)", low=0)
    network: str = option("plan", "predicting network: the plan's, or SSL4MIS's U-Net", choices=("plan", "literature"))
    views: str = option("nnunet", "augmentation: nnU-Net's, or the paper's slight one", choices=("nnunet", "paper"))
    supervised_view: str = option(
        "strong", "labeled view of the supervised loss (the paper: weak)", choices=("strong", "weak")
    )
    pl_rule: str = option(
        "confident",
        "pseudo-label: arg max with unsure voxels ignored, or SSL4MIS's rule (unsure voxels become background)",
        choices=("confident", "ssl4mis"),
    )
    pl_threshold: float = option(0.8, "confidence, or relative threshold, of the rule", low=0, high=0.999)
    pl_dice: float = option(0.0, "weight of the Dice against pseudo-labels (the code: 1)", low=0)
    squared_dice: bool = option(False, "Dice against labels of the code: squared denominator, background counted")
    complementary: bool = option(False, "complementary loss of the code, in both networks")
    # ------------------------------------------------------------------ rectification of the predicting network
    rect_weight: float = option(1.0, "weight of L_Rect; 0 switches the rectifier off", low=0)
    rect_start: float = option(0.1, "fraction of the run at which L_Rect begins", low=0, high=1)
    rect_start_iteration: int = option(0, "L_Rect begins at this iteration at the earliest (the code: 1001)", low=0)
    rect_schedule: str = option("ramp", "course of L_Rect's weight over the run (the code: constant)")
    rect_view: str = option(
        "strong", "view that learns the rectified label (the paper: weak)", choices=("strong", "weak")
    )
    merged: bool = option(False, "one step of the predicting network an iteration instead of two")
    # ------------------------------------------------------------------ label context calibration (LCC)
    coloring: str = option("published", "colors of the classes", choices=SCHEMES)
    guidance: str = option("dice", "agreement behind tau (none: no guidance)", choices=("none", *MEASURES))
    guidance_form: str = option("distance", "tau = 999 (1 - agreement), or agreement", choices=("distance", "overlap"))
    guidance_per_item: bool = option(False, "one tau an item instead of one a batch, as in the code")
    guidance_present: bool = option(
        True, "average over the classes of the better map (the code: all, one absent from both counts 1)"
    )
    guidance_ema: float = option(
        0.9, "decay of the labeled tau used to rectify; 0 = this step's, as in the code", low=0, high=0.999
    )
    rectify_guidance: str = option(
        "labeled",
        "tau when rectifying u: labeled = that of labeled items, own = strong against weak label (the paper)",
        choices=("labeled", "own"),
    )
    strong_guidance: str = option(
        "rectified", "map the strong label is compared with (the paper: weak)", choices=("rectified", "weak")
    )
    conditioning: str = option("film", "how tau and t enter the rectifier", choices=CHOICES["conditioning"])
    norm: str = option("instance", "norm of the rectifier", choices=CHOICES["norm"])
    context: str = option("both", "what the label's encoder sees (the paper: label)", choices=CHOICES["context"])
    fusion: str = option("add", "how image and label features join (the paper: concat)", choices=CHOICES["fusion"])
    # ------------------------------------------------------------------ latent feature rectification (LFR)
    diffusion: bool = option(True, "latent denoiser (LFR); without it the rectifier is a plain U-Net")
    timesteps: int = option(10, "T of the diffusion", low=2)
    noise_schedule: str = option("cosine", "noise schedule", choices=tuple(SCHEDULES))
    sampler: str = option("ddim", "sampler (the paper prints ddpm)", choices=tuple(SAMPLERS))
    sampling_steps: int = option(2, "steps of a sampling", low=1)
    time_steps: str = option(
        "visited", "time steps R trains at: those a sampling visits, or all (the code)", choices=("visited", "all")
    )
    prediction: str = option("latent", "what the denoiser predicts", choices=CHOICES["prediction"])
    detach_condition: bool = option(
        True, "L_Lat trains the denoiser alone, not the condition's encoder (the code: false)"
    )
    normalize_latent: bool = option(True, "latents have mean 0 and variance 1 over channels (the code: false)")
    sample_dropout: bool = option(False, "dropout and batch statistics stay on while R samples (the code: true)")
    clamp: bool = option(False, "clamp sampled latents to -1..1 (the code: true)")
    inject: str = option("input", "where the condition enters the denoiser (the code: skip)", choices=CHOICES["inject"])
    skips: bool = option(True, "the label decoder sees the finer levels (the paper draws none)")
    s2w: bool = option(True, "strong-to-weak transportation")
    w2g: bool = option(True, "weak-to-ground-truth transportation")
    damage: float = option(
        0.0, "probability that boxes of other labels are pasted into a weak label W2G mends (ours)", low=0, high=1
    )
    label_residual: float = option(
        0.0, "logit that R gives to the label it mends before it has learned anything (ours; the paper: 0)", low=0
    )
    s2w_target: str = option("rectified", "label of the strong-to-weak pass", choices=("rectified", "weak"))
    s2w_image: str = option("strong", "image beside the better map of strong-to-weak", choices=("strong", "weak"))
    s2g: bool = option(True, "strong-to-ground-truth too: strong labeled views learn the truth (ours)")
    latent_rows: str = option(
        "own", "items of the latent losses: own = L or U (the paper), all (the code)", choices=("own", "all")
    )
    latent_distance: str = option(
        "mean", "latent losses: mean square over elements, or norm of each item (the paper)", choices=LATENT_DISTANCES
    )
    lat_u_weight: float = option(1.0, "lambda_1: weight of L_Lat-U, times the unsupervised schedule", low=0)
    lat_l_weight: float = option(1.0, "lambda_2: weight of L_Lat-L", low=0)
    rectifier_width: int | None = option(
        None, "channels of the rectifier at full resolution; none = half of the plan's (the code: 16)", low=4
    )
    rectifier_dropout: bool = option(False, "dropout in its encoders, at the literature's rates (the code: true)")
    rectifier_optimizer: str = option(
        "adamw", "its optimizer (the code: sgd, lr 0.01)", choices=("sgd", "adam", "adamw")
    )
    rectifier_lr: float = option(1e-3, "its learning rate at the first step (the code: 0.01)", low=1e-8)
    rectifier_lr_schedule: str = option("poly", "its learning rate (the code: constant)", choices=("poly", "constant"))

    def validate(self) -> None:
        super().validate()
        schedule(self.rect_schedule)
        if self.conditioning == "additive" and self.norm != "batch":
            rule = "an added embedding is erased by instance normalization"
            raise UserError(rule, "conditioning=additive norm=instance", "film, or norm=batch")
        if self.noise_schedule == "linear" and self.timesteps <= 20:
            rule = "the linear schedule needs more than 20 time steps"
            raise UserError(rule, f"timesteps={self.timesteps}", "21 or more", "or set noise_schedule=cosine")
        if self.sampling_steps > self.timesteps:
            raise UserError("sampling_steps cannot exceed timesteps", self.sampling_steps, f"<= {self.timesteps}")
        if self.rect_weight > 0 and not (self.w2g or self.s2w):
            rule = "the rectifier must learn from somewhere"
            raise UserError(rule, "w2g=False s2w=False", "one of them", "or set rect_weight=0")
        if self.rect_weight > 0 and not self.w2g and self.unsupervised_weight == 0:
            rule = "the rectifier must learn from somewhere; strong-to-weak has the unsupervised weight"
            raise UserError(rule, "w2g=False unsupervised_weight=0", "one of them", "or set rect_weight=0")
        if not self.w2g and "rectified" in (self.s2w_target, self.strong_guidance):
            rule = "without w2g there is no rectified label to learn from or to compare with"
            got = f"s2w_target={self.s2w_target} strong_guidance={self.strong_guidance}"
            raise UserError(rule, got, "weak for both", "set s2w_target=weak strong_guidance=weak")
        if self.network == "literature" and self.deep_supervision:
            got, todo = "deep_supervision=True", "set it to False"
            raise UserError("the literature's U-Net has no deep supervision", got, "False", todo)

    @property
    def whole_batch(self) -> bool:
        """Whether batch norm somewhere takes its statistics over labeled and unlabeled items, as in the code."""
        return self.norm == "batch" or self.network == "literature"

    @property
    def whole_strong_to_weak(self) -> bool:
        """Whether strong-to-weak sees labeled items, which otherwise enter none of its losses."""
        return self.whole_batch or self.latent_rows == "all" or self.s2g

    def sampling(self) -> Sampling:
        """Return how a latent is sampled."""
        return Sampling(self.sampling_steps, self.sampler, self.clamp)


def segmentation_architecture(plans: dict, configuration: str, settings: DiffRectSettings) -> None:
    """Replace the planned network by SSL4MIS's U-Net where the settings ask for it (idempotent).

    Args:
        plans: a run's own copy of the plans.
        configuration: the configuration that is trained.
        settings: the method's settings.
    """
    if settings.network == "literature":
        config = plans["configurations"][configuration]
        config["architecture"] = {
            "network_class_name": LITERATURE_UNET,
            "arch_kwargs": {"ndim": len(config["patch_size"])},
            "_kw_requires_import": [],
        }


def rectifier_shape(
    settings: DiffRectSettings,
    architecture: dict[str, Any],
    patch_size: Sequence[int],
    image_channels: int,
    label_channels: int,
    num_classes: int,
) -> RectifierShape:
    """Return the rectifier of a plan: its first four poolings, the settings' parts.

    Args:
        settings: the method's settings.
        architecture: the configuration's ``architecture``.
        patch_size: training patch, voxels.
        image_channels: channels of the image.
        label_channels: channels of the colored label map.
        num_classes: segmentation heads.
    """
    kwargs, ndim = architecture["arch_kwargs"], len(patch_size)
    planned = "strides" in kwargs
    strides, kernels = rectifier_levels(
        kwargs["strides"] if planned else [[1] * ndim, *[[2] * ndim] * 4],
        kwargs["kernel_sizes"] if planned else [[3] * ndim] * 5,
    )
    return RectifierShape(
        image_channels,
        label_channels,
        num_classes,
        tuple(patch_size),
        strides,
        kernels,
        width=settings.rectifier_width
        or max(MIN_WIDTH, kwargs["features_per_stage"][0] // 2 if planned else LITERATURE_WIDTH),
        norm=settings.norm,
        conditioning=settings.conditioning,
        dropout=settings.rectifier_dropout,
        context=settings.context,
        fusion=settings.fusion,
        skips=settings.skips,
        inject=settings.inject,
        diffusion=settings.diffusion,
        prediction=settings.prediction,
        detach_condition=settings.detach_condition,
        normalize=settings.normalize_latent,
        timesteps=settings.timesteps,
        schedule=settings.noise_schedule,
    )
