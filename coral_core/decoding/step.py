"""One round for any number of seats, losslessly: draft, verify in one target forward, keep what the target picked.

The drafter and its head decide how fast this is and never what it says: every emitted token is the target's own pick,
at the same position and with the same noise as in plain decoding (sampling.py). A seat that does not draft brings its
root alone, which makes its round a step of plain decoding: so plain answers, drafted ones, a batch, and a batch of one
are all decoded here. What a seat says does not depend on its company.
Axes: B seat, N tree row of all seats, M tree row, T position, D hidden, V vocabulary, A path.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from coral_core.decoding import masks, replayed, tree
from coral_core.decoding.cache import SlotCache
from coral_core.decoding.drafting import BatchDrafting, Stem
from coral_core.decoding.history import History
from coral_core.decoding.memory import Memory
from coral_core.decoding.policy.adaptive import Plan
from coral_core.decoding.rounds import Clock, Round, Stop, prefill, room
from coral_core.decoding.sampling import Picker, Sampler, pick_together
from coral_core.decoding.seat import Seat
from coral_core.decoding.tree import Draft
from coral_core.decoding.verify import Verdict
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
    target, plan = engine.target, engine.plan(1)
    stop = Stop(target.stop_ids, room(target, prompt, max_new_tokens))
    capacity = len(prompt) + stop.remaining + engine.rows
    kept = memory.recall(prompt, capacity, None if engine.drafter is None else engine.shape.rows)
    prompt_T = torch.tensor(prompt, device=target.device)
    history = History(prompt_T, capacity) if sampler.looks_back else None
    feature_TD = prefill(target, prompt_T, memory.cache)
    logits_1V = target.logits(feature_TD[-1:])
    root_1 = sampler.pick(logits_1V, len(prompt), history.row() if history else None)
    if history:
        history.extend(root_1)
    memory.ids = [*prompt, *root_1.tolist()]
    seat = Seat(
        memory=memory,
        sampler=sampler,
        stop=stop,
        history=history,
        plans={1: plan},
        drafting=engine.drafting(plan, memory.slots),
        token_T=torch.cat((prompt_T[kept + 1 :], root_1)),
        feature_TD=feature_TD[:0] if engine.drafter is None else feature_TD,
    )
    new_ids = stop.cut(memory.ids[-1:])
    clock.lap("prefill")
    return seat, Round(new_ids, "prefill", 0, clock.take())


@torch.no_grad()
def step(engine: "Engine", seats: Sequence[Seat], clock: Clock) -> list[Round]:
    """One round of each seat. Several seats are the first ones of one cache, in order (table.py)."""
    clock.restart()
    plans = [_plan(engine, seat, len(seats)) for seat in seats]
    drafts = _draft(engine, seats, plans, clock)
    features, logits_NV = _verify(engine.target, seats, drafts, clock)
    verdicts = _judge(seats, drafts, logits_NV)
    for seat, draft, verdict in zip(seats, drafts, verdicts, strict=True):
        rows = draft.token_M.numel()
        if verdict.path_A.numel() < rows:
            seat.memory.cache.keep(verdict.path_A, seat.rows - rows)
    clock.lap("accept")
    found = zip(seats, plans, drafts, verdicts, features, strict=True)
    emitted = [_commit(*parts) for parts in found]
    clock.lap("other")
    seconds = {phase: value / len(seats) for phase, value in clock.take().items()}
    return [
        Round(new_ids, "draft" if plan else "plain", min(verdict.accepted_drafts, len(new_ids)), seconds)
        for new_ids, plan, verdict in zip(emitted, plans, verdicts, strict=True)
    ]


def _plan(engine: "Engine", seat: Seat, company: int) -> Plan | None:
    """Who decides on the seat's draft in a round of so many; None for a round without one."""
    company = 1 << (company - 1).bit_length()
    if company not in seat.plans:
        seat.plans[company] = engine.plan(company)
    return seat.plans[company] if seat.plans[company].drafts() else None


