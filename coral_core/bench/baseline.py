"""Every plain decoding at hand, so that a speedup is never over a straw man.

Our own loop and `model.generate`, in the target's dtype and, on a CPU, in the other of float32 and bfloat16 too, since
which of them is faster depends on the processor. Our own loop is raced as it is when its forwards need not be exact.
All of them race on every question, and the fastest over all of them is the baseline (metrics.py): on a few questions
beforehand, another one was the fastest half of the time. None is compiled; `benchmarks.decode --compiled` races one
that is.
Axes: B batch of one, T position.
"""

import contextlib
import copy
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from coral_core.bench.race import PLAIN, Decode, Lane, run_lane
from coral_core.decoding.engine import plain
from coral_core.decoding.sampling import Sampler
from coral_core.target.target import Target

LIMIT_BYTES = 2 << 30
"""A target that is larger in 16 bits is not copied into another dtype just to look for a faster baseline."""


class _FirstToken(BaseStreamer):
    """Notes when the first new token comes, to part the prefill from the rest."""

    def __init__(self) -> None:
        self.calls, self.at_s = 0, 0.0

    def put(self, value: Any) -> None:
        self.calls += 1
        if self.calls == 2:  # the first call hands over the prompt
            self.at_s = time.perf_counter()

    def end(self) -> None:
        pass


def generate_lane(target: Target, prompt: list[int], sampler: Sampler, max_new_tokens: int) -> Lane:
    """`model.generate`, timed like our own decoders. Its draws at temperature > 0 are its own, not ours."""
    greedy = sampler.temperature == 0
    sampling = {} if greedy else {name: getattr(sampler, name) for name in ("temperature", "top_p", "top_k")}
    if not greedy and sampler.min_p:  # a min_p of 0 costs transformers a softmax; a top_k of 0 says: not the usual 50
        sampling["min_p"] = sampler.min_p
    streamer = _FirstToken()
    ids_BT = torch.tensor([prompt], device=target.device)
    with _ends_only(target.model):
        begun = time.perf_counter()
        out_BT = target.model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=min(max_new_tokens, target.max_positions - len(prompt)),
            do_sample=not greedy,
            repetition_penalty=sampler.repetition_penalty,
            streamer=streamer,
            **sampling,
        )
        ended = time.perf_counter()
    ids = out_BT[0, len(prompt) :].tolist()
    return Lane(ids, streamer.at_s - begun, ended - streamer.at_s, [], [], {"generate": ended - streamer.at_s})


@contextlib.contextmanager
def _ends_only(model: Any) -> Iterator[None]:
    """A model that keeps no more than the end tokens of its generation_config.json, which are all that coral reads.

    Beams, a stop string or penalties of it would give `generate` another job than the lanes it races.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    try:
        yield
    finally:
        model.generation_config = own


def plain_lanes(target: Target, sampler: Sampler, max_new_tokens: int) -> dict[str, Decode]:
    """Every plain decoder besides our own loop in the target's dtype, which is the reference."""
    found: dict[str, Decode] = {}
    for form in [target, *_other_dtypes(target)]:
        dtype = str(form.dtype).removeprefix("torch.")

        def own(prompt: list[int], form: Target = form) -> Lane:
            return run_lane(plain(dataclasses.replace(form, exact=False), prompt, sampler, max_new_tokens))

        def generate(prompt: list[int], form: Target = form) -> Lane:
            return generate_lane(form, prompt, sampler, max_new_tokens)

        if form is not target or target.exact:
            found[f"{PLAIN} {dtype}{' inexact' if target.exact else ''}"] = own
        found[f"generate {dtype}"] = generate
    return found


def _other_dtypes(target: Target) -> list[Target]:
    other = torch.bfloat16 if target.dtype == torch.float32 else torch.float32
    numbers = sum(weight.numel() for weight in target.model.parameters())
    room = numbers * torch.float32.itemsize <= psutil.virtual_memory().available  # a copy, and what it is made into
    if target.device.type != "cpu" or not room or numbers * torch.bfloat16.itemsize > LIMIT_BYTES:
        return []
    model = copy.deepcopy(target.model).to(other)
    return [dataclasses.replace(target, model=model, lent=target.lent.to("cpu", other))]
