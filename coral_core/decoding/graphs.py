"""Forwards recorded once as CUDA graphs and replayed: launching kernels one by one takes longer than running them.

A graph is a fixed list of kernels on fixed addresses: shapes, Python numbers and storage are those of the recording.
What changes from round to round therefore comes in through tensors that are copied to the recorded addresses: tokens,
positions, and the cache's columns that the new rows go to. Attention reads a fixed number of columns, hidden behind a
mask where nothing stands yet.

Not yet run on a GPU. What can be shown without one is tested: that a recorded list of operations, replayed with other
inputs, does what decoding without graphs does (tests/decoding/test_graphs.py).
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch

from coral_core.errors import TargetError

Call = Callable[..., Any]
"""A function of named tensors; what it returns may be any arrangement of tensors."""
LEAST_COLUMNS = 256


def record(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """(replay, what `call` returned): each replay writes that same result anew.

    Raises RuntimeError for a call that waits for the device.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries set themselves up in a first call, which a recording does not allow
        call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph.replay, out


@dataclasses.dataclass(frozen=True)
class _Recording:
    call: Call
    """Kept for the weights that it reads: a graph knows only their addresses."""
    held: dict[str, torch.Tensor]
    replay: Callable[[], None]
    out: Any


class Graphs:
    """The recorded calls over one cache, by key; they are void once its storage moves (`forget`)."""

    def __init__(self) -> None:
        self._recorded: dict[Hashable, _Recording] = {}

    def run(self, key: Hashable, call: Call, inputs: dict[str, torch.Tensor]) -> Any:
        """`call(**inputs)`, recorded when the key is new. What is returned is overwritten by the next run of the key.

        The key must hold all that decides the call besides the values of its inputs, shapes included. The call runs
        more than once while it is recorded: what it writes must only depend on its inputs.
        Raises TargetError for a call that cannot be recorded, such as one that waits for the device.
        """
        if key not in self._recorded:
            held = {name: value.clone() for name, value in inputs.items()}
            try:
                replay, out = record(lambda: call(**held))
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise TargetError(
                    f"a forward cannot be recorded as a CUDA graph: {reason}. Set target.graphs to false"
                ) from error
            self._recorded[key] = _Recording(call, held, replay, out)
        recording = self._recorded[key]
        for name, value in inputs.items():
            recording.held[name].copy_(value)
        recording.replay()
        return recording.out

    def forget(self) -> None:
        """Drop all recordings."""
        self._recorded.clear()


def columns(rows: int) -> int:
    """The number of a cache's columns that a recorded call reads to see the first `rows`.

    Powers of two up to 2,048, then in steps of an eighth of one: few recordings, and little read in vain.

        300 → 512,   1,500 → 2,048,   2,100 → 2,304,   5,000 → 5,120
    """
    if rows <= 8 * LEAST_COLUMNS:
        return max(LEAST_COLUMNS, 1 << (rows - 1).bit_length())
    unit = 1 << ((rows - 1).bit_length() - 4)
    return -(-rows // unit) * unit


def padded_rows(rows: int) -> int:
    """The number of tree rows that a recorded forward of the target takes: the next power of two."""
    return 1 << (rows - 1).bit_length()
