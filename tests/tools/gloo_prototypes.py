"""Run by torchrun on two CPU processes: updates of prototypes on different embeddings, then the buffers to files.

Class 1 lies on the second rank only, class 2 on none.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nnssl.training.prototypes import Prototypes


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    bank = Prototypes(3, 4, 8, momentum=0.5, how="cosine")
    torch.manual_seed(10 + rank)  # ranks draw different starts
    parts = []
    for step in range(3):
        generator = torch.Generator().manual_seed(100 * step + rank)
        embeddings = F.normalize(torch.randn(20 + 4 * rank, 8, generator=generator), dim=1)
        labels = torch.arange(len(embeddings)) % 2 * rank
        before = {k: v.clone() for k, v in bank.state_dict().items()}
        bank.update(embeddings, labels)
        parts.append({"before": before, "embeddings": embeddings, "labels": labels, "after": bank.value.clone()})
    torch.save({"parts": parts, "state": bank.state_dict()}, out / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
