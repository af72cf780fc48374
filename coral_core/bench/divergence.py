"""Where speculative ids leave plain ones, whether rounding alone explains it, and where that begins in the model.

Axes: T position, D hidden, M tree row, V vocabulary, C candidate: one of the two tokens.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from coral_core.decoding import tree
from coral_core.decoding.engine import Eager
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.seat import Memory
from coral_core.decoding.step import prefill
from coral_core.target.target import Target


@dataclasses.dataclass(frozen=True)
class Pass:
    """A forward that reads the last token of a context: with how many rows, and whether wrong siblings lie between."""

    rows: int
    siblings: bool = False


ALONE = Pass(1)
OTHERS = (Pass(2), Pass(4), Pass(8), Pass(16), Pass(4, siblings=True))
"""Plain decoding reads a token alone, a verified tree as many as it has nodes."""


def diverges(
    target: Target, sampler: Sampler, prompt: list[int], plain_ids: list[int], ids: list[int]
) -> dict[str, Any] | None:
    """None when the ids are equal; else the place, both tokens, and how far apart their two logits are there.

    `logit_gap` is the distance of what the sampler compares: at temperature 0 the logits after any penalty, above it
    the warped logits plus noise. `rounding` is how much that distance moves when the same logits come from passes of 1
    to 16 rows and from one with siblings, plus one unit in the last place of the larger logit in the target's dtype.
    `operation` is the first operation of the model whose bits these passes do not agree on, None where all agree.
    `tie` is a gap within the rounding, where an operation rounds otherwise: either token was right. Else it is a bug.
    """
    if plain_ids == ids:
        return None
    at = next((i for i, pair in enumerate(zip(plain_ids, ids, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return {"position": min(len(plain_ids), len(ids)), "reason": "one answer is longer", "tie": False}
    context, pair_C = prompt + plain_ids[:at], torch.tensor([plain_ids[at], ids[at]], device=target.device)
    scores = [_scores(target, sampler, context, form)[pair_C] for form in (ALONE, *OTHERS)]
    noise_TV = sampler.ahead(len(context), 1, target.lent.head_VD.shape[0], target.device).noise_TV
    noise_C = torch.zeros(2, device=target.device) if noise_TV is None else noise_TV[0, pair_C]
    gaps = [float((score_C + noise_C).diff()) for score_C in scores]
    last_place = torch.finfo(target.dtype).eps * float(scores[0].abs().max())
    gap, rounding, operation = abs(gaps[0]), max(gaps) - min(gaps) + last_place, first_operation(target, context)
    both = {"plain": plain_ids[at], "speculative": ids[at], "logit_gap": gap, "rounding": rounding}
    return {"position": at, **both, "operation": operation, "tie": gap <= rounding and operation is not None}


def first_operation(target: Target, context: list[int]) -> str | None:
    """The first operation whose bits for the context's last token depend on the rows read with it; None for none.

    `NAME` is a module of the model whose output differs, `before NAME` what its input came from: attention, a sum.
    """
    alone = _operations(target, context, ALONE)
    for form in OTHERS:
        others = _operations(target, context, form)
        for name, value_D in alone.items():
            if name in others and not torch.equal(value_D, others[name]):
                return name
    return None


def _operations(target: Target, context: list[int], form: Pass) -> dict[str, torch.Tensor]:
    """Inputs and outputs [D] of the model's innermost modules for the context's last token, in their order."""
    found: dict[str, torch.Tensor] = {}
    row = _last_row(context, form)

    def keep(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[1] > row:
            found[name] = value[0, row].clone()

    with contextlib.ExitStack() as hooks:
        for name, module in target.model.base_model.named_modules():
            if next(module.children(), None) is None:

                def hook(_module: Any, args: Any, output: Any, name: str = name) -> None:
                    keep(f"before {name}", args[0] if args else None)
                    keep(name, output)

                hooks.callback(module.register_forward_hook(hook).remove)
        logits_MV = _read(target, context, form, found.clear)
    return found | {"the LM head": logits_MV[row]}


def _scores(target: Target, sampler: Sampler, context: list[int], form: Pass) -> torch.Tensor:
    """The warped logits [V] after the context."""
    row, ids_1T = _last_row(context, form), torch.tensor(context, device=target.device)[None]
    return sampler.warp(_read(target, context, form)[row : row + 1], ids_1T)[0]


def _last_row(context: list[int], form: Pass) -> int:
    """Where the context's last token lies among the rows that are read together."""
    rows = min(form.rows, len(context))
    return 2 * (rows - 1) if form.siblings else rows - 1


@torch.no_grad()
def _read(target: Target, context: list[int], form: Pass, begun: Callable[[], None] = lambda: None) -> torch.Tensor:
    """Logits [M,V] of the rows that are read together, behind the others; `begun` is called before they are."""
    rows = min(form.rows, len(context))
    draft = _path(context[-rows:], form.siblings, target.device)
    memory = Memory(target)
    memory.cache.reserve(len(context) + draft.token_M.numel())
    if len(context) > rows:
        prefill(target, torch.tensor(context[:-rows], device=target.device), memory.cache)
    begun()
    return Eager().verify(target, memory, draft)[1]


def _path(ids: list[int], siblings: bool, device: torch.device) -> tree.Draft:
    """A tree of one branch; with siblings, one before each node but the root."""
    step = 2 if siblings else 1
    token = [ids[0]]
    parent = [0]
    for number, token_id in enumerate(ids[1:]):
        token += [ids[0], token_id] if siblings else [token_id]
        parent += [step * number] * step
    token_M, parent_M = torch.tensor(token, device=device), torch.tensor(parent, device=device)
    sees_MM = tree.ancestry(parent_M, len(ids))
    score_M = torch.zeros(len(token), device=device)
    return tree.Draft(token_M, parent_M, sees_MM.sum(1) - 1, sees_MM, score_M, len(ids) - 1)
