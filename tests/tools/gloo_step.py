"""Run by torchrun on two CPU processes: a few steps of a trainer, then the weights of every rank to files."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from nnssl.trainers.launch import Job, read_plans
from nnssl.trainers.registry import trainer_class
from nnssl.training.class_statistics import ClassState


def main() -> None:
    name, plans_name, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    settings = json.loads(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
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
    unlabeled = batches[0].get("unlabeled")
    kept = (nn.Module, ClassState)  # what every rank must know alike
    record = {
        "weights": {n: [p.detach().clone() for p in m.parameters()] for n, m in networks.items()},
        "guidance": trainer.modules["tau"].state_dict() if "tau" in trainer.modules else {},
        "data": batches[0]["data"],
        "modules": {n: list(m.state_dict().values()) for n, m in trainer.modules.items() if isinstance(m, kept)},
        "sizes": [len(batches[0]["data"]), 0 if unlabeled is None else len(unlabeled["strong"])],
    }
    torch.save(record, out / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
