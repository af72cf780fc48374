"""Speculative decoding, losslessly: draft a tree, verify it in one target forward, keep the path the target picked.

The drafter and its head decide how fast this is and never what it says: every emitted token is the target's own pick,
at the same position and with the same noise as in plain decoding (sampling.py).
Axes: T position, D hidden, M tree row, A path.
"""

import dataclasses
from collections.abc import Iterator

import torch

from coral_core.decoding import masks, replayed, tree
from coral_core.decoding.cache import SlotCache
from coral_core.decoding.drafting import TreeShape
from coral_core.decoding.graphs import padded_rows
from coral_core.decoding.history import History
from coral_core.decoding.memory import Memory, borrowed
from coral_core.decoding.policy.adaptive import Paying, Plan
from coral_core.decoding.policy.constant import Steady
from coral_core.decoding.policy.costs import Costs
from coral_core.decoding.rounds import Clock, Round, Stop, prefill, room
from coral_core.decoding.sampling import Picker
from coral_core.decoding.tree import Draft
from coral_core.decoding.verify import Verdict
from coral_core.drafter.model import Drafter
from coral_core.head.candidates import Head
from coral_core.target.load import Target


@dataclasses.dataclass(frozen=True)
class Engine:
    """A target with the drafter and head that speed it up.

    With the `costs` of its rounds on this device (measure.py), the tree is chosen within `shape`, round by round where
    that makes nobody wait (policy/), and rounds whose draft would not pay are plain steps; without, every
    tree has that shape.
    """

    target: Target
    drafter: Drafter
    head: Head
    shape: TreeShape
    costs: Costs | None = None

    def __post_init__(self) -> None:
        """The target gives what this drafter reads of it."""
        object.__setattr__(self, "target", self.target.tapping(self.drafter.config.taps))

    def plan(self) -> Plan:
        """Who decides on the drafts of one answer."""
        if self.costs is None:
            return self.shape
        if self.target.device.type == "cpu":
            return Paying(self.costs, self.shape, self.target.device)
        return Steady(self.costs, self.shape)

    def decode(
        self, prompt: list[int], sampler: Picker, max_new_tokens: int, memory: Memory | None = None
    ) -> Iterator[Round]:
        """Yield the answer a round at a time; the ids are exactly those of `plain`, the stop token included.

        With the `memory` of a dialogue, the part of the prompt that it holds is not forwarded again; one answer at a
        time may use it, and may be left after any round.
        Raises DataError for a prompt that is empty or does not fit the target's context.
        """
        with borrowed(self.target, memory) as held:
            yield from self._rounds(prompt, sampler, max_new_tokens, held)

    @torch.no_grad()
    def _rounds(self, prompt: list[int], sampler: Picker, max_new_tokens: int, memory: Memory) -> Iterator[Round]:
        target, clock = self.target, Clock()
        stop = Stop(target.stop_ids, room(target, prompt, max_new_tokens))
        drafted = padded_rows(self.shape.nodes + 1) if target.graphs else self.shape.nodes
        capacity = len(prompt) + stop.remaining + drafted
        kept, cache = memory.recall(prompt, capacity, self.shape.rows), memory.cache
        plan = self.plan()
        drafting = replayed.drafting(self.drafter, target.lent, self.head, plan, memory.slots)
        prompt_T = torch.tensor(prompt, device=target.device)
        history = History(prompt_T, capacity)
        feature_TD = prefill(target, prompt_T, cache)
        root_1 = sampler.pick(target.logits(feature_TD[-1:]), len(prompt), history.row())
        history.extend(root_1)
        token_T = torch.cat((prompt_T[kept + 1 :], root_1))
        memory.ids = [*prompt, *root_1.tolist()]
        new_ids = stop.cut(memory.ids[-1:])
        clock.lap("prefill")
        yield Round(new_ids, "prefill", 0, clock.take())
        while not stop.done:
            clock.restart()
            if drafted := plan.drafts():
                draft = drafting.draft(token_T, feature_TD, sampler, clock)
            else:
                draft = tree.lone(token_T[-1:])
            verdict, feature_AD = self.verify(draft, cache, sampler, history, clock)
            history.extend(verdict.new_A)
            memory.ids += verdict.new_ids
            new_ids = stop.cut(verdict.new_ids)
            if drafted:
                plan.learn(draft, verdict)
                token_T, feature_TD = verdict.new_A, feature_AD
            else:  # the drafter is fed when it is next asked
                token_T, feature_TD = torch.cat((token_T, verdict.new_A)), torch.cat((feature_TD, feature_AD))
            clock.lap("other")
            accepted = min(verdict.accepted_drafts, len(new_ids))
            yield Round(new_ids, "draft" if drafted else "plain", accepted, clock.take())

    def verify(
        self, draft: Draft, cache: SlotCache, sampler: Picker, history: History, clock: Clock
    ) -> tuple[Verdict, torch.Tensor]:
        """One target forward over the tree; the cache keeps the accepted path, whose features [A,D] are returned."""
        target, past = self.target, cache.length
        if cache.graphs is None:
            mask = masks.for_target(target, past, draft.depth_M, draft.sees_MM)
            position_BM = (draft.depth_M + past)[None]
            clock.lap("other")
            feature_MD = target.forward(draft.token_M[None], position_BT=position_BM, mask=mask, cache=cache)[0]
            logits_MV = target.logits(feature_MD)
        else:
            feature_MD, logits_MV = replayed.verify(target, cache, draft)
        clock.lap("verify")
        past_ML = history.rows(draft) if sampler.looks_back else None
        verdict = sampler.judge(draft, logits_MV, past + 1, past_ML)
        if verdict.path_A.numel() < draft.token_M.numel():
            cache.keep(verdict.path_A, past)
        feature_AD = feature_MD[verdict.path_A]
        clock.lap("accept")
        return verdict, feature_AD
