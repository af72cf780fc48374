"""The processes of one command that `accelerate launch` or `torchrun` started together: how they meet and part."""

import datetime
import gc
from collections.abc import Callable
from typing import Any, TypeVar, cast

import accelerate
import torch

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=30)
"""How long the processes wait for the slowest of them. accelerate's own limit is half an hour: less than a measurement
may take, or the writing of the last shard."""


def processes() -> accelerate.PartialState:
    """What accelerate knows of the processes of this run; made before a target is loaded, it gives each its GPU."""
    # Said, since accelerate takes its absence for a single process; training's attention knows no Apple GPU.
    cpu = not torch.accelerator.is_available() or torch.backends.mps.is_available()
    return accelerate.PartialState(cpu=cpu, timeout=PATIENCE)


def agreed(ask: Callable[[], T]) -> T:
    """What the main process finds, told to all: what each reads on disk by itself may differ by the moment."""
    found: list[Any] = [ask() if processes().is_main_process else None]
    accelerate.utils.broadcast_object_list(found)
    return cast(T, found[0])


def in_group() -> bool:
    """Whether this process is one of several that can exchange tensors."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def part() -> None:
    """Leave the group once every process has come here; a process that is alone has nothing to leave.

    What holds the group (a model wrapped by DDP) is freed first, and a barrier lets the group's threads come to rest.
    Freed later, the last reference to gloo's group would end it while the interpreter's lock is held: its destructor
    joins threads that wait for that lock to free their tensors, and the process never ends.

    For success only: a process that failed must not wait for others, which wait in another exchange.
    """
    if not in_group():
        return
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
