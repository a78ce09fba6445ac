"""The processes of a run: one by default, any number under torchrun, with the same code.

Every process holds the whole model and takes its share of each step's rows; gradients are averaged after
the last micro-batch, so tokens per step and the result do not depend on the number of processes.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size`, working on `device`."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its mean over all processes."""
        if self.size == 1:
            return
        tensors = list(tensors)
        handles = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        for handle in handles:
            handle.wait()
        torch._foreach_div_(tensors, self.size)

    def total(self, value: float) -> float:
        """The sum of a number over all processes; every process must ask."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, device=self.device, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.item()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; every process must ask."""
        return self.total(float(flag)) > 0

    def barrier(self) -> None:
        """Waits for all processes."""
        self.total(0.0)


@contextmanager
def start_world(device: torch.device) -> Iterator[World]:
    """Joins the processes that torchrun started, or stands alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device)
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield World(device, rank, size)
    finally:
        dist.destroy_process_group()
