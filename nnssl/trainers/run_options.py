"""Options of one run that belong to no method: seed and length."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from nnssl.errors import UserError

PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class RunOptions:
    """What ``nnssl_train`` sets for every trainer. Stored in the run's plans as ``plans['nnssl']['run']``.

    Args:
        seed: seed of weights, batches and the steps' own randomness.
        epochs: number of epochs (nnU-Net's unit of logging and checkpoints).
        iterations_per_epoch: training steps an epoch. The default run has 30,000 iterations.
        tensorboard: also write TensorBoard event files.
        precision: "auto" is nnU-Net's (half precision on CUDA, single elsewhere); "fp32" is single everywhere;
            "bf16" is bfloat16 autocast, on CPUs with such instructions almost twice as fast. Losses, statistics and
            diffusion stay in single precision.
    """

    seed: int = 0
    epochs: int = 120
    iterations_per_epoch: int = 250
    tensorboard: bool = False
    precision: str = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "iterations_per_epoch"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1", getattr(self, name))
        if self.precision not in PRECISIONS:
            raise UserError("--precision must be known", repr(self.precision), ", ".join(PRECISIONS))
        if not 0 <= self.seed < 2**32:
            raise UserError("--seed must be a 32-bit number", self.seed, "0 to 4294967295")

    @classmethod
    def from_plans(cls, plans: dict) -> RunOptions:
        """Read the options from a run's plans; absent = defaults."""
        return cls(**plans.get("nnssl", {}).get("run", {}))

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def total_steps(self) -> int:
        """Number of training iterations of the whole run."""
        return self.epochs * self.iterations_per_epoch

    @property
    def validation_iterations(self) -> int:
        """Patches batches watched an epoch: a tenth of the training iterations, at least one."""
        return max(1, self.iterations_per_epoch // 10)
