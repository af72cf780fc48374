"""One tree for all rounds, on a GPU and in a batch: as large as its costs deserve, left alone where it does not pay."""

import dataclasses

import torch

from benchmarks.batch import decode_all
from coral_core.decoding.engine import plain
from coral_core.decoding.policy.constant import ConstantTree, best_shape, round_cost
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.table import Request
from coral_core.decoding.tree import judge
from tests.decoding.policy.test_adaptive import BOUNDS, CHEAP, PLAIN_CPU, chain
from tests.decoding.test_lossless import ids_of, some_prompt
from tests.tiny import tiny_engine, tiny_target


def test_one_tree_for_all_rounds_rests_where_it_does_not_pay_and_no_longer_than_that() -> None:
    """On a GPU: nodes and depth are chosen once, by the costs; what was accepted decides whether to draft at all."""
    plan = ConstantTree(PLAIN_CPU, BOUNDS)
    assert plan.shape == best_shape(BOUNDS, PLAIN_CPU, 1)
    assert plan.cost == round_cost(BOUNDS, PLAIN_CPU, 1)(plan.depth, plan.shape.nodes)
    score_N = torch.zeros(plan.shape.nodes + 3)
    assert (plan.count(score_N), plan.width(score_N[:2])) == (plan.shape.nodes, 2)
    draft = chain(0.9, 0.9)
    for _ in range(40):
        if plan.drafts():
            plan.learn(draft, judge(draft, torch.tensor([9, 9, 9])))
    assert not plan.drafts(), "one token for more than a step"
    plan.trials.plain_left = 0
    for _ in range(40):
        assert plan.drafts()
        plan.learn(draft, judge(draft, torch.tensor([1, 2, 9])))


def test_a_batch_takes_one_tree_that_is_smaller_where_rows_are_dear_and_seats_many() -> None:
    engine = tiny_engine(tiny_target(), depth=8, nodes=60, topk=4)
    large = best_shape(engine.shape, CHEAP, 1)
    small = best_shape(engine.shape, PLAIN_CPU, 1)
    crowded = best_shape(engine.shape, PLAIN_CPU, 8)
    assert large.nodes > small.nodes >= crowded.nodes >= 1
    assert large.depth > small.depth >= crowded.depth >= 1


def test_a_batch_says_what_one_says() -> None:
    endless = dataclasses.replace(tiny_target("llama"), stop_ids=frozenset())
    engine = dataclasses.replace(tiny_engine(endless, depth=4, nodes=40, topk=8), costs=PLAIN_CPU)
    prompts = [some_prompt(seed, 3 + seed) for seed in range(4)]
    said: list[list[int]] = [[] for _ in prompts]
    for number, event in decode_all(engine, [Request(prompt, Sampler(), 20) for prompt in prompts], 3):
        said[number] += event.new_ids
    assert said == [ids_of(list(plain(endless, prompt, Sampler(), 20))) for prompt in prompts]
