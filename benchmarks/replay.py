"""A target that repeats an answer it has given: the engine's rounds at the price of drafting alone.

Whatever was drafted, the target's pick at each node of the accepted path is its own answer (decoding/sampling.py). So
features kept by position stand for the target's forward over a draft: right on the accepted path, and where they are
wrong nothing is accepted, since an ancestor was not. `Engine.decode` then runs as it is, and finds the same rounds as
with the target itself, several times cheaper where that is deep. A test compares the two, and so does
`benchmarks.methods` for its main rows. Not for measuring time.

Axes: B batch, T position, J key/value head, E head dimension, D hidden, I input width: the taps and the features side
by side.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from coral_core.decoding.cache import SlotCache
from coral_core.decoding.engine import plain
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.step import prefill
from coral_core.target.target import Target


def plain_answers(
    target: Target, prompts: Sequence[list[int]], sampler: Sampler, max_new_tokens: int
) -> Iterator[list[int]]:
    """The target's own answer to each prompt."""
    for prompt in prompts:
        yield [token for event in plain(target, prompt, sampler, max_new_tokens) for token in event.new_ids]


def repeating(target: Target, prompt: list[int], answer: list[int], taps: tuple[int, ...] = ()) -> Target:
    """The target, its model replaced by the features and taps of this prompt and answer; good for this one alone."""
    ids_T = torch.tensor([*prompt, *answer], device=target.device)
    cache = SlotCache(target.model.config.get_text_config().num_hidden_layers, ids_T.numel())
    given_TI = prefill(target.tapping(taps), ids_T, cache)
    width = target.lent.head_VD.shape[1]
    parts = dict(zip(taps, given_TI.split(width, dim=-1), strict=False))
    return dataclasses.replace(target, model=_Repeating(given_TI[:, -width:], parts), taps=taps, exact=False)


class _Repeating:
    """What decoding asks of a Hugging Face model: a config, and a forward that appends to the cache."""

    num_hidden_layers = 1

    def __init__(self, feature_TD: torch.Tensor, taps: dict[int, torch.Tensor]) -> None:
        self.feature_TD, self.taps = feature_TD, taps
        self.config = self

    def get_text_config(self) -> Any:
        return self

    def base_model(self, *, position_ids: torch.Tensor, past_key_values: SlotCache, **_: Any) -> Any:
        row_BJTE = self.feature_TD.new_zeros(1, 1, position_ids.shape[1], 1)
        past_key_values.update(row_BJTE, row_BJTE, 0)
        known_BT = position_ids.clamp_max(len(self.feature_TD) - 1)  # drafts beyond the answer's end are never emitted
        read = [self.taps.get(layer) for layer in range(max(self.taps, default=0) + 2)]  # the last is the features
        states = [tap_TD if tap_TD is None else tap_TD[known_BT] for tap_TD in read]
        return SimpleNamespace(last_hidden_state=self.feature_TD[known_BT], hidden_states=states)
