"""Several processes of a group, each of which runs the same function."""

import os
import socket
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def in_processes(function: Callable[[int], Any], world: int = 2) -> list[Any]:
    """Run ``function(rank)`` in every process of a group, and return what each returned: tensors and plain values."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        arguments = (function, world, port, folder)
        torch.multiprocessing.start_processes(_run, arguments, nprocs=world, start_method="fork")
        return [torch.load(f"{folder}/{rank}", weights_only=True) for rank in range(world)]


def _run(rank: int, function: Callable[[int], Any], world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.save(function(rank), os.path.join(folder, str(rank)))
    dist.barrier()
    dist.destroy_process_group()
