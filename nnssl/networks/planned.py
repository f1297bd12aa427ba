"""The planned nnU-Net with the parts semi-supervised methods add: one entry, no hooks, no hidden state."""

from __future__ import annotations

import copy
import pydoc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD, StackedResidualBlocks
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU, StackedConvBlocks
from torch import Tensor, nn

from nnssl.errors import UserError
from nnssl.networks.conditioning import FiLM, TimeEmbedding
from nnssl.networks.high_frequency_mamba import build_hfm_modules

BASES = (PlainConvUNet, ResidualEncoderUNet)
MIN_HFM_SIZE = 8  # below this a spectrum has too few coefficients for a cut-off to mean anything


class PlannedUNet(nn.Module):
    """Planned U-Net with optional time conditioning and high-frequency Mamba modules.

    Without either it equals the planned class bit for bit: same state-dict keys, same random numbers at construction,
    same outputs. With them, ``encoder`` and ``decoder`` still start from the same weights as the plain network built
    from the same seed. nnU-Net's ``get_network_from_plans`` builds it from ``architecture`` entries alone.

    Args:
        input_channels: channels of the input, time-conditioned label channels included.
        num_classes: segmentation heads.
        base: dotted path of ``PlainConvUNet`` or ``ResidualEncoderUNet``.
        deep_supervision: also return the lower resolutions' logits; toggled later by ``decoder.deep_supervision``.
        hfm: None, or {"stages": encoder stages whose output passes a `HighFrequencyMamba` before it feeds the skip
            connection and the next stage, and any of its keywords "threshold", "mask", "mode", "scan_backend"}.
        conditioning: build the time embedding and one FiLM per norm of the conv blocks (projections of residual
            skips excepted).
        **base_kwargs: the planned class's own arguments.

    Raises:
        UserError: unknown base class, HFM stage or HFM key; conditioning of a network without norms.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        base: str,
        deep_supervision: bool = False,
        hfm: dict[str, Any] | None = None,
        conditioning: bool = False,
        **base_kwargs: Any,
    ) -> None:
        super().__init__()
        base_class = locate_base(base)
        planned = base_class(
            input_channels=input_channels, num_classes=num_classes, deep_supervision=deep_supervision, **base_kwargs
        )
        self.encoder, self.decoder = planned.encoder, planned.decoder
        self.initialize = base_class.initialize
        # nnU-Net's fine-tuning finds the encoder and the stem through these.
        self.key_to_encoder, self.key_to_stem = planned.key_to_encoder, planned.key_to_stem
        self.keys_to_in_proj = planned.keys_to_in_proj
        self.feature_channels: int = self.decoder.seg_layers[-1].in_channels
        with torch.random.fork_rng(devices=[]):  # the parts below must not move the random numbers of what follows
            ndim = convert_conv_op_to_dim(self.encoder.conv_op)
            self.hfm = build_hfm_modules(hfm, self.encoder.output_channels, ndim)
            if conditioning:
                self.time_embedding = TimeEmbedding()
                self.films = self._build_films()
        self.conditioning = conditioning

    def _build_films(self) -> nn.ModuleList:
        stem = [] if stem_of(self.encoder) is None else [self.encoder.stem]
        sections = [*stem, *self.encoder.stages, *self.decoder.stages]
        return build_films(sections)

    def forward(
        self, x: Tensor, t: Tensor | None = None, features: bool = False
    ) -> Tensor | list[Tensor] | tuple[Tensor | list[Tensor], Tensor]:
        """Return logits, or nnU-Net's deep-supervision list (full resolution first).

        Args:
            x: input, (b, channels, *spatial).
            t: integer time steps, (b,). None skips the FiLM sites, which is what they start as.
            features: return (output, input of the last segmentation layer (b, feature_channels, *spatial)).
        """
        modulation = None if t is None else self._modulation(t)
        output, last = run_decoder(self.decoder, self._encode(x, modulation), modulation, self.decoder.deep_supervision)
        return (output, last) if features else output

    def _modulation(self, t: Tensor) -> Modulation:
        if not self.conditioning:
            raise ValueError("a time step was given to a network that was built without conditioning")
        return Modulation(self.time_embedding(t), iter(list(self.films)))  # a list: dynamo cannot walk modules

    def _after_stage(self, index: int, x: Tensor) -> Tensor:
        """Return what goes on from an encoder stage's output, as skip and into the next stage."""
        return self.hfm[str(index)](x) if str(index) in self.hfm else x

    def _encode(self, x: Tensor, modulation: Modulation | None) -> list[Tensor]:
        stem, skips = stem_of(self.encoder), []
        if stem is not None:
            x = run_stage(stem, x, modulation)
        for index, stage in enumerate(self.encoder.stages):
            x = run_stage(stage, x, modulation)
            x = self._after_stage(index, x)
            skips.append(x)
        return skips


