"""Plain decoding, one token per step: the reference that speculative decoding must equal, and the baseline it races."""

from collections.abc import Iterator

import torch

from coral_core.decoding import masks, replayed, tree
from coral_core.decoding.cache import SlotCache
from coral_core.decoding.history import History
from coral_core.decoding.memory import Memory, borrowed
from coral_core.decoding.rounds import Clock, Round, Stop, prefill, room
from coral_core.decoding.sampling import Sampler
from coral_core.target.load import Target


def plain(
    target: Target, prompt: list[int], sampler: Sampler, max_new_tokens: int, memory: Memory | None = None
) -> Iterator[Round]:
    """Yield the answer a token at a time; the stop token, if any, is the last. `memory` is as in `Engine.decode`.

    Raises DataError for a prompt that is empty or does not fit the target's context.
    """
    with borrowed(target, memory) as held:
        yield from _rounds(target, prompt, sampler, max_new_tokens, held)


@torch.no_grad()
def _rounds(
    target: Target, prompt: list[int], sampler: Sampler, max_new_tokens: int, memory: Memory
) -> Iterator[Round]:
    stop = Stop(target.stop_ids, room(target, prompt, max_new_tokens))
    capacity = len(prompt) + stop.remaining
    memory.recall(prompt, capacity)
    cache = memory.cache
    clock = Clock()
    prompt_T = torch.tensor(prompt, device=target.device)
    history = History(prompt_T, capacity)
    feature_TD = prefill(target, prompt_T, cache)
    picked_1 = sampler.pick(target.logits(feature_TD[-1:]), len(prompt), history.row())
    memory.ids = [*prompt, *picked_1.tolist()]
    new_ids = stop.cut(memory.ids[-1:])
    clock.lap("prefill")
    yield Round(new_ids, "prefill", 0, clock.take())
    while not stop.done:
        history.extend(picked_1)
        logits_1V = _step(target, cache, picked_1)
        picked_1 = sampler.pick(logits_1V, cache.length, history.row())
        memory.ids += picked_1.tolist()
        new_ids = stop.cut(memory.ids[-1:])
        clock.lap("step")
        yield Round(new_ids, "plain", 0, clock.take())


def _step(target: Target, cache: SlotCache, token_1: torch.Tensor) -> torch.Tensor:
    """The logits [1,V] after one more token."""
    if cache.graphs is not None:
        return replayed.verify(target, cache, tree.lone(token_1))[1]
    mask = masks.for_rows(target, cache.length, 1)
    position_BT = token_1.new_full((1, 1), cache.length)
    feature_BTD = target.forward(token_1[None], position_BT=position_BT, mask=mask, cache=cache)
    return target.logits(feature_BTD[0])
