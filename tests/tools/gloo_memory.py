"""Run by torchrun on two CPU processes: pushes to a memory bank that ranks share, then its state to files.

In the first push both ranks visit case "both"; in the second the first rank has nothing; in the third none has.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nnssl.training.memory_bank import MemoryBank


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(10 + rank)
    bank = MemoryBank(capacity=4)
    own = {f"own{rank}": 3 + rank, "both": 9}  # voxels of each case
    features = [torch.full((n, 2), float(rank)) for n in own.values()]
    bank.push([*own], features, [torch.arange(n) % 2 for n in own.values()], all_ranks=True)
    later = [] if rank == 0 else ["late"]
    bank.push(later, [torch.ones(5, 2) for _ in later], [torch.full((5,), 7) for _ in later], all_ranks=True)
    bank.push([], [], [], all_ranks=True)
    torch.save(bank.state_dict(), out / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
