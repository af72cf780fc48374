"""A plain decoder that is compiled: transformers' own model, a static cache, and inductor.

`model.generate` compiles by itself on a GPU only, so the loop is here: eager prefill, then one compiled forward per
token. Compiling is not timed; the race warms every lane up.
Axes: B batch of one, T position.
"""

import inspect
import time
from typing import Any

import torch
from transformers import StaticCache

from coral_core.bench.race import Lane
from coral_core.target.target import Target


def compiler_missing() -> str:
    """Why inductor cannot compile here; empty where it can."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except (ImportError, RuntimeError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""


class Compiled:
    """Greedy decoding of one prompt at a time; an untouched `model`, whose cache has room for `length` tokens."""

    def __init__(self, target: Target, model: Any, length: int, backend: str = "inductor") -> None:
        self.target, self.model = target, model
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        names = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.step = torch.compile(self._next, backend=backend, dynamic=False)

    def _next(self, ids_BT: torch.Tensor, position_BT: torch.Tensor) -> torch.Tensor:
        out = self.model(input_ids=ids_BT, position_ids=position_BT, logits_to_keep=1, **{self.cache_name: self.cache})
        return out.logits[:, -1].argmax(-1, keepdim=True)

    @torch.no_grad()
    def decode(self, prompt: list[int], max_new_tokens: int) -> Lane:
        """The answer, timed as every plain lane."""
        limit = min(max_new_tokens, self.target.max_positions - len(prompt))
        self.cache.reset()
        begun_s = time.perf_counter()
        token_BT = self._next(torch.tensor([prompt]), torch.arange(len(prompt))[None])
        ids = token_BT[0].tolist()
        first_s = time.perf_counter()
        while len(ids) < limit and ids[-1] not in self.target.stop_ids:
            token_BT = self.step(token_BT, torch.tensor([[len(prompt) + len(ids) - 1]]))
            ids += token_BT[0].tolist()
        ended_s = time.perf_counter()
        rounds = len(ids) - 1
        return Lane(ids, first_s - begun_s, ended_s - first_s, [0] * rounds, [1] * rounds, {})
