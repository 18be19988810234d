"""Several processes under torchrun; a single process acts as if there were no others.

Each process runs the complete program. They divide the examples of a batch and the problems of a
sampling among themselves; only process 0 writes files and prints.
"""

import os
import signal
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

TIMEOUT = timedelta(hours=4)  # how long a process waits for the others before it gives up


def start_processes(device: str) -> None:
    """Join the process group if torchrun started this process: NCCL between GPUs, else gloo.

    Raises ValueError for a start by srun alone, whose tasks would all write the same files.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # set by torchrun
        if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
            raise ValueError("srun starts one torchrun per node: srun -n 1 torchrun ... run.py ...")
        return
    backend = "gloo"
    if device == "cuda":
        backend = "nccl"
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise ValueError("there are more processes than GPUs here: lower --nproc-per-node")
        torch.cuda.set_device(local_rank)
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # waiting for others ignores ours
    dist.init_process_group(backend, timeout=TIMEOUT)
    signal.signal(signal.SIGTERM, handler)


def leave_processes() -> None:
    """Leave the process group."""
    if rank_and_count()[1] > 1:
        dist.destroy_process_group()


def rank_and_count() -> tuple[int, int]:
    """The number of this process and how many there are: 0 and 1 unless under torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


# ---------------------------------------------------------------------------------------- training


def seed_dropout(seed: int) -> None:
    """Seed torch so that every process uses different dropout masks."""
    torch.manual_seed(seed + rank_and_count()[0])


def share_of(items: Sequence) -> Sequence:
    """This process's share of the items."""
    rank, n_processes = rank_and_count()
    return items[rank::n_processes]


def add_over_processes(model: nn.Module, sums: dict[str, float]) -> dict[str, float]:
    """Add up the gradients of all processes, in place, and the numbers to be logged."""
    n_processes = rank_and_count()[1]
    if n_processes == 1:
        return sums
    for parameter in model.parameters():
        if parameter.grad is None:  # this process had no example
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    everyone: list[dict] = [{}] * n_processes
    dist.all_gather_object(everyone, sums)
    total: dict[str, float] = {}
    for one in everyone:
        for key, value in one.items():
            total[key] = total.get(key, 0.0) + value
    return total


# -------------------------------------------------------------------------------- files and samples


def from_process_0(make: Callable[[], object]) -> object:
    """Call make() in process 0 only; every process waits for it and gets its result."""
    rank, n_processes = rank_and_count()
    if n_processes == 1:
        return make()
    made = [None]
    if rank == 0:
        made = [make()]
    dist.broadcast_object_list(made)
    return made[0]


def share_work(items: Sequence, do: Callable[[Sequence], list]) -> list:
    """do(items) -> one result per item. Each process does its share and gets the full list."""
    done = do(share_of(items))
    n_processes = rank_and_count()[1]
    if n_processes == 1:
        return done
    everyone: list[list] = [[]] * n_processes
    dist.all_gather_object(everyone, done)
    # Item i was the (i // n)-th of process i % n.
    return [everyone[i % n_processes][i // n_processes] for i in range(len(items))]
