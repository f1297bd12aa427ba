"""Image encoders that return several feature maps on one common grid: nnU-Net's planned encoder, or a ViT of timm.

A grid cell covers ``cell`` voxels of each axis. Nothing here opens a connection: timm builds its models without
weights, and weights come from a local file.
"""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from nnssl.environment import mend_torchvision
from nnssl.errors import UserError
from nnssl.networks.conv_unet import INTERPOLATION
from nnssl.networks.planned import locate_base

#: timm's models by the name a setting has; all have patches of 16 x 16 pixels.
VITS = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_384",
    "vit_large": "vit_large_patch16_384",
}
PATCH = 16
#: A weights file must hold this share of the keys of the transformer's blocks.
MIN_MATCHED = 0.9


class PlannedLevels(nn.Module):
    """Stages of a planned nnU-Net encoder, resized to one grid.

    Args:
        input_channels: image channels.
        base: dotted path of ``PlainConvUNet`` or ``ResidualEncoderUNet``.
        stages: stages whose output is returned, counted from 0.
        cell: voxels of a grid cell, one number an axis.
        **base_kwargs: the planned class's own arguments.
    """

    def __init__(
        self, input_channels: int, base: str, stages: Sequence[int], cell: Sequence[int], **base_kwargs: Any
    ) -> None:
        super().__init__()
        planned = locate_base(base)(input_channels=input_channels, num_classes=2, deep_supervision=False, **base_kwargs)
        self.encoder = planned.encoder
        self.encoder.apply(InitWeights_He(1e-2))
        self.stages, self.cell = tuple(stages), tuple(cell)
        self.channels = [self.encoder.output_channels[s] for s in stages]
        total = [math.prod(along) for along in zip(*self.encoder.strides, strict=True)]
        #: Image sizes must be multiples of this.
        self.unit = tuple(max(n, c) for n, c in zip(total, cell, strict=True))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return one map (b, channels, *grid) a level of images whose sizes are multiples of ``unit``."""
        grid = [n // c for n, c in zip(x.shape[2:], self.cell, strict=True)]
        skips = self.encoder(x)
        return [resize(skips[s], grid) for s in self.stages]


class ViTLevels(nn.Module):
    """Blocks of a Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), 2D.

    Args:
        input_channels: image channels.
        name: a model of timm.
        size: image size (height, width) the positional embedding is made for, multiples of 16; others are resampled.
        drop_path: largest rate of stochastic depth.
        unit_range: images come in 0..1 and are normalized as the weights expect; otherwise they come normalized.
        model: further arguments of timm's model, for tests.

    Raises:
        UserError: a size that is no multiple of 16.
    """

    def __init__(
        self,
        input_channels: int,
        name: str,
        size: Sequence[int],
        drop_path: float = 0.0,
        unit_range: bool = False,
        model: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if any(n % PATCH for n in size):
            raise UserError("a ViT's image size must be a multiple of 16", list(size))
        self.vit = _timm().create_model(
            name,
            pretrained=False,
            num_classes=0,
            global_pool="",
            img_size=tuple(size),
            dynamic_img_size=True,
            in_chans=input_channels,
            drop_path_rate=drop_path,
            **(model or {}),
        )
        depth = len(self.vit.blocks)
        #: Four blocks evenly spaced, the last one included.
        self.taps = [depth * (i + 1) // 4 - 1 for i in range(4)]
        self.channels = [self.vit.embed_dim] * 4
        self.cell = self.unit = (PATCH, PATCH)
        mean, std = (_per_channel(self.vit.pretrained_cfg[key], input_channels) for key in ("mean", "std"))
        self.register_buffer("mean", mean if unit_range else torch.zeros_like(mean), persistent=False)
        self.register_buffer("std", std if unit_range else torch.ones_like(std), persistent=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return four maps (b, channels, height/16, width/16); the last one passed the ViT's final norm."""
        maps = self.vit.forward_intermediates(
            (x - self.mean) / self.std, indices=self.taps, norm=False, intermediates_only=True, output_fmt="NCHW"
        )
        maps[-1] = self.vit.norm(maps[-1].movedim(1, -1)).movedim(-1, 1)
        return maps


