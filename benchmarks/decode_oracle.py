"""Rounds whose acceptance is forced: what the engine itself costs, whatever a drafter is worth.

The oracle stands in for the head: it knows the answer and puts its next token first with probability `right`, else a
wrong one. The drafter's layer runs as always and its output is not looked at; the head's products are what is missing.
Axes: N row, D hidden, C candidate token.
"""

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.decode_race import per_round
from coral_core.bench.race import Lane, run_lane
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from coral_core.drafter.model import Drafter
from coral_core.head.heads import Candidates
from coral_core.target.target import Target

TREE = TreeShape(depth=6, nodes=10, topk=4)
"""Fixed, so that the rounds of one p are the same work on every machine."""
RIGHT = (0.0, 0.5, 0.75, 0.9, 1.0)


class Oracle:
    """A head that is right with a given probability, on every level anew."""

    recordable = False

    def __init__(self, answer: list[int], right: float, vocabulary: int, *, count: int = 4, seed: int = 0) -> None:
        self.answer, self.right, self.vocabulary, self.count = answer, right, vocabulary, count
        self.random = random.Random(seed)
        self.start = self.level = 0

    def follow(self, rounds: Iterator[Round]) -> Iterator[Round]:
        """The same rounds; the oracle learns from them where the answer stands."""
        for event in rounds:
            self.start, self.level = self.start + len(event.new_ids), 0
            yield event

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        """The same for every row: below a wrong node nothing is accepted anyway."""
        place, self.level = self.start + self.level, self.level + 1
        known = self.answer[place] if place < len(self.answer) else None
        tokens = [token for token in self.random.sample(range(self.vocabulary), self.count + 1) if token != known]
        if known is not None and self.random.random() < self.right:
            tokens.insert(0, known)
        logprob_C = torch.linspace(-0.1, -2.0, self.count, device=hidden_ND.device)
        token_C = torch.tensor(tokens[: self.count], device=hidden_ND.device)
        return Candidates(logprob_C.expand(hidden_ND.shape[0], -1), token_C)


def expected_tau(right: float, depth: int) -> float:
    """Tokens per round of an oracle, were answers endless."""
    return 1 + sum(right**level for level in range(1, depth + 1))


def forced(
    target: Target, drafter: Drafter, shape: TreeShape, prompt: list[int], answer: list[int], right: float
) -> Lane:
    """One answer with an oracle of its own."""
    vocabulary = target.lent.embed_VD.shape[0]
    oracle = Oracle(answer, right, vocabulary, count=shape.topk, seed=len(prompt))
    engine = Engine(target, drafter, oracle, shape)
    return run_lane(oracle.follow(engine.decode(prompt, Sampler(), len(answer))))


def measure(
    target: Target, drafter: Drafter, shape: TreeShape, prompts: list[list[int]], tokens: int
) -> Iterator[dict[str, Any]]:
    """A row per probability; plain decoding takes its turn at every prompt. Answers do not stop before `tokens`."""
    target = dataclasses.replace(target, stop_ids=frozenset())
    lanes: dict[float, list[Lane]] = {right: [] for right in RIGHT}
    plains: list[Lane] = []
    for number, prompt in enumerate((prompts[0], *prompts)):
        own = run_lane(plain(target, prompt, Sampler(), tokens))
        found = {right: forced(target, drafter, shape, prompt, own.ids, right) for right in RIGHT}
        if number:  # the first warms up
            plains.append(own)
            for right, lane in found.items():
                lanes[right].append(lane)
    step_ms = 1e3 * sum(lane.decode_s for lane in plains) / sum(sum(lane.emitted) for lane in plains)
    for right, done in lanes.items():
        row: dict[str, Any] = {"part": "oracle", "dtype": str(target.dtype).removeprefix("torch."), "right": right}
        row |= {"expected_tau": expected_tau(right, shape.depth), **per_round(done), "plain_step_ms": step_ms}
        row["round_over_plain_step"] = row["round_ms"] / step_ms
        row["equal"] = sum(lane.ids == own.ids for lane, own in zip(done, plains, strict=True))
        yield row
