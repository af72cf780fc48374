"""Forwards in fixed shapes, recorded once as CUDA graphs and replayed: a whole draft, and the target over its tree.

Launching kernels one by one takes longer than running them. A graph is a fixed list of kernels on fixed addresses:
shapes, Python numbers and storage are those of the recording. What changes from round to round therefore comes in
through tensors that are copied to the recorded addresses: tokens, positions, and the cache's columns that the new rows
go to. Attention reads a fixed number of columns, hidden behind a mask where nothing stands yet, and so gives the same
rows as forwards that run as they come (engine.py).

Not yet run on a GPU. What can be shown without one is tested: that a recorded list of operations, replayed with other
inputs, does what decoding without graphs does (tests/decoding/test_recorded.py).
Axes: B batch of one, M tree row, T position (of a fed row, or of the levels of a draft), D hidden, V vocabulary, K
cached column.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from coral_core.decoding import tree
from coral_core.decoding.cache import SlotCache, Slots, rounded_rows
from coral_core.decoding.drafting import Drafting
from coral_core.decoding.policy.plan import Plan
from coral_core.decoding.rounds import Clock
from coral_core.decoding.sampling import Ahead, Picker
from coral_core.decoding.seat import Memory
from coral_core.decoding.tree import Draft
from coral_core.drafter.model import Drafter
from coral_core.errors import TargetError, first_line
from coral_core.head.heads import Head
from coral_core.target.target import Target

Call = Callable[..., Any]
"""A function of named tensors; what it returns may be any arrangement of tensors."""


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
class Recording:
    """One call, and all that its addresses belong to."""

    call: Call
    """Kept for the weights that it reads: a graph knows only their addresses."""
    cache: SlotCache | Slots
    storage: torch.Tensor | None
    """The cache's, when it was recorded."""
    inputs: dict[str, torch.Tensor]
    replay: Callable[[], None]
    out: Any


def run(
    recordings: dict[Hashable, Any],
    key: Hashable,
    cache: SlotCache | Slots,
    call: Call,
    inputs: dict[str, torch.Tensor],
) -> Any:
    """`call(**inputs)` over a cache, recorded when the key is new. The next run of the key overwrites what is returned.

    The key must hold all that decides the call besides the values of its inputs, shapes included. The call runs
    more than once while it is recorded: what it writes must only depend on its inputs. Recordings over storage that the
    cache no longer has are dropped.
    Raises TargetError for a call that cannot be recorded, such as one that waits for the device.
    """
    for old, recording in list(recordings.items()):
        if recording.cache is cache and recording.storage is not cache.storage:
            del recordings[old]
    if key not in recordings:
        held = {name: value.clone() for name, value in inputs.items()}
        try:
            replay, out = record(lambda: call(**held))
        except RuntimeError as error:
            raise TargetError(
                f"a forward cannot be recorded as a CUDA graph: {first_line(error)}. Set target.graphs to false"
            ) from error
        recordings[key] = Recording(call, cache, cache.storage, held, replay, out)
    recording = recordings[key]
    for name, value in inputs.items():
        recording.inputs[name].copy_(value)
    recording.replay()
    return recording.out


def padded_rows(rows: int) -> int:
    """The number of tree rows that a recorded forward of the target takes: the next power of two."""
    return 1 << (rows - 1).bit_length()


