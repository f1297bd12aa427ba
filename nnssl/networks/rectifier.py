"""DiffRect's rectifier: a U-Net on image and colored pseudo-label whose bottleneck a latent diffusion model rectifies.

Liu et al., "DiffRect: Latent Diffusion Label Rectification for Semi-supervised Medical Image Segmentation", MICCAI 2024
(arXiv 2407.09918). Three parts: the semantic context embedding of label and image (label context calibration, LCC), the
latent denoiser (latent feature rectification, LFR), and the decoder to the rectified label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnssl.diffusion.process import predict_x0, q_sample
from nnssl.diffusion.samplers import ddim_sample, ddpm_sample, spaced_timesteps
from nnssl.diffusion.schedule import NoiseSchedule
from nnssl.losses.precision import fp32
from nnssl.networks.conditioning import TimeEmbedding
from nnssl.networks.conv_unet import CONV, DROPOUT, POOL, ConvBlock, Decoder, Encoder, Style, Up

#: Levels below full resolution at most; widths are the U-Net's, 1 to 16 times the first.
MAX_DEPTH = 4
#: The denoiser pools an axis of the latent only while it has this many voxels.
MIN_POOLED = 4
#: Widths of the denoiser's two levels, in units of the latent's.
DENOISER_WIDTHS = (1.5, 2.0)
#: What the named parts of a rectifier may be.
CHOICES = {
    "norm": ("instance", "batch"),
    "conditioning": ("film", "additive"),
    "context": ("both", "label"),
    "fusion": ("add", "concat"),
    "inject": ("input", "skip"),
    "prediction": ("latent", "noise"),
}
LATENT_DISTANCES = ("mean", "norm")
SCHEDULES = {"cosine": NoiseSchedule.cosine, "linear": NoiseSchedule.scaled_linear}
SAMPLERS = {"ddim": ddim_sample, "ddpm": ddpm_sample}


@dataclass(frozen=True)
class RectifierShape:
    """What a rectifier is built from.

    Args:
        image_channels: channels of the image.
        label_channels: channels of the colored label map.
        num_classes: segmentation heads.
        patch_size: training patch, voxels.
        strides: pooling between levels, at most four, one size an axis.
        kernels: kernel sizes of the levels, one more than strides.
        width: channels at full resolution (the paper's code: 16); all others are multiples of it.
        norm: norm of encoders and decoder; the denoiser takes group norm where this is "instance".
        conditioning: how guidance and time step enter, see `nnssl.networks.conv_unet.Style`.
        dropout: whether the encoders drop values, at the literature's rates.
        context: whether the label's encoder sees the image too.
        fusion: how the image's features join the label's at each level.
        skips: whether the decoder sees the finer levels, or the rectified latent alone.
        inject: whether the condition reaches the denoiser's input, or its last skip only.
        diffusion: whether there is a denoiser (LFR); without it the decoder reads the context's latent.
        prediction: what the denoiser's output is, the clean latent or the noise in it.
        detach_condition: the denoised latent that the latent losses see has a condition without gradient, so that
            they cannot be lowered by an encoder that forgets the label.
        normalize: the latent has mean 0 and variance 1 over its channels at each voxel, so that its size cannot grow
            and the noise, whose variance is 1, always hides the same share of it.
        timesteps: T of the diffusion.
        schedule: a key of `SCHEDULES`.

    Raises:
        ValueError: a part has a name that is not among `CHOICES`.
    """

    image_channels: int
    label_channels: int
    num_classes: int
    patch_size: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    width: int = 16
    norm: str = "instance"
    conditioning: str = "film"
    dropout: bool = True
    context: str = "both"
    fusion: str = "add"
    skips: bool = True
    inject: str = "input"
    diffusion: bool = True
    prediction: str = "latent"
    detach_condition: bool = False
    normalize: bool = False
    timesteps: int = 10
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {allowed}, got {getattr(self, name)!r}")


class Rectified(NamedTuple):
    """Output of the rectifier: logits, and the estimated and the true latent (None where no denoiser ran)."""

    logits: Tensor
    latent: Tensor | None
    target: Tensor | None


class Rectifier(nn.Module):
    """R of DiffRect: E_img (image embedder), B_sem (semantic context embedding), denoiser, decoder."""

    def __init__(self, shape: RectifierShape) -> None:
        super().__init__()
        self.shape = shape
        style = Style(len(shape.patch_size), shape.norm, shape.conditioning)
        widths = [shape.width * 2**i for i in range(len(shape.strides) + 1)]
        rates = DROPOUT[: len(widths)] if shape.dropout else [0.0] * len(widths)
        seen = shape.label_channels + (shape.image_channels if shape.context == "both" else 0)
        self.guidance_embedding = TimeEmbedding()
        self.image_encoder = Encoder(style, shape.image_channels, widths, shape.strides, shape.kernels, rates)
        self.context_encoder = Encoder(style, seen, widths, shape.strides, shape.kernels, rates)
        self.fusers = None
        if shape.fusion == "concat":
            self.fusers = nn.ModuleList(CONV[style.ndim](2 * w, w, 1) for w in widths)
        self.decoder = Decoder(style, widths, shape.kernels, shape.num_classes, shape.skips)
        self.denoiser = Denoiser(style, widths[-1], latent_size(shape), shape.inject) if shape.diffusion else None
        self.noise = SCHEDULES[shape.schedule](shape.timesteps)

    def forward(
        self,
        image: Tensor,
        label: Tensor,
        guidance: Tensor,
        good: Tensor | None = None,
        good_image: Tensor | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        sampling: Sampling | None = None,
    ) -> Rectified:
        """Rectify a label map: in training given the better map, else by sampling.

        Args:
            image: (b, image_channels, ...).
            label: colored map to rectify (b, label_channels, ...).
            guidance: tau, one a item (b,).
            good: colored map that is better (training): its latent is the diffusion's clean end.
            good_image: image beside the better map; None = ``image``.
            t: time steps of the training pass (b,).
            noise: standard normal, of the latent's shape (see `latent_size`): eps in training, the start of sampling.
            sampling: how to sample; None in training.
        """
        embedding = self.guidance_embedding(guidance)
        from_image = self.image_encoder(image, embedding)
        features = self._context(image, label, from_image, embedding)
        if self.denoiser is None:
            return Rectified(self.decoder(features, embedding), None, None)
        condition = features[-1]
        if sampling is not None:
            estimate, target = self._sample(self.denoiser, condition, noise, sampling), None
        else:
            with torch.no_grad():
                beside = image if good_image is None else good_image
                features_image = from_image if good_image is None else self.image_encoder(beside, embedding)
                target = self._context(beside, good, features_image, embedding)[-1].detach()
            noised = q_sample(target.float(), t, noise, self.noise)
            estimate = self._clean(self.denoiser, noised, t, condition)
        logits = self.decoder([*features[:-1], estimate], embedding)
        if target is not None and self.shape.detach_condition:
            estimate = self._clean(self.denoiser, noised, t, condition.detach())
        return Rectified(logits, estimate, target)

    def _clean(self, denoiser: nn.Module, noised: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return the denoiser's estimate of the clean latent."""
        output = denoiser(noised, t, condition).float()
        return output if self.shape.prediction == "latent" else predict_x0(noised, t, output, self.noise)

    def _context(self, image: Tensor, label: Tensor, from_image: list[Tensor], embedding: Tensor) -> list[Tensor]:
        seen = torch.cat([image, label], 1) if self.shape.context == "both" else label
        features = self.context_encoder(seen, embedding, from_image, self.fusers)
        return [*features[:-1], normalized(features[-1])] if self.shape.normalize else features

    @torch.no_grad()
    def _sample(self, denoiser: nn.Module, condition: Tensor, noise: Tensor, sampling: Sampling) -> Tensor:
        def x0(y: Tensor, t: Tensor) -> Tensor:
            estimate = self._clean(denoiser, y, t, condition)
            return estimate.clamp(-1, 1) if sampling.clamp else estimate

        steps = spaced_timesteps(self.noise.steps, sampling.steps)
        return SAMPLERS[sampling.sampler](x0, noise.float(), steps, self.noise)


class Sampling(NamedTuple):
    """How a latent is sampled: number of steps, key of `SAMPLERS`, and whether each estimate is clamped to -1..1."""

    steps: int = 2
    sampler: str = "ddim"
    clamp: bool = False


class Denoiser(nn.Module):
    """The latent denoising U-Net: two levels below the latent, predicts the clean latent.

    Args:
        style: that of the rectifier.
        width: channels of the latent.
        size: spatial size of the latent, which decides what can be pooled.
        inject: "input" feeds noised latent plus condition to all levels; "skip" as in the authors' code, where the
            condition joins the last skip alone.
    """

    def __init__(self, style: Style, width: int, size: Sequence[int], inject: str = "input") -> None:
        super().__init__()
        # group norm: the deepest maps may have a single voxel, of which an instance norm makes zero
        style = Style(style.ndim, "batch" if style.norm == "batch" else "group", style.conditioning)
        first, second = (round(width * factor) for factor in DENOISER_WIDTHS)
        pools = pooling(size)
        self.inject = inject
        self.time_embedding = TimeEmbedding()
        self.pools = nn.ModuleList(POOL[style.ndim](pool) for pool in pools)
        self.down1, self.down2 = ConvBlock(style, width, first), ConvBlock(style, first, second)
        self.up1, self.up2 = Up(style, second, first), Up(style, first, width)

    def forward(self, noised: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return the estimate of the clean latent (b, width, ...) from the noised one, its time step and condition."""
        embedding = self.time_embedding(t)
        joined = noised + condition
        d1 = self.down1(self.pools[0](joined if self.inject == "input" else noised), embedding)
        d2 = self.down2(self.pools[1](d1), embedding)
        return self.up2(self.up1(d2, d1, embedding), joined, embedding)


@fp32
def normalized(latent: Tensor) -> Tensor:
    """Return a latent (b, width, ...) with mean 0 and variance 1 over its channels at each voxel."""
    return functional.layer_norm(latent.movedim(1, -1), latent.shape[1:2]).movedim(-1, 1)


def pooling(size: Sequence[int]) -> list[list[int]]:
    """Return the denoiser's two pooling sizes: an axis is halved while it has at least four voxels."""
    pools, size = [], list(size)
    for _ in DENOISER_WIDTHS:
        pools.append([2 if n >= MIN_POOLED else 1 for n in size])
        size = [n // p for n, p in zip(size, pools[-1], strict=True)]
    return pools


def latent_size(shape: RectifierShape) -> tuple[int, ...]:
    """Return the latent's spatial size."""
    size = list(shape.patch_size)
    for stride in shape.strides:
        size = [n // s for n, s in zip(size, stride, strict=True)]
    return tuple(size)


def rectifier_levels(
    strides: Sequence[Sequence[int]], kernels: Sequence[Sequence[int]]
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Return strides and kernel sizes of a rectifier for a plan: its first four strides that pool at all.

    Args:
        strides: the plan's, one an encoder stage.
        kernels: the plan's kernel sizes, one an encoder stage.
    """
    chosen = [i for i, stride in enumerate(strides) if i and max(stride) > 1][:MAX_DEPTH]
    return tuple(tuple(strides[i]) for i in chosen), tuple(tuple(kernels[i]) for i in [0, *chosen])


@fp32
def latent_loss(estimate: Tensor, target: Tensor, distance: str = "mean") -> Tensor:
    """Return L_Lat of eq. 13 of an estimated latent: the mean squared error, or the norm of an item's error.

    Args:
        estimate: (b, width, ...).
        target: (b, width, ...).
        distance: "mean", over all elements, as in the code, or "norm", the mean of ``||estimate - target||_2``.
    """
    error = estimate - target
    return error.square().mean() if distance == "mean" else torch.linalg.vector_norm(error.flatten(1), dim=1).mean()