def build_visual_encoder(encoder: dict[str, Any], input_channels: int, base_kwargs: dict[str, Any]) -> nn.Module:
    """Build the encoder that a plan describes.

    Args:
        encoder: ``{"kind": "plan" | "vit", ...}`` with the arguments of `PlannedLevels` or `ViTLevels`.
        input_channels: image channels.
        base_kwargs: the planned class's own arguments; unused by a ViT.
    """
    arguments = {key: value for key, value in encoder.items() if key != "kind"}
    if encoder["kind"] == "vit":
        return ViTLevels(input_channels, **arguments)
    return PlannedLevels(input_channels, **arguments, **base_kwargs)


@torch.no_grad()
def load_vit_weights(encoder: ViTLevels, path: str | Path) -> str:
    """Load a local weights file into a ViT: ``.pth``, ``.safetensors``, or Google's ``.npz``.

    The positional embedding is resampled to the encoder's size, the first layer adapted to its channels, a classifier
    left out.

    Returns:
        One line for the log: file, hash, matched and missing keys.

    Raises:
        UserError: no such file, or it holds fewer than 90 % of the blocks' keys in the right shape.
    """
    path = Path(path)
    if not path.is_file():
        todo = "give the path of a local weights file; nothing is downloaded"
        raise UserError("backbone_weights must name a file", str(path), None, todo)
    own = encoder.vit.state_dict()
    source = _from_npz(encoder.vit, path) if path.suffix == ".npz" else _from_file(encoder.vit, path)
    matching = {k: v for k, v in source.items() if k in own and v.shape == own[k].shape}
    blocks = [k for k in own if k.startswith("blocks.")]
    found = sum(k in matching for k in blocks)
    if found < MIN_MATCHED * len(blocks):
        got = f"{found} of {len(blocks)} in {path}"
        raise UserError("a backbone's weights must fit its blocks", got, "90 % or more", "check backbone and file")
    encoder.vit.load_state_dict(matching, strict=False)
    missing = sorted(set(own) - set(matching))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{path} (sha256 {digest}): {len(matching)} of {len(own)} tensors, missing: {', '.join(missing) or 'none'}"


def _from_file(vit: nn.Module, path: Path) -> dict[str, Tensor]:
    """Return a checkpoint's weights in the ViT's own layout."""
    _timm()
    from timm.models import load_state_dict
    from timm.models.vision_transformer import checkpoint_filter_fn

    try:
        state = checkpoint_filter_fn(load_state_dict(str(path), use_ema=False, weights_only=True), vit)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, OSError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError("backbone_weights must be a checkpoint of a ViT", f"{path}: {first_line}") from error
    return _adapt_channels(state, vit)


def _adapt_channels(state: dict[str, Tensor], vit: nn.Module) -> dict[str, Tensor]:
    from timm.models import adapt_input_conv

    key, channels = "patch_embed.proj.weight", vit.patch_embed.proj.weight.shape[1]
    if key in state and state[key].shape[1] != channels:
        state[key] = adapt_input_conv(channels, state[key])
    return state


def _from_npz(vit: nn.Module, path: Path) -> dict[str, Tensor]:
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    try:
        vit.load_pretrained(str(path))
    except (KeyError, ValueError, RuntimeError, OSError) as error:
        vit.load_state_dict(before)
        raise UserError("backbone_weights must be a checkpoint of a ViT", f"{path}: {error}") from error
    return vit.state_dict()


def _timm() -> ModuleType:
    """Import timm, which nnU-Net brings and only a ViT needs."""
    mend_torchvision()
    import timm

    return timm


def _per_channel(values: Sequence[float], channels: int) -> Tensor:
    """Return RGB statistics for any number of channels: as they are for three, else their mean."""
    given = torch.tensor(values)
    return (given if channels == 3 else given.mean().expand(channels)).reshape(1, -1, 1, 1).clone()


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (b, c, ...): axes that shrink are averaged over areas, axes that grow are interpolated linearly."""
    smaller = [min(have, want) for have, want in zip(x.shape[2:], size, strict=True)]
    if smaller != list(x.shape[2:]):
        x = F.interpolate(x, size=smaller, mode="area")
    if list(size) != smaller:
        x = F.interpolate(x, size=list(size), mode=INTERPOLATION[x.ndim - 2], align_corners=False)
    return x
