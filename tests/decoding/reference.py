"""The reference: plain decoding on transformers' own model, cache and masks. It shares nothing with the engine but the
sampler, and is slow.

Axes: B batch of one, T position.
"""

import inspect
from typing import Any

import torch
from transformers import DynamicCache

from coral_core.decoding.sampling import Sampler


@torch.no_grad()
def reference(
    model: Any, prompt: list[int], sampler: Sampler, max_new_tokens: int, stop_ids: frozenset[int] = frozenset()
) -> list[int]:
    """The answer's ids, greedy or sampled; a stop token, if one comes, is the last."""
    ids, fed = list(prompt), 0
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    kept = {name: DynamicCache()}
    while len(ids) - len(prompt) < max_new_tokens and not (len(ids) > len(prompt) and ids[-1] in stop_ids):
        ids_BT = torch.tensor([ids[fed:]], device=model.device)
        out, fed = model(input_ids=ids_BT, use_cache=True, **kept), len(ids)
        past_1T = torch.tensor([ids], device=model.device) if sampler.looks_back else None
        ids += sampler.pick(out.logits[:, -1], len(ids), past_1T).tolist()
    return ids[len(prompt) :]
