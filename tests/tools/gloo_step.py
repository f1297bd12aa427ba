"""Run by torchrun on two CPU processes: a few steps of each trainer, then what every rank has to files."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nnssl.trainers.launch import Job, read_plans
from nnssl.trainers.registry import trainer_class


def flat(state: Mapping[Any, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors of a nested state by their path."""
    result = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}/")
        else:
            result[f"{prefix}{key}"] = torch.as_tensor(value)
    return result


def run(name: str, plans_name: str, settings: dict[str, Any]) -> dict[str, Any]:
    job = Job("901", "2d", "all", name, plans_name, settings=settings, options={"epochs": 1, "iterations_per_epoch": 2})
    plans, dataset_json = read_plans(job)
    trainer = trainer_class(name)(plans, "2d", "all", dataset_json, torch.device("cpu"))
    trainer.initialize()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    trainer.set_deep_supervision_enabled(True)
    trainer.network.train()
    batches = [next(trainer.dataloader_train) for _ in range(2)]
    for batch in batches:
        trainer.train_step(batch)
    networks = {"network": trainer.network} | {n: p.module for n, p in trainer.partners.items()}
    unlabeled, pseudo = batches[0].get("unlabeled"), batches[0].get("pseudo")
    return {
        "weights": {n: flat(dict(m.named_parameters())) for n, m in networks.items()},
        "modules": {n: flat(m.state_dict()) for n, m in trainer.modules.items()},
        "data": batches[0]["data"],
        "sizes": [len(batches[0]["data"]), 0 if unlabeled is None else len(unlabeled["strong"])],
        "pseudo": None if pseudo is None else pseudo["data"],
    }


def main() -> None:
    plans_name, out, trainers = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, settings in trainers.items():
        print(f"running {name}", file=sys.stderr, flush=True)  # the last one is where it fails or hangs
        torch.save(run(name, plans_name, settings), out / f"{name}.rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