def build_films(sections: Sequence[nn.Module]) -> nn.ModuleList:
    """Return one FiLM a norm of the sections' conv blocks, in running order.

    Raises:
        UserError: a block has no norm.
    """
    blocks = [block for section in sections for block in _conv_blocks(section)]
    if not all(hasattr(block, "norm") for block in blocks):
        raise UserError("time conditioning needs a network with norms", remedy="plan with a norm_op")
    return nn.ModuleList(FiLM(block.norm.num_features) for block in blocks)


def run_decoder(
    decoder: nn.Module,
    skips: Sequence[Tensor],
    modulation: Modulation | None,
    deep_supervision: bool,
    before_head: Callable[[Tensor], Tensor] | None = None,
    scales: list[Tensor] | None = None,
) -> tuple[Tensor | list[Tensor], Tensor]:
    """Run a planned decoder on the encoder's outputs; ``before_head`` changes what a segmentation layer is given.

    ``scales`` is filled with the features of every resolution, lowest first.

    Returns:
        Logits, or with deep supervision a list of them (full resolution first), and the last layer's input.
    """
    x, outputs = skips[-1], []
    last = len(decoder.stages) - 1
    for s, stage in enumerate(decoder.stages):
        x = torch.cat((decoder.transpconvs[s](x), skips[-(s + 2)]), 1)
        x = run_stage(stage, x, modulation)
        if scales is not None:
            scales.append(x)
        if deep_supervision or s == last:
            outputs.append(decoder.seg_layers[s](x if before_head is None else before_head(x)))
    return (outputs[::-1] if deep_supervision else outputs[-1]), x


class Modulation:
    """The embedding of one forward pass and the FiLM sites in the order the pass meets them."""

    def __init__(self, embedding: Tensor, films: Iterator[nn.Module]) -> None:
        self.embedding, self.films = embedding, films


def set_dropout(configuration: dict[str, Any], rate: float) -> None:
    """Give a configuration's planned network channel dropout after the convolution of every block (idempotent).

    Whole channels are dropped: the norm that follows would undo the scaling of single values. Weights start as without
    dropout. The state dict names a norm twice, and the name with its number in the block is another one then; weights
    load by the other.

    Args:
        configuration: a configuration of a run's own copy of the plans.
        rate: in (0, 1).
    """
    architecture, ndim = configuration["architecture"], len(configuration["patch_size"])
    kwargs = {"dropout_op": f"torch.nn.modules.dropout.Dropout{ndim}d", "dropout_op_kwargs": {"p": rate}}
    named = [*architecture["_kw_requires_import"], "dropout_op"]
    configuration["architecture"] = {
        **architecture,
        "arch_kwargs": {**architecture["arch_kwargs"], **kwargs},
        "_kw_requires_import": list(dict.fromkeys(named)),
    }


