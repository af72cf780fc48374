"""Tokens per round against answers that the target has already given: the engine's rounds without its verification.

What the target picks at each node of the accepted path is its own answer, whatever was drafted (decoding/sampling.py).
So with the answer's tokens and features kept, a drafter's rounds are found by drafting alone: the same drafts, the same
judge, the same numbers as by `Engine.decode`, several times cheaper where the target is deep. A test compares the two,
and `benchmarks.methods` does so again for its main rows. Not for measuring time.

Axes: T position, D hidden, M tree row.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from coral_core.decoding.cache import SlotCache
from coral_core.decoding.drafting import Drafting
from coral_core.decoding.engine import Engine
from coral_core.decoding.plain import plain
from coral_core.decoding.rounds import Clock, prefill
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.verify import judge
from coral_core.target.load import Target


@dataclasses.dataclass(frozen=True)
class Answer:
    """A prompt with the target's answer, and the features of both."""

    ids_T: torch.Tensor
    feature_TD: torch.Tensor
    prompt_tokens: int


def plain_answers(
    target: Target, prompts: Sequence[list[int]], sampler: Sampler, max_new_tokens: int
) -> Iterator[list[int]]:
    """The target's own answer to each prompt."""
    for prompt in prompts:
        yield [token for event in plain(target, prompt, sampler, max_new_tokens) for token in event.new_ids]


def with_features(target: Target, prompt: list[int], answer: list[int]) -> Answer:
    """Tap the features of a prompt and its answer in one forward."""
    ids_T = torch.tensor([*prompt, *answer], device=target.device)
    cache = SlotCache(target.model.config.get_text_config().num_hidden_layers, ids_T.numel())
    return Answer(ids_T, prefill(target, ids_T, cache), len(prompt))


@torch.no_grad()
def replay(engine: Engine, answer: Answer) -> list[int]:
    """Tokens of each draft round: what `Engine.decode` would emit for this prompt."""
    length, known = answer.ids_T.numel(), answer.prompt_tokens + 1  # the prefill gives the first token
    capacity = length + engine.shape.nodes
    drafting = Drafting(engine.drafter, engine.target.lent, engine.head, engine.shape, capacity)
    unknown_N = answer.ids_T.new_full((engine.shape.depth + 1,), -1)  # behind the answer: no draft equals it
    picked_T, emitted = torch.cat((answer.ids_T, unknown_N)), []
    while known < length:
        fed = drafting.slots.length
        hidden_1D = drafting.feed(answer.ids_T[fed + 1 : known], answer.feature_TD[fed : known - 1])
        draft = drafting.grow(int(answer.ids_T[known - 1]), hidden_1D, Clock())
        accepted_drafts = judge(draft, picked_T[known + draft.depth_M]).accepted_drafts
        emitted.append(min(accepted_drafts + 1, length - known))
        known += emitted[-1]
    return emitted
