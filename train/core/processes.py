"""Distributed training: one process for each device, alone or started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from aisle.console import stderr

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together, seen from one of them."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process validates, writes files and prints."""
        return self.rank == 0

    @property
    def bf16(self) -> bool:
        """Whether bf16 is faster here: a CPU without bf16 instructions emulates it slowly."""
        if self.device.type == "cuda":
            return True
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())

    def broadcast(self, value: T) -> T:
        """Return the main process's value in all processes."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that torchrun started, if any; only the main one prints.

    Steps of a longer run, which is in such a context already, get the same processes.
    """
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if count == 1 or dist.is_initialized():
        yield Processes(rank, count, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    stderr.quiet = rank > 0
    try:
        yield Processes(rank, count, device)
    finally:
        stderr.quiet = False
        dist.destroy_process_group()
