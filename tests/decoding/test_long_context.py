"""Long prompts: memory grows with the number of tokens and not with its square, and nothing else grows at all."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coral_core.decoding.cache import Slots
from coral_core.decoding.drafting import Drafting
from coral_core.decoding.engine import plain
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.seat import Memory
from coral_core.drafter.model import Drafter
from coral_core.target.target import Target
from tests.decoding.test_lossless import ids_of, some_prompt
from tests.tiny import PlainHead, tiny_drafter, tiny_engine, tiny_target


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation returned, views of what was there before left out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out._base is None:
            self.elements = max(self.elements, out.numel())
        return out


def long_target(max_positions: int = 40_000) -> Target:
    return dataclasses.replace(tiny_target("llama"), max_positions=max_positions, stop_ids=frozenset())


def decode(target: Target, length: int, new: int) -> list[Round]:
    return list(tiny_engine(target).decode(some_prompt(1, length), Sampler(), new))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_drafter_fed_in_chunks_drafts_the_same(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    target, drafter = tiny_target("llama"), tiny_drafter(tiny_target("llama"))
    token_T, feature_TD = torch.tensor(some_prompt(2, 50)), torch.randn(50, 32)

    def feed(drafter: Drafter) -> tuple[torch.Tensor, Drafting]:
        drafting = Drafting(drafter, target.lent, PlainHead(target), tiny_engine(target).shape, Slots(60))
        return drafting.feed(token_T, feature_TD), drafting

    whole_1D, _ = feed(drafter)
    monkeypatch.setattr("coral_core.decoding.drafting.PREFILL_ROWS", chunk)
    chunked_1D, drafting = feed(drafter)
    assert drafting.slots.length == 50
    torch.testing.assert_close(chunked_1D, whole_1D, rtol=0, atol=1e-5)


def test_the_largest_tensor_grows_no_faster_than_the_prompt() -> None:
    """A mask or a score matrix of the whole prompt would be four times as large for twice the tokens."""
    largest = []
    for length in (3072, 6144):
        with LargestTensor() as watch:
            decode(long_target(), length, 4)
        largest.append(watch.elements)
    assert largest[1] <= 2.1 * largest[0]


@pytest.mark.slow
@pytest.mark.parametrize("length", [8_192, 32_768])
def test_long_answers_are_lossless(length: int) -> None:
    target, prompt = long_target(), some_prompt(3, length)
    rounds = list(tiny_engine(target).decode(prompt, Sampler(temperature=1.0), 24))
    assert ids_of(rounds) == ids_of(list(plain(target, prompt, Sampler(temperature=1.0), 24)))


def test_the_cache_is_allocated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are appended in place: however many rounds there are, one allocation for the target and the drafter's."""
    calls: list[int] = []
    allocate = Slots.lazy_initialization

    def counted(self: Slots, *states: torch.Tensor) -> None:
        calls.append(self.capacity)
        allocate(self, *states)

    monkeypatch.setattr(Slots, "lazy_initialization", counted)
    target = long_target()
    engine, memory = tiny_engine(target), Memory(target)
    rounds = engine.decode(some_prompt(4, 40), Sampler(), 60, memory)
    next(rounds)
    block_LBJKE = memory.cache._block_LBJKE
    assert block_LBJKE is not None
    list(rounds)
    assert memory.cache._block_LBJKE is block_LBJKE
    assert len(calls) == 1
    assert max(block_LBJKE.shape[3], *calls) <= 40 + 60 + 7 + 4 * 3
