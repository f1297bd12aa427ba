"""Diff-VNet on nnU-Net's planned topology: one encoder, read by a denoising and two segmenting decoders.

Wang and Li, "Towards Generic Semi-Supervised Framework for Volumetric Medical Image Segmentation", NeurIPS 2023 (arXiv
2310.11320). Names are the paper's: xi diffusion decoder, psi difficulty-aware decoder, theta predictor.

The full-resolution level exists twice: one stem reads the image, the other image and noisy label. All deeper levels are
shared. Image stem, encoder and theta are the planned U-Net itself, and nothing else runs at prediction.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nnssl.networks.conditioning import TimeEmbedding
from nnssl.networks.planned import Modulation, build_films, locate_base, run_decoder, run_stage, stem_of

DECODERS = ("theta", "psi", "xi", "both")


class DecoderModes(nn.Module, ABC):
    """The one entry of a Diff-VNet, whatever its layers are.

    Attributes:
        shares_features: psi and theta may read one encoding of an image (no dropout tells their passes apart).
        frozen_statistics: passes without gradient and diffusion passes leave the running statistics of batch norms
            alone. Inference reads images only, and needs the statistics of images.
    """

    shares_features = True
    frozen_statistics = True

    @property
    @abstractmethod
    def decoders(self) -> dict[str, nn.Module]:
        """The three decoders, by the paper's names; same layers, same parameter names."""

    @abstractmethod
    def encode_image(self, x: Tensor) -> list[Tensor]:
        """Return the features of images (b, c, ...), full resolution first."""

    @abstractmethod
    def decode(self, name: str, features: list[Tensor]) -> Tensor | list[Tensor]:
        """Return the output of theta or psi."""

    @abstractmethod
    def denoise(self, x: Tensor, noisy: Tensor, t: Tensor) -> Tensor | list[Tensor]:
        """Return xi's logits of the clean label."""

    def matched_parameters(self) -> Iterator[tuple[nn.Parameter, nn.Parameter, nn.Parameter]]:
        """Yield the parameters of theta, xi and psi that stand in the same place."""
        theta, xi, psi = (dict(self.decoders[name].named_parameters()) for name in ("theta", "xi", "psi"))
        for name in psi:
            yield theta[name], xi[name], psi[name]

    @torch.no_grad()
    def share_start(self) -> None:
        """Start xi and psi from theta's weights: the mean of unrelated decoders would segment nothing."""
        for theta, xi, psi in self.matched_parameters():
            xi.copy_(theta)
            psi.copy_(theta)

    def forward(self, x: Tensor, decoder: str = "theta", noisy: Tensor | None = None, t: Tensor | None = None) -> Any:
        """Return a decoder's logits, or nnU-Net's deep-supervision list of them where that is switched on.

        Args:
            x: images (b, c, *spatial).
            decoder: "theta" or "psi" (image alone), "xi" (image and noisy label), or "both": (theta's output, psi's
                logits without gradient, full resolution), from one encoding where the network allows it.
            noisy: x_t of xi, (b, K, *spatial).
            t: integer time steps of xi, (b,).
        """
        if decoder not in DECODERS or (decoder == "xi") != (noisy is not None) or (noisy is None) != (t is None):
            raise ValueError(f"decoder must be one of {DECODERS}; xi alone takes a noisy label and its time step")
        if noisy is not None and t is not None:
            with self._own_statistics():
                return self.denoise(x, noisy, t)
        if decoder != "both":
            with self._own_statistics() if self.training and not torch.is_grad_enabled() else contextlib.nullcontext():
                return self.decode(decoder, self.encode_image(x))
        # theta first: autocast keeps half copies of weights, and those made without gradient must not serve its pass
        features = self.encode_image(x)
        theta = self.decode("theta", features)
        with torch.no_grad(), self._own_statistics():
            psi = self.decode("psi", features if self.shares_features else self.encode_image(x))
        return theta, psi[0] if isinstance(psi, list) else psi

    @contextlib.contextmanager
    def _own_statistics(self) -> Iterator[None]:
        """Let batch norms use the batch at hand, and leave their running statistics alone."""
        norms = [m for m in self.modules() if isinstance(m, _BatchNorm)] if self.frozen_statistics else []
        before = [(norm.training, norm.track_running_stats) for norm in norms]
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        try:
            yield
        finally:
            for norm, (training, tracked) in zip(norms, before, strict=True):
                norm.training, norm.track_running_stats = training, tracked


