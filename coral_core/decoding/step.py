"""One round for any number of seats, losslessly: draft, verify in one target forward, keep what the target picked.

The drafter and its head decide how fast this is and never what it says: every emitted token is the target's own pick,
at the same position and with the same noise as in plain decoding (sampling.py). A seat that does not draft brings its
root alone, which makes its round a step of plain decoding: so plain answers, drafted ones, a batch, and a batch of one
are all decoded here. What a seat says does not depend on its company.
Axes: B batch: a seat each, N row of all seats' trees, M tree row, T position, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from coral_core.decoding import tree
from coral_core.decoding.cache import SlotCache
from coral_core.decoding.drafting import PREFILL_ROWS, BatchDrafting, DraftInput
from coral_core.decoding.policy.plan import Plan
from coral_core.decoding.rounds import Clock, Round
from coral_core.decoding.sampling import Picker, Sampler, pick_together
from coral_core.decoding.seat import History, Memory, Seat, Stop
from coral_core.decoding.tree import Draft, Verdict
from coral_core.errors import DataError
from coral_core.target.target import Target

if TYPE_CHECKING:
    from coral_core.decoding.engine import Engine


@torch.no_grad()
def sit(
    engine: "Engine", memory: Memory, prompt: list[int], sampler: Picker, max_new_tokens: int, clock: Clock
) -> tuple[Seat, Round]:
    """Read a prompt, as far as `memory` does not hold it, and pick the first token.

    Raises DataError for a prompt that is empty or does not fit the target's context.
    """
    with clock.phase("prefill"):
        seat = _read(engine, memory, prompt, sampler, max_new_tokens)
    return seat, Round(seat.stop.cut(memory.ids[-1:]), "prefill", 0, clock.take())


def _read(engine: "Engine", memory: Memory, prompt: list[int], sampler: Picker, max_new_tokens: int) -> Seat:
    target, plan = engine.target, engine.plan(1)
    stop = Stop(target.stop_ids, room(target, prompt, max_new_tokens))
    capacity = engine.forwards.capacity(len(prompt) + stop.remaining, engine.shape.nodes)
    kept = memory.recall(prompt, capacity, None if engine.drafter is None else engine.shape.rows)
    prompt_T = torch.tensor(prompt, device=target.device)
    history = History(prompt_T, capacity) if sampler.looks_back else None
    feature_TD = prefill(target, prompt_T, memory.cache)
    if feature_TD.device.type == "cpu" and feature_TD.isnan().any():
        memory.cache.wipe(0)
        memory.forget()
        raise _no_numbers(target, len(prompt))
    logits_1V = target.logits(feature_TD[-1:])
    root_1 = sampler.pick(logits_1V, len(prompt), history.row() if history else None)
    if history:
        history.extend(root_1)
    memory.ids = [*prompt, *root_1.tolist()]
    if engine.drafter is not None or engine.keeps_features:
        memory.unread.add(torch.cat((prompt_T[kept + 1 :], root_1)), feature_TD)
    return Seat(
        memory=memory,
        sampler=sampler,
        stop=stop,
        history=history,
        plans={1: plan},
        drafting=engine.drafting(plan, memory),
        root_1=root_1,
    )


def room(target: Target, prompt: Sequence[int], max_new_tokens: int) -> int:
    """New tokens that fit the target's context.

    Raises DataError when the prompt alone fills it, is empty, or has a token that the target does not know, and for a
    number below 0.
    """
    if max_new_tokens < 0:
        raise DataError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    if not prompt:
        raise DataError("the prompt has no tokens; give at least one")
    if len(prompt) >= target.max_positions:
        where = ", as far as its rotary factors stay the same" if target.bounded else ""
        raise DataError(
            f"the prompt has {len(prompt)} tokens and the target's context holds {target.max_positions}{where}; "
            "shorten the prompt"
        )
    target.refuse_strange(prompt)
    return min(max_new_tokens, target.max_positions - len(prompt))


@torch.no_grad()
def prefill(target: Target, ids_T: torch.Tensor, cache: SlotCache) -> torch.Tensor:
    """Append the rows not yet in the cache, in chunks; their features [T,D]."""
    features = []
    while cache.length < ids_T.numel():
        past = cache.length
        chunk_BT = ids_T[past : past + PREFILL_ROWS][None]
        new = chunk_BT.shape[1]
        position_BT = torch.arange(past, past + new, device=ids_T.device)[None]
        mask = target.causal_mask(past, new)
        features.append(target.forward(chunk_BT, position_BT=position_BT, mask=mask, cache=cache)[0])
    return torch.cat(features)


@torch.no_grad()
def step(engine: "Engine", seats: Sequence[Seat], clock: Clock) -> list[Round]:
    """One round of each seat. Several seats are the first ones of one cache, in order (table.py)."""
    clock.restart()
    copied = _copy(seats)
    plans = [None if copied else _plan(engine, seat, len(seats)) for seat in seats]
    with clock.phase("draft"):
        drafts = [tree.chain(seats[0].root_1, copied)] if copied else _draft(engine, seats, plans, clock)
    with clock.phase("verify"):
        features, logits_NV = _verify(engine, seats, drafts)
        if logits_NV.device.type == "cpu" and any(feature_MD.isnan().any() for feature_MD in features):
            logits_NV = _verify_roots(engine, seats, drafts, features, logits_NV)
    with clock.phase("accept"):
        verdicts = _judge(seats, drafts, logits_NV)
        for seat, draft, verdict in zip(seats, drafts, verdicts, strict=True):
            rows = draft.token_M.numel()
            if verdict.path_A.numel() < rows:
                seat.memory.cache.keep(verdict.path_A, seat.rows - rows)
    found = zip(seats, plans, drafts, verdicts, features, strict=True)
    emitted = [_commit(engine, *parts) for parts in found]
    seconds = {phase: value / len(seats) for phase, value in clock.take().items()}
    kinds: list[Literal["draft", "copy", "plain"]] = [
        "draft" if plan else "copy" if copied else "plain" for plan in plans
    ]
    return [
        Round(new_ids, kind, min(verdict.accepted_drafts, len(new_ids)), seconds)
        for new_ids, kind, verdict in zip(emitted, kinds, verdicts, strict=True)
    ]


def _copy(seats: Sequence[Seat]) -> list[int]:
    """What an answer that is alone repeats of its own text, where that is worth more than a draft; [] where not."""
    copying = seats[0].plans[1].copying if len(seats) == 1 else None
    return copying.copy(seats[0].memory.ids, seats[0].stop.remaining - 1) if copying else []


def _plan(engine: "Engine", seat: Seat, seats: int) -> Plan | None:
    """Who decides on the seat's draft in a round of so many seats; None for a round without one."""
    seats = 1 << (seats - 1).bit_length()
    if seats not in seat.plans:
        seat.plans[seats] = engine.plan(seats)
    return seat.plans[seats] if seat.plans[seats].drafts() else None