def extend_planned(configuration: dict[str, Any], network: str, **kwargs: Any) -> None:
    """Put a network that extends the planned one into a configuration (idempotent).

    Args:
        configuration: a configuration of a run's own copy of the plans.
        network: dotted path of a class that takes the planned class's arguments, its path as ``base``, and ``kwargs``.
        **kwargs: further arguments, JSON-able.
    """
    architecture = configuration["architecture"]
    if architecture["network_class_name"] == network:
        return
    given = {**copy.deepcopy(architecture["arch_kwargs"]), "base": architecture["network_class_name"], **kwargs}
    configuration["architecture"] = {**architecture, "network_class_name": network, "arch_kwargs": given}


def locate_base(base: str) -> type[nn.Module]:
    """Return the planned class behind a dotted path.

    Raises:
        UserError: it is none that nnU-Net plans.
    """
    found = pydoc.locate(base) if isinstance(base, str) else base
    if not (isinstance(found, type) and issubclass(found, BASES)):
        allowed = ", ".join(f"{c.__module__}.{c.__name__}" for c in BASES)
        raise UserError("the planned network class must be one nnU-Net plans", got=base, allowed=allowed)
    return found


def stem_of(encoder: nn.Module) -> nn.Module | None:
    """Return the convolutions before a residual encoder's first stage, None for a plain encoder."""
    return getattr(encoder, "stem", None)


def run_stage(module: nn.Module, x: Tensor, modulation: Modulation | None) -> Tensor:
    """Run a stage; with a modulation, walk down to its conv blocks and condition their norms."""
    if modulation is None:
        return module(x)
    if isinstance(module, ConvDropoutNormReLU):
        return _run_conv_block(module, x, modulation)
    if isinstance(module, BasicBlockD | BottleneckD):
        return _run_residual_block(module, x, modulation)
    for child in _children(module):
        x = run_stage(child, x, modulation)
    return x


def _run_conv_block(block: ConvDropoutNormReLU, x: Tensor, modulation: Modulation) -> Tensor:
    film = next(modulation.films)
    for layer in block.all_modules:
        x = film(layer, x, modulation.embedding) if layer is block.norm else layer(x)
    return x


def _run_residual_block(block: BasicBlockD | BottleneckD, x: Tensor, modulation: Modulation) -> Tensor:
    residual = block.skip(x)
    for conv in _conv_blocks(block):
        x = _run_conv_block(conv, x, modulation)
    if block.apply_stochastic_depth:
        x = block.drop_path(x)
    if block.apply_se:
        x = block.squeeze_excitation(x)
    return (block.nonlin2 if isinstance(block, BasicBlockD) else block.nonlin3)(x + residual)


def _children(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, StackedConvBlocks):
        return iter(module.convs)
    if isinstance(module, StackedResidualBlocks):
        return iter(module.blocks)
    if isinstance(module, nn.Sequential):
        return iter(module)
    raise TypeError(f"cannot condition a {type(module).__name__}")


def _conv_blocks(module: nn.Module) -> list[ConvDropoutNormReLU]:
    """List the conv blocks of a stage in running order, without the projections of residual skips."""
    if isinstance(module, ConvDropoutNormReLU):
        return [module]
    if isinstance(module, BasicBlockD):
        return [module.conv1, module.conv2]
    if isinstance(module, BottleneckD):
        return [module.conv1, module.conv2, module.conv3]
    return [block for child in _children(module) for block in _conv_blocks(child)]


def choose_hfm_stage(patch_size: Sequence[int], strides: Sequence[Sequence[int] | int]) -> int:
    """Return the deepest encoder stage whose every spatial size is at least 8, else the deepest one.

    Args:
        patch_size: training patch, voxels.
        strides: per encoder stage, as in the plan.
    """
    sizes, large_enough = list(patch_size), []
    for stage, stride in enumerate(strides):
        steps = [stride] * len(sizes) if isinstance(stride, int) else stride
        sizes = [-(-n // s) for n, s in zip(sizes, steps, strict=True)]
        if min(sizes) >= MIN_HFM_SIZE:
            large_enough.append(stage)
    return large_enough[-1] if large_enough else len(strides) - 1
