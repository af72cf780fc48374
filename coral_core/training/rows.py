"""How many rows a product in 16 bits takes on a CPU: whole multiples, the rest filled with rows that nobody reads.

oneDNN compiles a kernel for each shape that it has not met, and the number of rows is another in every batch. On a Xeon
with AMX and pico's drafter, 1 to 2 ms for each of the 63 products of a step, 5 to 9 for one with the head: more than
they save. A GPU and float32 have no such cost, and nothing is filled there.
"""

import torch

MULTIPLE = 32


def missing_rows(rows: int, device: torch.device, dtype: torch.dtype) -> int:
    """Rows to add to `rows` of them."""
    return -rows % MULTIPLE if device.type == "cpu" and dtype.itemsize == 2 else 0


def computing_dtype(x: torch.Tensor) -> torch.dtype:
    """In which the drafter's matrices multiply `x`, mixed precision considered."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
