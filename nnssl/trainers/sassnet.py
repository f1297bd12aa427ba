"""SASSNet: an adversary must not tell the shapes predicted on unlabeled images from those on labeled ones.

Li, Zhang, He, "Shape-aware Semi-supervised 3D Semantic Segmentation for Medical Images", MICCAI 2020 (arXiv
2007.10732). With the signed distances z of images x, their truth z*, and an adversary D that tells labeled (1) from
unlabeled (0)::

    network, head:  L_seg(p, y) + alpha mean (z - z*)^2 + beta CE(D(z_u, x_u), 1)
    adversary:      1/2 CE(D(z_l, x_l), 1) + 1/2 CE(D(z_u, x_u), 0)      means over the crops; z constant

Labeled crops that nnU-Net cuts around foreground are none of x_l: unlabeled ones are cut anywhere, and D would tell the
streams by how they are cropped, and reward foreground where there is none.

The network's term is the form that keeps a gradient when the adversary wins, as in the authors' code; the paper writes
the minimax.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from nnssl.trainers.base import full_resolution
from nnssl.trainers.distance import DistanceMethod, DistanceSettings
from nnssl.trainers.settings import option
from nnssl.trainers.stepping import LossGroup, Partner

#: Channels after each convolution of the adversary, in units of its width, and its dropout.
CHANNELS, DROPOUT = (1, 2, 4, 8), 0.5
#: Decays of its Adam, the authors'.
BETAS = (0.9, 0.99)


class ShapeAdversary(nn.Module):
    """Tell from distances and image whether a crop is labeled.

    Four strided convolutions, the first one of distances and of image summed, a mean over space, a linear layer. The
    authors pool by a window of the patch's size; the mean does the same for any patch.

    Args:
        distances: K, distance maps.
        images: channels of the image.
        patch_size: voxels; an axis below 4 voxels is no longer halved.
        width: channels after the first convolution.
    """

    def __init__(self, distances: int, images: int, patch_size: Sequence[int], width: int) -> None:
        super().__init__()
        conv = nn.Conv2d if len(patch_size) == 2 else nn.Conv3d
        sizes, layers, inputs = list(patch_size), [], distances + images
        for factor in CHANNELS:  # a convolution of both stacked is the sum of the two convolutions
            halved = [n >= 4 for n in sizes]
            kernel, stride = tuple(4 if h else 3 for h in halved), tuple(2 if h else 1 for h in halved)
            layers += [conv(inputs, factor * width, kernel, stride, 1), nn.LeakyReLU(0.2)]
            if factor != CHANNELS[-1]:
                layers.append((nn.Dropout2d if len(patch_size) == 2 else nn.Dropout3d)(DROPOUT))
            sizes, inputs = [n // 2 if h else n for n, h in zip(sizes, halved, strict=True)], factor * width
        self.layers, self.classifier = nn.Sequential(*layers), nn.Linear(inputs, 2)

    def forward(self, distances: Tensor, images: Tensor) -> Tensor:
        """Return logits (b, 2) of unlabeled and labeled, for distances (b, K, ...) and images (b, c, ...)."""
        with torch.autocast(images.device.type, enabled=False):
            maps = self.layers(torch.cat([distances.float(), images.float()], 1))
            return self.classifier(maps.flatten(2).mean(2))


@dataclass(frozen=True)
class SASSNetSettings(DistanceSettings):
    """Settings of shape-aware segmentation."""

    unsupervised_weight: float = option(0.01, "beta: weight of the adversarial term at the end", low=0)
    adversary_lr: float = option(1e-4, "constant learning rate of the adversary's Adam", low=1e-8)
    adversary_width: int = option(64, "channels after the adversary's first convolution", low=1)


class SASSNetTrainer(DistanceMethod):
    """One network with two tasks and an adversary; the segmentation predicts."""

    settings_class = SASSNetSettings
    settings: SASSNetSettings

    def build_method(self) -> None:
        super().build_method()
        patch, s = self.configuration_manager.patch_size, self.settings
        module = self.wrap(ShapeAdversary(self.distances, self.num_input_channels, patch, s.adversary_width), False)
        self.adversary = module
        self.partners["adversary"] = Partner(module, torch.optim.Adam(module.parameters(), s.adversary_lr, BETAS))
        # nnU-Net's loader cuts the last items of a batch around foreground (_oversample_last_XX_percent)
        self.uniform = round(self.batch_size * (1 - self.oversample_foreground_percent))
        counts = torch.tensor([float(self.uniform), 1.0], device=self.device)
        if self.is_ddp:  # ranks differ in how many such crops they have, some have none
            dist.all_reduce(counts)
        self.uniform_mean = (counts[0] / counts[1]).item()
        if self.uniform_mean == 0 and s.unsupervised_weight > 0:
            self.warn("every labeled crop is cut around foreground: the adversary sees no labeled one")

    def learning_rate(self, name: str = "network") -> float:
        return self.settings.adversary_lr if name == "adversary" else super().learning_rate(name)

    def method_losses(self, batch: dict[str, Any], weight: float) -> Iterator[LossGroup]:
        """Yield the labeled terms, the adversarial term of the network, and the adversary's own loss."""
        images, unlabeled = batch["data"], batch["unlabeled"]
        output, _, z = self.both_tasks(images)
        z_labeled, x_labeled = z[: self.uniform].detach(), images[: self.uniform]
        terms = self.labeled_terms(output, z, batch["target"])
        del output, z  # the graph must be gone before the unlabeled pass
        yield LossGroup(terms)
        output, _, z = self.both_tasks(unlabeled["strong"])
        hard = self.label_space.harden(self.label_space.probs(full_resolution(output).detach()))
        self.watch_foreground("network", hard, unlabeled["valid"])
        z_unlabeled = z.detach()
        terms = {"loss_shape": weight * self._fool(z, unlabeled["strong"])}
        del output, z
        yield LossGroup(terms, step=("network", "distance"))
        logits = self.adversary(torch.cat([z_labeled, z_unlabeled]), torch.cat([x_labeled, unlabeled["strong"]]))
        count = len(x_labeled)
        truth = torch.arange(len(logits), device=logits.device) < count
        each = functional.cross_entropy(logits, truth.long(), reduction="none")
        # divided by the mean over ranks, so that the mean of their gradients is that of one process
        loss = each[:count].sum() / (2 * max(self.uniform_mean, 1e-8)) + each[count:].mean() / 2
        found = (logits.argmax(1) == truth).float().mean()
        yield LossGroup({"loss_adversary": loss}, step=("adversary",), log={"adversary_accuracy": found})

    def _fool(self, z: Tensor, images: Tensor) -> Tensor:
        """Return the cross-entropy of unlabeled crops with "labeled"; no gradient reaches the adversary."""
        self.adversary.requires_grad_(False).eval()
        logits = self.adversary(z, images)
        self.adversary.requires_grad_(True).train()
        return functional.cross_entropy(logits, torch.ones(len(z), dtype=torch.int64, device=z.device))