class Recorded:
    """The forwards of an engine whose target is to be recorded (`target.graphs`)."""

    def capacity(self, committed: int, nodes: int) -> int:
        return rounded_rows(committed + padded_rows(nodes + 1))  # recordings are lost when the storage grows

    @contextlib.contextmanager
    def memory(self, target: Target) -> Iterator[Memory]:
        """The target keeps it for the next answer: recordings are tied to its storage."""
        memory = target.idle.pop() if target.idle else Memory(target)
        try:
            yield memory
        finally:
            memory.forget()
            target.idle.append(memory)

    def drafting(self, drafter: Drafter, target: Target, head: Head, plan: Plan, memory: Memory) -> Drafting:
        """Recorded where all of a draft can be: one shape of tree, and a head that waits for nothing."""
        if head.recordable and plan.shape is not None:
            return RecordedDrafting(drafter, target, head, plan, memory)
        return Drafting(drafter, target.lent, head, plan, memory.slots)

    def verify(self, target: Target, memory: Memory, draft: Draft) -> tuple[torch.Tensor, torch.Tensor]:
        """Both are void after the next call."""
        cache, rows = memory.cache, draft.token_M.numel()
        past = cache.length
        if rows != padded_rows(rows):
            draft = tree.filled(draft, padded_rows(rows))
        end = min(rounded_rows(past + draft.token_M.numel()), cache.capacity)
        inputs = {
            "token_BM": draft.token_M[None],
            "depth_BM": draft.depth_M[None],
            "sees_BMM": draft.sees_MM[None],
            "past_B1": draft.token_M.new_full((1, 1), past),
        }

        def forward(
            token_BM: torch.Tensor, depth_BM: torch.Tensor, sees_BMM: torch.Tensor, past_B1: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            column_M = past_B1[0] + torch.arange(token_BM.shape[1], device=past_B1.device)
            with cache.place(column_M, end):
                feature_BMD = target.forward(
                    token_BM.clamp_min(0),
                    position_BT=past_B1 + depth_BM,
                    mask=tree.batch_mask(target, past_B1, depth_BM, sees_BMM, end),
                    cache=cache,
                )
            return feature_BMD[0], target.logits(feature_BMD[0])

        key = ("verify", target.taps, draft.token_M.numel(), end)
        feature_MD, logits_MV = run(memory.recordings, key, cache, forward, inputs)
        cache.length = past + rows
        return feature_MD[:rows], logits_MV[:rows]


class RecordedDrafting(Drafting):
    """A draft is one recording: the accepted rows, filled up to the longest path, then every level of the tree."""

    def __init__(self, drafter: Drafter, target: Target, head: Head, plan: Plan, memory: Memory) -> None:
        super().__init__(drafter, target.lent, head, plan, memory.slots)
        self.recordings = memory.recordings

    def draft(self, token_T: torch.Tensor, feature_TD: torch.Tensor, picker: Picker, clock: Clock) -> Draft:
        slots, plan, rows = self.slots, self.plan, self.plan.depth + 1
        if token_T.numel() > rows:  # a prompt, or plain steps
            self.feed(token_T[:-1], feature_TD[:-1])
            token_T, feature_TD = token_T[-1:], feature_TD[-1:]
        past, fed = slots.length, token_T.numel()
        most = max(rows, fed + (plan.depth - 1) * plan.topk)
        end = min(rounded_rows(past + most), slots.capacity)
        ahead = self.ahead(picker, past + fed)
        sampler = ahead.sampler and dataclasses.replace(ahead.sampler, repetition_penalty=1.0, seed=0)
        inputs = {
            "token_T": torch.nn.functional.pad(token_T, (0, rows - fed)),
            "feature_TD": torch.nn.functional.pad(feature_TD, (0, 0, 0, rows - fed)),
            "past_1": token_T.new_full((1,), past),
            "fed_1": token_T.new_full((1,), fed),
        }
        if ahead.noise_TV is not None:
            inputs["noise_TV"] = ahead.noise_TV

        def call(
            token_T: torch.Tensor,
            feature_TD: torch.Tensor,
            past_1: torch.Tensor,
            fed_1: torch.Tensor,
            noise_TV: torch.Tensor | None = None,
        ) -> Draft:
            column_T = past_1 + torch.arange(rows, device=past_1.device)
            sees_TK = column_T[:, None] >= torch.arange(end, device=past_1.device)
            with slots.place(column_T, end):
                cos_sin = self.drafter.rope(column_T[None], feature_TD.dtype)
                hidden_TD = self.layer(token_T, self.drafter.read(feature_TD), cos_sin, sees_TK)
            root_1, hidden_1D = token_T[fed_1 - 1], hidden_TD[fed_1 - 1]
            draft = self.grow(root_1, hidden_1D, past_1 + fed_1, Ahead(sampler, noise_TV), Clock(), end)
            return tree.filled(draft, padded_rows(draft.token_M.numel()))

        # The recording holds the drafter and the head, so that their ids cannot be used again.
        key = ("draft", id(self.drafter), id(self.head), plan.shape, sampler, end)
        draft: Draft = run(self.recordings, key, slots, call, inputs)
        slots.length = past + fed
        return draft