def _draft(engine: "Engine", seats: Sequence[Seat], plans: Sequence[Plan | None], clock: Clock) -> list[Draft]:
    """A tree for each seat: the root alone for one that does not draft."""
    if len(seats) == 1 and plans[0] is not None:
        (seat,) = seats
        assert seat.drafting is not None
        return [seat.drafting.draft(*seat.memory.unread.join(), seat.sampler, clock)]
    inputs = [
        DraftInput(seat.drafting, number, *seat.memory.unread.join(), seat.sampler, plan)
        for number, (seat, plan) in enumerate(zip(seats, plans, strict=True))
        if plan is not None and seat.drafting is not None
    ]
    grown = iter(BatchDrafting(inputs).draft() if inputs else ())
    return [next(grown) if plan else tree.root_only(seat.root_1) for seat, plan in zip(seats, plans, strict=True)]


def _verify(
    engine: "Engine", seats: Sequence[Seat], drafts: Sequence[Draft]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """One target forward over all trees: the features [M,D] of each, and the logits [N,V] of all."""
    target = engine.target
    if len(seats) == 1:
        feature_MD, logits_MV = engine.forwards.verify(target, seats[0].memory, drafts[0])
        return [feature_MD], logits_MV
    forest, past = tree.pad(drafts), [seat.rows for seat in seats]
    rows, whole = forest.token_M.shape[1], seats[0].memory.cache.whole
    assert whole is not None, "seats that share a round share a cache"
    past_B1, end = torch.tensor(past, device=target.device)[:, None], max(past) + rows
    mask = tree.batch_mask(target, past_B1, forest.depth_M, forest.sees_MM, end)
    with whole.place(past_B1 + torch.arange(rows, device=target.device), end):
        feature_BMD = target.forward(
            forest.token_M.clamp_min(0), position_BT=past_B1 + forest.depth_M, mask=mask, cache=whole
        )
    features = []
    for seat, draft, feature_MD in zip(seats, drafts, feature_BMD, strict=True):
        features.append(feature_MD[: draft.token_M.numel()])
        seat.memory.cache.length += draft.token_M.numel()
    return features, target.logits(torch.cat(features))


def _verify_roots(
    engine: "Engine",
    seats: Sequence[Seat],
    drafts: list[Draft],
    features: list[torch.Tensor],
    logits_NV: torch.Tensor,
) -> torch.Tensor:
    """Verify trees whose features are no numbers again, as their roots alone; the logits [N,V] of all, then.

    A drafted row that overflows in 16 bits would spoil the others: a hidden column weighs 0, and 0 times no number is
    no number. A seat whose root overflows too has its error, and ends.
    """
    logits = list(logits_NV.split([draft.token_M.numel() for draft in drafts]))
    for number, seat in enumerate(seats):
        if not features[number].isnan().any():
            continue
        cache = seat.memory.cache
        cache.wipe(cache.length - drafts[number].token_M.numel())
        drafts[number] = tree.root_only(drafts[number].token_M[:1])
        features[number], logits[number] = engine.forwards.verify(engine.target, seat.memory, drafts[number])
        if features[number].isnan().any():
            seat.error, seat.stop.remaining = _no_numbers(engine.target, seat.rows), 0
            cache.wipe(cache.length - 1)
            cache.length += 1
    return torch.cat(logits)


def _no_numbers(target: Target, position: int) -> DataError:
    dtype = str(target.dtype).removeprefix("torch.")
    what = f"after {position} tokens the target computes no numbers in {dtype}"
    if dtype == "float16":
        return DataError(f"{what}: they overflow, or its weights are damaged. Set target.dtype=float32 or bfloat16")
    return DataError(f"{what}: its weights are damaged. Restore its files, then start again")


def _judge(seats: Sequence[Seat], drafts: Sequence[Draft], logits_NV: torch.Tensor) -> list[Verdict]:
    """What the target picks at each seat, and how far the picks follow its tree."""
    if all(draft.levels == 0 for draft in drafts):
        picked_B = _pick(seats, logits_NV)
        if picked_B is not None:
            ids = picked_B.tolist()
            picks = zip(drafts, picked_B.split(1), ids, strict=True)
            return [Verdict(draft.parent_M, picked_1, [token]) for draft, picked_1, token in picks]
    split = logits_NV.split([draft.token_M.numel() for draft in drafts])
    return [
        seat.sampler.judge(
            draft,
            logits_MV,
            seat.rows - draft.token_M.numel() + 1,
            seat.history.rows(draft) if seat.history else None,
        )
        for seat, draft, logits_MV in zip(seats, drafts, split, strict=True)
    ]


def _pick(seats: Sequence[Seat], logits_BV: torch.Tensor) -> torch.Tensor | None:
    """The next token [B] of seats that brought their roots alone; None where they must be asked one by one."""
    if len(seats) == 1:
        return seats[0].sampler.pick(logits_BV, seats[0].rows, seats[0].past())
    samplers = [seat.sampler for seat in seats if isinstance(seat.sampler, Sampler) and not seat.sampler.looks_back]
    if len(samplers) < len(seats):
        return None
    return pick_together(samplers, logits_BV, [seat.rows for seat in seats])


def _commit(
    engine: "Engine", seat: Seat, plan: Plan | None, draft: Draft, verdict: Verdict, feature_MD: torch.Tensor
) -> list[int]:
    """The seat goes on behind the accepted path; the ids to emit."""
    if seat.history:
        seat.history.extend(verdict.new_A)
    seat.memory.ids += verdict.new_ids
    seat.root_1 = verdict.new_A[-1:]
    if plan:
        plan.learn(draft, verdict)
    if seat.drafting or engine.keeps_features:
        new = verdict.new_A, feature_MD[verdict.path_A]
        unread = seat.memory.unread
        unread.restart(seat.drafting.slots.length, *new) if plan and seat.drafting else unread.add(*new)
    return seat.stop.cut(verdict.new_ids)