class PlannedDiffVNet(DecoderModes):
    """Diff-VNet from a plan's U-Net, plain or residual.

    ``encoder`` and ``decoder`` (theta) are the planned network, with its state-dict keys and starting weights. The time
    step enters the diffusion stem, the shared encoder and xi by FiLM after every norm; image passes skip it.

    Args:
        input_channels: channels of the image.
        num_classes: segmentation heads, background included.
        base: dotted path of the planned class.
        deep_supervision: lower resolutions' logits too; ``decoder.deep_supervision`` switches all three decoders.
        batch_statistics: "image" keeps diffusion passes and passes without gradient out of the running statistics of
            batch norms, if the plan has any; "all" counts every pass, as the authors' code does.
        **base_kwargs: the planned class's own arguments.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        base: str,
        deep_supervision: bool = False,
        batch_statistics: str = "image",
        **base_kwargs: Any,
    ) -> None:
        super().__init__()
        self.frozen_statistics = batch_statistics == "image"
        self.shares_features = not base_kwargs.get("dropout_op")
        base_class = locate_base(base)
        common = {"num_classes": num_classes, "deep_supervision": deep_supervision, **base_kwargs}
        planned = base_class(input_channels=input_channels, **common)
        self.encoder, self.decoder = planned.encoder, planned.decoder
        self.initialize = base_class.initialize
        # nnU-Net's fine-tuning finds the encoder and the stem through these.
        self.key_to_encoder, self.key_to_stem = planned.key_to_encoder, planned.key_to_stem
        self.keys_to_in_proj = planned.keys_to_in_proj
        with torch.random.fork_rng(devices=[]):  # the parts below must not move the random numbers of what follows
            noisy, image = (base_class(input_channels=n, **common) for n in (input_channels + num_classes, 1))
            first = stem_of(noisy.encoder)
            self.diffusion_stem = nn.ModuleList([*([] if first is None else [first]), noisy.encoder.stages[0]])
            self.xi, self.psi = _alone(noisy.decoder), _alone(image.decoder)
            self.time_embedding = TimeEmbedding()
            self.films = build_films([*self.diffusion_stem, *self.encoder.stages[1:], *self.xi.stages])

    @property
    def decoders(self) -> dict[str, nn.Module]:
        return {"theta": self.decoder, "psi": self.psi, "xi": self.xi}

    def encode_image(self, x: Tensor) -> list[Tensor]:
        stem = stem_of(self.encoder)
        return _run_each(self.encoder.stages, x if stem is None else stem(x), None)

    def decode(self, name: str, features: list[Tensor]) -> Tensor | list[Tensor]:
        return run_decoder(self.decoders[name], features, None, self.decoder.deep_supervision)[0]

    def denoise(self, x: Tensor, noisy: Tensor, t: Tensor) -> Tensor | list[Tensor]:
        modulation = Modulation(self.time_embedding(t), iter(list(self.films)))  # a list: dynamo cannot walk modules
        first = _run_each(self.diffusion_stem, torch.cat([x, noisy.to(x.dtype)], 1), modulation)[-1]
        features = [first, *_run_each(self.encoder.stages[1:], first, modulation)]
        return run_decoder(self.xi, features, modulation, self.decoder.deep_supervision)[0]


def _run_each(sections: Iterable[nn.Module], x: Tensor, modulation: Modulation | None) -> list[Tensor]:
    """Run sections one after another and return what each of them gives."""
    outputs = []
    for section in sections:
        x = run_stage(section, x, modulation)
        outputs.append(x)
    return outputs


def _alone(decoder: nn.Module) -> nn.Module:
    """Take the encoder out of a planned decoder, which keeps it as a part and does not run it."""
    del decoder.encoder
    return decoder
