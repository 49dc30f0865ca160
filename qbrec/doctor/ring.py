"""One rank of a real all-reduce: `python -m qbrec.doctor.ring BACKEND RANK WORLD FILE`."""

from __future__ import annotations

import sys
from datetime import timedelta

TIMEOUT_S = 20


def main(backend: str, rank: int, world: int, file: str) -> None:
    """Sum rank + 1 over all ranks, and complain if it is not what it should be."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(
        backend,
        init_method=f"file://{file}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    value = torch.full((1024,), float(rank + 1), device=device)
    dist.all_reduce(value)
    expected = world * (world + 1) / 2
    if not bool((value == expected).all()):
        raise SystemExit(f"the sum over {world} ranks is {value[0].item()} instead of {expected}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
