"""Label-embedding diffusion: a decoder that segments an image beside a noised embedding of its label.

Xi et al., "Robust Noisy Pseudo-label Learning for Semi-supervised Medical Image Segmentation Using Diffusion Model",
DGM4MICCAI 2025 (arXiv 2507.16429); the paper gives no code, and the layers it leaves open follow TaskDiffusion (Yang et
al., ICLR 2025). Names are the paper's: X_l visual features of level l, F_l their visual-specific branch, M_l spatial
map of level l, z label embedding, z_t noised label embedding, phi latent projector.

Everything lives on a coarse grid of cells, in 2D and 3D. Label embeddings are tiny (0.01 of the noise), so all that
touches z and z_t runs in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl.diffusion.continuous import ddim_step, diffuse, log_snr, step_pairs
from nnssl.losses.precision import fp32
from nnssl.networks.conditioning import FiLM
from nnssl.networks.conv_unet import CONV, INTERPOLATION, STYLE_NORMS, Style
from nnssl.networks.visual_encoders import build_visual_encoder

#: What the named parts may be.
CHOICES = {
    "norm": STYLE_NORMS,
    "aux": ("joint", "per_level", "none"),
    "level_fusion": ("sigmoid", "softmax"),
    "label_down": ("nearest", "area"),
}
SAMPLING_CHOICES = {"intermediate_stride": ("fine", "coarse"), "reencode": ("hard", "soft")}
#: Frequencies of the embedding of lambda.
FREQUENCIES = 8
SMALLEST_PROBABILITY = 1e-8


@dataclass(frozen=True)
class DecoderShape:
    """What the decoder and the label encoder are built from.

    Args:
        width: E, channels of the decoder; a multiple of 4.
        embedding: D, dimension of the projected label embedding.
        norm: of all blocks.
        upsample: factor of each axis before the last prediction block.
        aux: auxiliary head on all levels together, one a level, or none.
        level_fusion: spatial maps of the levels: independent, or a softmax over the levels.
        label_down: label of a cell: its center voxel's, or the shares of its voxels.
        scale: s, half range of a label embedding.
        diffusion: False feeds zeros in place of z_t.

    Raises:
        ValueError: a part has a name that is not among `CHOICES`, or the width is no multiple of 4.
    """

    width: int
    embedding: int
    norm: str
    upsample: Sequence[int]
    aux: str = "joint"
    level_fusion: str = "sigmoid"
    label_down: str = "nearest"
    scale: float = 0.01
    diffusion: bool = True

    def __post_init__(self) -> None:
        _check(self, CHOICES)
        if self.width % 4:
            raise ValueError(f"width must be a multiple of 4, got {self.width}")


@dataclass(frozen=True)
class LabelSampling:
    """How a segmentation is sampled.

    Args:
        steps: S; 1 is a single pass from noise.
        difference: t_diff, in steps.
        starts: random starts whose logits are averaged.
        accumulate: return the logarithm of the mean probability over the steps, not the last step's logits.
        intermediate_stride: resolution of the logits of all steps but the last: "fine" as in training, "coarse" skips
            the enlargement, as TaskDiffusion does.
        reencode: whether a step's prediction is encoded as its hard label or as probabilities.
        seed: of the noise; every call draws the same, so that tiles, mirrored passes and reruns agree.
        blank: feed zeros in place of z_t, once.

    Raises:
        ValueError: a number is below 1, or a name is unknown.
    """

    steps: int = 3
    difference: float = 1.0
    starts: int = 1
    accumulate: bool = False
    intermediate_stride: str = "fine"
    reencode: str = "hard"
    seed: int = 0
    blank: bool = False

    def __post_init__(self) -> None:
        _check(self, SAMPLING_CHOICES)
        if self.steps < 1 or self.starts < 1:
            raise ValueError(f"steps and starts are at least 1, got {self.steps} and {self.starts}")


def _check(shape: object, choices: Mapping[str, tuple[str, ...]]) -> None:
    for name, allowed in choices.items():
        if getattr(shape, name) not in allowed:
            raise ValueError(f"{name} is one of {allowed}, got {getattr(shape, name)!r}")


class Trained(NamedTuple):
    """Output of a training pass.

    Attributes:
        logits: (b, C, ...) at full resolution.
        aux: logits of the auxiliary heads, full resolution; empty without.
        embedding: phi of the given label (b, D, *grid), unit vectors.
        predicted: phi of the predicted probabilities, likewise; None unless asked for.
        cells: row of each cell's label (b, *grid), int64; C where it is unknown.
    """

    logits: Tensor
    aux: list[Tensor]
    embedding: Tensor
    predicted: Tensor | None
    cells: Tensor


class LabelDiffusionNet(nn.Module):
    """Visual encoder, label encoder, and the denoising decoder between them; samples inside ``forward``.

    It has no deep supervision, hence no ``decoder.deep_supervision`` to toggle.

    Args:
        input_channels: image channels.
        num_classes: C, segmentation heads.
        encoder: see `nnssl.networks.visual_encoders.build_visual_encoder`.
        decoder: arguments of `DecoderShape`.
        sampling: arguments of `LabelSampling`.
        deep_supervision: accepted for nnU-Net's builder and ignored.
        **base_kwargs: arguments of the planned class, where the encoder is the plan's.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        encoder: dict[str, Any],
        decoder: dict[str, Any],
        sampling: dict[str, Any],
        deep_supervision: bool = False,
        **base_kwargs: Any,
    ) -> None:
        super().__init__()
        self.visual = build_visual_encoder(encoder, input_channels, base_kwargs)
        self.shape, self.sampling = DecoderShape(**decoder), LabelSampling(**sampling)
        self.num_classes = num_classes
        ndim, width, levels = len(self.visual.cell), self.shape.width, len(self.visual.channels)
        style = Style(ndim, self.shape.norm, "film")
        self.mode = INTERPOLATION[ndim]
        self.lateral = nn.ModuleList(CONV[ndim](channels, width, 1) for channels in self.visual.channels)
        self.branches = nn.ModuleList(
            nn.ModuleList(Unit(style, width, film=False) for _ in range(2)) for _ in range(levels)
        )
        self.label_encoder = LabelEncoder(ndim, num_classes, width)
        self.projector = nn.Sequential(
            CONV[ndim](width, width, 1), nn.ReLU(), CONV[ndim](width, self.shape.embedding, 1)
        )
        self.time_embedding = SNREmbedding(width)
        self.interaction = LevelInteraction(style, width, levels, self.shape.level_fusion)
        self.prediction = PredictionBranch(style, width, num_classes, self.shape.upsample)
        joint = self.shape.aux == "joint"
        heads = {"joint": [levels * width], "per_level": [width] * levels, "none": []}[self.shape.aux]
        self.aux_heads = nn.ModuleList(AuxiliaryHead(style, w, width, num_classes, joint) for w in heads)

    def forward(
        self,
        x: Tensor,
        label: Tensor | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        predicted: bool = False,
        sampling: LabelSampling | None = None,
    ) -> Tensor | Trained:
        """Return sampled logits (b, C, ...) of images, or the `Trained` output beside a label.

        Args:
            x: images (b, c, ...), any size.
            label: integer label map (b, 1, ...), ``num_classes`` where it is unknown.
            t: times (b,) in [0, 1], with ``label``.
            noise: eps (b, *latent_shape), with ``label``.
            predicted: also embed the prediction.
            sampling: how to sample; None as built.

        Raises:
            ValueError: label, times and noise do not come together.
        """
        if not (label is None) == (t is None) == (noise is None):
            raise ValueError("label, t and noise go together")
        size = x.shape[2:]
        x = pad_to_multiple(x, self.visual.unit)
        features = [conv(level) for conv, level in zip(self.lateral, self.visual(x), strict=True)]
        visual = [_run(branch, level) for branch, level in zip(self.branches, features, strict=True)]
        if label is None or t is None or noise is None:
            return self._sample(features, visual, sampling or self.sampling, size)
        shares, cells = self._cells(pad_to_multiple(label, self.visual.unit, self.num_classes))
        code = self.label_encoder(shares)
        z_t = diffuse(self.shape.scale * code, t, noise) if self.shape.diffusion else torch.zeros_like(code)
        coarse = self._decode(z_t, t, features, visual)
        grid = code.shape[2:]
        own = self._project(self.label_encoder(self._pooled(coarse, grid))) if predicted else None
        aux = [self._enlarge(head_out, size) for head_out in self._auxiliary(visual)]
        return Trained(self._enlarge(coarse, size), aux, self._project(code), own, cells)

    def latent_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (E, *grid) of a label embedding for images of a spatial size."""
        unit, cell = self.visual.unit, self.visual.cell
        return (self.shape.width, *(-(-n // u) * u // c for n, u, c in zip(size, unit, cell, strict=True)))

    # ------------------------------------------------------------------ sampling (Algorithm 2)
    def _sample(self, features: list[Tensor], visual: list[Tensor], how: LabelSampling, size: Sequence[int]) -> Tensor:
        count, grid = features[0].shape[0], features[0].shape[2:]
        if how.blank or not self.shape.diffusion:
            blank = torch.zeros(count, self.shape.width, *grid, device=features[0].device)
            return self._enlarge(self._decode(blank, blank.new_ones(count), features, visual), size)
        generator = torch.Generator().manual_seed(how.seed)  # on the CPU: the same noise on every device
        start = torch.randn(how.starts, self.shape.width, *grid, generator=generator).to(features[0].device)
        z_t = start.repeat_interleave(count, 0)  # every item of a batch, hence every tile, starts from the same noise
        repeats = [how.starts, *[1] * (z_t.ndim - 1)]
        features, visual = ([level.repeat(repeats) for level in levels] for levels in (features, visual))
        total: Tensor | None = None
        for k, pair in enumerate(step_pairs(how.steps, how.difference)):
            t0, t1 = (torch.full((len(z_t),), time, device=z_t.device) for time in pair)
            last = k == how.steps - 1
            logits = self._decode(z_t, t0, features, visual, enlarge=last or how.intermediate_stride == "fine")
            if how.accumulate:
                probs = _softmax(self._enlarge(logits, size))
                total = probs if total is None else total + probs
            if not last:
                estimate = self.shape.scale * self.label_encoder(self._pooled(logits, grid, how.reencode == "hard"))
                z_t = ddim_step(z_t, estimate, t0, t1)
        if total is not None:
            result = (total / how.steps).clamp_min(SMALLEST_PROBABILITY).log()
        else:
            result = self._enlarge(logits, size)
        return result.unflatten(0, (how.starts, count)).mean(0)

    # ------------------------------------------------------------------ parts
    def _decode(
        self, z_t: Tensor, t: Tensor, features: list[Tensor], visual: list[Tensor], enlarge: bool = True
    ) -> Tensor:
        """Return logits at the prediction branch's resolution."""
        embedding = self.time_embedding(log_snr(t))
        return self.prediction(self.interaction(z_t, features, visual, embedding), embedding, enlarge)

    def _auxiliary(self, visual: list[Tensor]) -> list[Tensor]:
        inputs = [torch.cat(visual, 1)] if self.shape.aux == "joint" else visual
        return [head(x, self.shape.upsample) for head, x in zip(self.aux_heads, inputs, strict=False)]

    def _enlarge(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Interpolate logits to the padded image and crop them to ``size``."""
        full = [-(-n // u) * u for n, u in zip(size, self.visual.unit, strict=True)]
        if list(logits.shape[2:]) != full:
            logits = F.interpolate(logits, size=full, mode=self.mode, align_corners=False)
        # a copy of its own: nnU-Net's predictor adds to what it gets
        return logits[(..., *(slice(n) for n in size))].contiguous()

    @fp32
    def _project(self, code: Tensor) -> Tensor:
        return F.normalize(self.projector(code), dim=1)

    @torch.no_grad()
    def _cells(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return the label encoder's input (b, C + 1, *grid) and the label row of each cell (b, *grid)."""
        cell, rows = self.visual.cell, self.num_classes + 1
        if self.shape.label_down == "nearest":
            centers = label[(slice(None), 0, *(slice(n // 2, None, n) for n in cell))].long()
            return F.one_hot(centers, rows).movedim(-1, 1).float(), centers
        grid = [n // c for n, c in zip(label.shape[2:], cell, strict=True)]
        classes = torch.arange(rows, device=label.device).view(1, -1, *[1] * len(cell))
        shares = F.interpolate((label == classes).float(), size=grid, mode="area")
        return shares, shares.argmax(1)

    @fp32
    def _pooled(self, logits: Tensor, grid: Sequence[int], hard: bool = False) -> Tensor:
        """Return the label encoder's input (b, C + 1, *grid) for predicted logits: mean probabilities of each cell."""
        probs = logits.softmax(1)
        if probs.shape[2:] != tuple(grid):
            probs = F.interpolate(probs, size=list(grid), mode="area")
        if hard:
            probs = F.one_hot(probs.argmax(1), self.num_classes).movedim(-1, 1).to(probs)
        return torch.cat([probs, torch.zeros_like(probs[:, :1])], 1)


@fp32
def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(1)


def _run(blocks: nn.ModuleList, x: Tensor, embedding: Tensor | None = None) -> Tensor:
    for block in blocks:
        x = block(x, embedding)
    return x


def pad_to_multiple(x: Tensor, unit: Sequence[int], value: float = 0) -> Tensor:
    """Pad the ends of the spatial axes of (b, c, ...) to multiples of ``unit``."""
    missing = [-n % u for n, u in zip(x.shape[2:], unit, strict=True)]
    return F.pad(x, [v for n in reversed(missing) for v in (0, n)], value=value) if any(missing) else x


class SNREmbedding(nn.Module):
    """Embed lambda = log-SNR: ``[lambda, sin(2 pi w lambda), cos(2 pi w lambda)]``, w learned, then two layers.

    Returns SiLU-activated embeddings (b, width), as `FiLM` takes them.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(FREQUENCIES))
        self.mlp = nn.Sequential(nn.Linear(1 + 2 * FREQUENCIES, width), nn.GELU(), nn.Linear(width, width))

    @fp32
    def forward(self, snr: Tensor) -> Tensor:
        """Return embeddings (b, width) of lambda (b,)."""
        angles = 2 * torch.pi * snr[:, None] * self.frequencies
        return F.silu(self.mlp(torch.cat([snr[:, None], angles.sin(), angles.cos()], 1)))


class LabelEncoder(nn.Module):
    """Map shares of labels to codes in (-1, 1): 1-cell convolution (a table of classes), 3-cell convolution, sigmoid.

    The table has a row more than there are classes, for voxels whose label is unknown.
    """

    def __init__(self, ndim: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.table = CONV[ndim](num_classes + 1, width // 4, 1, bias=False)
        nn.init.normal_(self.table.weight)  # as embedding tables start; a convolution's own start is five times smaller
        self.mix = CONV[ndim](width // 4, width, 3, padding=1)

    @fp32
    def forward(self, shares: Tensor) -> Tensor:
        """Return ``2 sigmoid(u) - 1`` (b, width, *grid) of label shares (b, C + 1, *grid)."""
        return 2 * torch.sigmoid(self.mix(self.table(shares))) - 1


class Unit(nn.Module):
    """3-cell convolution, norm, FiLM, GELU, 1-cell convolution; with ``residual`` plus its input."""

    def __init__(self, style: Style, width: int, film: bool = True, residual: bool = False) -> None:
        super().__init__()
        self.conv = CONV[style.ndim](width, width, 3, padding=1)
        self.norm = style.make_norm(width)
        self.film = FiLM(width, width) if film else None
        self.out = CONV[style.ndim](width, width, 1)
        self.residual = residual

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Return maps of the shape of x (b, width, ...)."""
        h = self.conv(x)
        h = self.norm(h) if self.film is None or embedding is None else self.film(self.norm, h, embedding)
        h = self.out(F.gelu(h))
        return x + h if self.residual else h


class LevelInteraction(nn.Module):
    """Let z_t and each level's features choose, cell by cell, how much of the level's branch counts: sum_l M_l F_l."""

    def __init__(self, style: Style, width: int, levels: int, fusion: str) -> None:
        super().__init__()
        conv = CONV[style.ndim]
        self.fuse = nn.ModuleList(conv(2 * width, width, 1) for _ in range(levels))
        self.blocks = nn.ModuleList(nn.ModuleList(Unit(style, width) for _ in range(2)) for _ in range(levels))
        self.softmax = fusion == "softmax"
        if self.softmax:
            self.join, self.norm, self.film = conv(levels * width, width, 1), style.make_norm(width), FiLM(width, width)
            self.masks = nn.ModuleList([conv(width, levels, 3, padding=1)])
        else:
            self.masks = nn.ModuleList(conv(width, 1, 3, padding=1) for _ in range(levels))
            self.norms = nn.ModuleList(style.make_norm(1) for _ in range(levels))
            self.films = nn.ModuleList(FiLM(1, width) for _ in range(levels))

    def forward(self, z_t: Tensor, features: list[Tensor], visual: list[Tensor], embedding: Tensor) -> Tensor:
        """Return the aggregated map (b, width, *grid) of X and F, lists of (b, width, *grid)."""
        fused = [
            _run(blocks, _fuse(conv, level, z_t), embedding)
            for conv, blocks, level in zip(self.fuse, self.blocks, features, strict=True)
        ]
        if self.softmax:
            joined = F.gelu(self.film(self.norm, self.join(torch.cat(fused, 1)), embedding))
            maps = list(_softmax(self.masks[0](joined)).split(1, 1))
        else:
            sites = zip(self.films, self.norms, self.masks, fused, strict=True)
            maps = [torch.sigmoid(film(norm, mask(x), embedding)) for film, norm, mask, x in sites]
        return torch.stack([m * f for m, f in zip(maps, visual, strict=True)]).sum(0)


@fp32
def _fuse(conv: nn.Module, level: Tensor, z_t: Tensor) -> Tensor:
    """Join features and z_t in float32: half precision rounds a label of 0.01 under unit noise away."""
    return conv(torch.cat([level, z_t], 1))


class PredictionBranch(nn.Module):
    """Three residual blocks, the last one after an enlargement, and the segmentation layer."""

    def __init__(self, style: Style, width: int, num_classes: int, upsample: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Unit(style, width, residual=True) for _ in range(3))
        self.head = CONV[style.ndim](width, num_classes, 3, padding=1)
        self.upsample, self.mode = tuple(upsample), INTERPOLATION[style.ndim]

    def forward(self, x: Tensor, embedding: Tensor, enlarge: bool = True) -> Tensor:
        """Return logits (b, C, ...) of maps (b, width, *grid), enlarged or on the grid."""
        x = self.blocks[1](self.blocks[0](x, embedding), embedding)
        if enlarge and max(self.upsample) > 1:
            x = F.interpolate(x, scale_factor=[float(n) for n in self.upsample], mode=self.mode, align_corners=False)
        return self.head(self.blocks[2](x, embedding))


class AuxiliaryHead(nn.Module):
    """Segment visual branches directly, in training only: enlarge, 3-cell block, 3-cell segmentation layer.

    Args:
        style: number of axes and norm.
        channels: input channels.
        width: inner channels.
        num_classes: C.
        skip: add a 1-cell projection of the input to the block.
    """

    def __init__(self, style: Style, channels: int, width: int, num_classes: int, skip: bool) -> None:
        super().__init__()
        conv = CONV[style.ndim]
        self.conv, self.norm = conv(channels, width, 3, padding=1), style.make_norm(width)
        self.out = conv(width, width, 1)
        self.skip = conv(channels, width, 1) if skip else None
        self.head = conv(width, num_classes, 3, padding=1)
        self.mode = INTERPOLATION[style.ndim]

    def forward(self, x: Tensor, upsample: Sequence[int]) -> Tensor:
        """Return logits (b, C, ...), enlarged by ``upsample``."""
        if max(upsample) > 1:
            x = F.interpolate(x, scale_factor=[float(n) for n in upsample], mode=self.mode, align_corners=False)
        h = self.out(F.gelu(self.norm(self.conv(x))))
        return self.head(h if self.skip is None else h + self.skip(x))