def _draft(engine: "Engine", seats: Sequence[Seat], plans: Sequence[Plan | None], clock: Clock) -> list[Draft]:
    """A tree for each seat: the root alone for one that does not draft."""
    if len(seats) == 1 and plans[0] is not None:
        (seat,) = seats
        assert seat.drafting is not None
        return [seat.drafting.draft(seat.token_T, seat.feature_TD, seat.sampler, clock)]
    stems = [
        Stem(seat.drafting, number, seat.token_T, seat.feature_TD, seat.sampler, plan)
        for number, (seat, plan) in enumerate(zip(seats, plans, strict=True))
        if plan is not None and seat.drafting is not None
    ]
    grown = iter(BatchDrafting(stems).draft(clock) if stems else ())
    return [next(grown) if plan else tree.lone(seat.token_T[-1:]) for seat, plan in zip(seats, plans, strict=True)]


def _verify(
    target: Target, seats: Sequence[Seat], drafts: Sequence[Draft], clock: Clock
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """One target forward over all trees: the features [M,D] of each, and the logits [N,V] of all."""
    if len(seats) == 1:
        feature_MD, logits_MV = verify_one(target, seats[0].memory.cache, drafts[0], clock)
        return [feature_MD], logits_MV
    forest, past = tree.pad(drafts), [seat.rows for seat in seats]
    rows, whole = forest.token_M.shape[1], seats[0].memory.cache.whole
    assert whole is not None, "seats that share a round share a cache"
    past_B1, end = torch.tensor(past, device=target.device)[:, None], max(past) + rows
    mask = masks.for_batch(target, past_B1, forest.depth_M, forest.sees_MM, end)
    clock.lap("other")
    with whole.place(past_B1 + torch.arange(rows, device=target.device), end):
        feature_BMD = target.forward(
            forest.token_M.clamp_min(0), position_BT=past_B1 + forest.depth_M, mask=mask, cache=whole
        )
    features = []
    for seat, draft, feature_MD in zip(seats, drafts, feature_BMD, strict=True):
        features.append(feature_MD[: draft.token_M.numel()])
        seat.memory.cache.length += draft.token_M.numel()
    logits_NV = target.logits(torch.cat(features))
    clock.lap("verify")
    return features, logits_NV


def verify_one(target: Target, cache: SlotCache, draft: Draft, clock: Clock) -> tuple[torch.Tensor, torch.Tensor]:
    """The features [M,D] and logits [M,V] of one tree's rows, which the cache takes in."""
    if cache.graphs is not None:
        found = replayed.verify(target, cache, draft)
    else:
        mask = masks.for_target(target, cache.length, draft.depth_M, draft.sees_MM)
        position_BM = (draft.depth_M + cache.length)[None]
        clock.lap("other")
        feature_MD = target.forward(draft.token_M[None], position_BT=position_BM, mask=mask, cache=cache)[0]
        found = feature_MD, target.logits(feature_MD)
    clock.lap("verify")
    return found


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


def _commit(seat: Seat, plan: Plan | None, draft: Draft, verdict: Verdict, feature_MD: torch.Tensor) -> list[int]:
    """The seat goes on behind the accepted path; the ids to emit."""
    if seat.history:
        seat.history.extend(verdict.new_A)
    seat.memory.ids += verdict.new_ids
    if plan:
        plan.learn(draft, verdict)
        seat.token_T, seat.feature_TD = verdict.new_A, feature_MD[verdict.path_A]
    elif seat.drafting is None:
        seat.token_T = verdict.new_A
    else:  # the drafter is fed when it is next asked
        seat.token_T = torch.cat((seat.token_T, verdict.new_A))
        seat.feature_TD = torch.cat((seat.feature_TD, feature_MD[verdict.path_A]))
    return seat.stop.cut(verdict.new_ids)
