"""A stand-in for a CUDA graph: the operations of one call on the tensors they had then, done again on the same tensors.

As a graph, a tape knows no Python: numbers, shapes and addresses are those of the recording, and a call that looks at
a result (`item`, `tolist`, a shape that depends on values) cannot be recorded. What differs from run to run must come
in through the recorded tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LOOKS = {"_local_scalar_dense", "nonzero", "unique", "_unique2", "masked_select"}


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in LOOKS:
            raise RuntimeError(f"{func.overloadpacket.__name__} waits for the device: operation not permitted")
        out = func(*args, **kwargs)
        held = [_address(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        outs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if func._schema.is_mutable:
            self.steps.append(lambda: func(*args, **kwargs))
        elif not all(_address(x) in held for x in outs if x.numel()):  # a view stays one

            def again() -> None:
                fresh = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
                for old, new in zip(outs, fresh, strict=True):
                    old.copy_(new)

            self.steps.append(again)
        return out


def _address(x: torch.Tensor) -> int:
    return id(x) if x.is_mkldnn else getattr(x, "held", x).untyped_storage().data_ptr()


def record(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """As recorded.record."""
    call()
    with _Tape() as tape:
        out = call()

    def replay() -> None:
        for step in tape.steps:
            step()

    return replay, out
