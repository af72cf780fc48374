"""A pretended GPU: tensors that say they are on a device of their own, compute on the CPU, and keep a GPU's rules.

What a GPU refuses is refused here: an operation over tensors of the device and of the host, single numbers apart. What
it is slowed down by is counted: `reads`, where the host waits for a number; `sends`, tensors that the host brings;
`launches`, operations that are not mere views; `graphs`, replays of what was recorded, whose operations do not count.
"""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from coral_core.target.target import Target
from tests.decoding import tape

NAME = "pretended"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)
SHAPED_BY_VALUES = {"nonzero", "_unique2", "masked_select", "_local_scalar_dense"}
NO_KERNEL = {"_unsafe_view", "alias", "detach", "lift_fresh", "empty", "new_empty", "empty_like", "empty_strided"}
Module = TypeVar("Module", bound=torch.nn.Module)


class Held(torch.Tensor):
    """A tensor of the device."""

    held: torch.Tensor
    """Its numbers."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Held":
        own = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        own.held = held
        return own

    def __repr__(self, **kwargs: Any) -> str:
        return f"Held({self.held!r})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of `with Device()`")


class Device(TorchDispatchMode):
    """Within, there is such a device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> "Device":
        _device_constructors()  # cached once for all: with the function below in it, models load wrongly ever after
        self._tensor, made = torch.tensor, torch.tensor

        def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
            """A wrapped tensor cannot be made from a list in C++: made on the host, it is sent, as to any device."""
            wanted = torch.get_default_device() if device is None else device
            return made(data, device="cpu", **kwargs).to(wanted)

        torch.tensor = tensor  # type: ignore[assignment]
        torch.__future__.set_swap_module_params_on_conversion(True)  # `data` of a wrapped tensor cannot be set
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.tensor = self._tensor
        torch.__future__.set_swap_module_params_on_conversion(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        held = [x for x in tensors if isinstance(x, Held)]
        wanted = kwargs.get("device")
        on_device = bool(held) if wanted is None else torch.device(wanted).type == NAME
        if not held and not on_device:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "_fused_sdp_choice":
            return 0  # attention by plain products
        if name == "copy_" and not isinstance(args[0], Held):
            on_device = False
        strangers = [x for x in tensors if not isinstance(x, Held) and (x.dim() or name in ("_to_copy", "copy_"))]
        if strangers and name not in ("_to_copy", "copy_"):
            shapes = [tuple(x.shape) for x in strangers]
            raise RuntimeError(f"{name}: tensors of the host, {shapes}, among those of the device")
        self.counts["sends"] += bool(strangers) and on_device
        self.counts["reads"] += name in SHAPED_BY_VALUES or not on_device
        self.counts["launches"] += not (func.is_view or name in NO_KERNEL)
        if wanted is not None:
            kwargs["device"] = "cpu"
        bare_args, bare_kwargs = tree_map_only(Held, lambda x: x.held, (args, kwargs))
        out = func(*bare_args, **bare_kwargs)
        if func._schema.is_mutable:
            return kwargs.get("out", args[0])
        return tree_map_only(torch.Tensor, Held, out) if on_device else out

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """As graphs.record: replays cost one launch, and what waits for the device or the host is refused."""
        before = Counter(self.counts)
        replay, out = tape.record(call)
        if (self.counts["reads"], self.counts["sends"]) != (before["reads"], before["sends"]):
            raise RuntimeError("operation not permitted when stream is capturing")

        def counted() -> None:
            before = Counter(self.counts)
            replay()
            self.counts = before
            self.counts["graphs"] += 1

        return counted, out

    def spent(self) -> dict[str, int]:
        """The counts since they were last asked for."""
        counts, self.counts = dict(self.counts), Counter()
        return counts


def on_device(module: Module) -> Module:
    """A copy of it on the device."""
    moved = copy.deepcopy(module)
    for part in moved.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = torch.nn.Parameter(Held(weight.detach()), requires_grad=False)
        for name, values in part._buffers.items():
            if values is not None:
                part._buffers[name] = Held(values)
    return moved


def target_on_device(target: Target) -> Target:
    """A copy of it on the device."""
    lent = target.lent
    moved = {
        name: Held(getattr(lent, name))
        for name in ("embed_VD", "head_VD", "head_bias_V")
        if getattr(lent, name) is not None
    }
    return dataclasses.replace(target, model=on_device(target.model), lent=dataclasses.replace(lent, **moved), idle=[])
