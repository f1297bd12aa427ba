"""Starting a run from trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nnssl.errors import UserError
from nnssl.trainers.stepping import unwrap
from nnssl.training.checkpoints import load_safely

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


def load_pretrained(trainer: SemiSupervisedTrainer, path: Path) -> list[str]:
    """Copy every weight of matching name and shape into the predicting network, segmentation heads excepted.

    Teachers start from the network at the first step; partners keep their own initialization (two networks that
    teach each other must differ).

    Returns:
        Names of the network's weights that were not found in the file.

    Raises:
        UserError: if the file is unsafe or fewer than half of the network's weights match.
    """
    source = load_safely(path, numpy_scalars=True)["network_weights"]
    network = unwrap(trainer.network)
    own = {k: v for k, v in network.state_dict().items() if ".seg_layers." not in k}
    matching = {k: v for k, v in source.items() if k in own and v.shape == own[k].shape}
    missing = sorted(set(own) - set(matching))
    if len(matching) < len(own) / 2:
        got = f"{len(matching)} of {len(own)} match in {path}"
        raise UserError(
            "pretrained weights must fit the planned network", got, "half or more", "plan as for the source"
        )
    network.load_state_dict(matching, strict=False)
    trainer.print_to_log_file(f"pretrained weights: {len(matching)} of {len(own)} tensors from {path}")
    return missing
