"""The tree that pays: never another word, never much slower than plain steps, as large as its costs deserve."""

import dataclasses
import itertools
import random

import pytest
import torch

from coral_core.decoding import tree
from coral_core.decoding.cache import SlotCache, Slots
from coral_core.decoding.drafting import Drafting
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.policy.adaptive import AdaptiveTree, best_prefix
from coral_core.decoding.policy.copying import Copying
from coral_core.decoding.policy.costs import Costs
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.policy.trials import LONGEST_PAUSE
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.seat import Memory
from coral_core.decoding.step import prefill
from coral_core.decoding.tree import judge
from coral_core.head.heads import Candidates
from coral_core.target.target import Target
from tests.decoding.test_lossless import SAMPLERS, ids_of, some_prompt
from tests.tiny import FAMILIES, VOCAB, OracleHead, tiny_drafter, tiny_engine, tiny_target

CPU = torch.device("cpu")
BOUNDS = TreeShape(depth=6, nodes=24, topk=3)


def costs(row: float, level: float, base: float = 0.1) -> Costs:
    """A device where one more row costs `row` plain steps, and a level of any width `level`."""
    return Costs(step_s=0.01, verify={1: 1.0, 2: 1.0 + row}, level={1: level, 8: level}, base=base)


CHEAP = costs(row=0.001, level=0.01)
"""A GPU: rows are free."""
PLAIN_CPU = costs(row=0.05, level=0.1)
DEAR = costs(row=1.0, level=0.3)
"""Two rows cost two steps: no tree can pay."""
FREE_DRAFTER = costs(row=0.05, level=0.0, base=0.0)
COSTS = {"cheap": CHEAP, "cpu": PLAIN_CPU, "dear": DEAR, "free drafter": FREE_DRAFTER}


class FrankHead(OracleHead):
    """An oracle that says how sure it is: the answer's token comes first, with its own probability."""

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        place, self.level = self.start + self.level, self.level + 1
        tokens = self.random.sample(range(3, VOCAB), self.count)
        right = place < len(self.answer) and self.random.random() < self.right
        tokens = [token for token in tokens if token != (self.answer[place] if place < len(self.answer) else -1)]
        tokens = ([self.answer[place]] if right else []) + tokens
        rest = (1 - self.right) / self.count + 1e-3
        chance_C = torch.tensor([max(self.right, 1e-3)] + [rest] * (len(tokens) - 1))
        return Candidates(chance_C.log().expand(hidden_ND.shape[0], -1), torch.tensor(tokens))


def drafted_with(
    head: OracleHead, target: Target, prompt: list[int], paid: Costs, sampler: Sampler, new: int
) -> list[Round]:
    engine = Engine(target, tiny_drafter(target), head, BOUNDS, paid)
    return [head.follow(event) for event in engine.decode(prompt, sampler, new)]


def share_drafted(rounds: list[Round]) -> float:
    later = [event for event in rounds if event.kind != "prefill"]
    return sum(event.kind == "draft" for event in later) / len(later)


@pytest.fixture(autouse=True)
def no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drafter's trees alone: tiny models repeat themselves (test_copying.py)."""
    monkeypatch.setattr(Copying, "copy", lambda *_: [])


@pytest.fixture
def endless() -> Target:
    return dataclasses.replace(tiny_target("llama"), stop_ids=frozenset())


@pytest.mark.parametrize("right", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("paid", COSTS.values(), ids=COSTS.keys())
def test_the_answer_is_the_plain_one_whatever_a_tree_costs(right: float, paid: Costs, endless: Target) -> None:
    for seed, name in enumerate(("greedy", "T=0.7,p=0.9", "T=1.0")):
        prompt, sampler = some_prompt(seed, 3 + seed), SAMPLERS[name]
        expected = ids_of(list(plain(endless, prompt, sampler, 24)))
        assert ids_of(drafted_with(OracleHead(expected, right), endless, prompt, paid, sampler, 24)) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_families_whose_masks_and_caches_differ(family: str) -> None:
    """Falling back and coming back: the oracle is right only in the middle of the answer."""
    target = dataclasses.replace(tiny_target(family), stop_ids=frozenset())
    prompt = some_prompt(4, 9)
    expected = ids_of(list(plain(target, prompt, Sampler(), 90)))
    wrong = [3 + (token + 7) % (VOCAB - 3) for token in expected]
    head = OracleHead(wrong[:30] + expected[30:75], right=1.0)
    rounds = drafted_with(head, target, prompt, costs(row=0.05, level=0.1, base=0.4), Sampler(), 90)
    assert ids_of(rounds) == expected
    kinds = [kind for kind, _ in itertools.groupby(event.kind for event in rounds)]
    assert kinds.count("draft") >= 2 and kinds.count("plain") >= 2


@pytest.mark.parametrize("paid", [PLAIN_CPU, DEAR], ids=["cpu", "dear"])
def test_a_drafter_that_is_never_right_leaves_plain_steps(paid: Costs, endless: Target) -> None:
    prompt = some_prompt(8, 4)
    expected = ids_of(list(plain(endless, prompt, Sampler(), 150)))
    rounds = drafted_with(OracleHead([], right=0.0), endless, prompt, paid, Sampler(), 150)
    assert ids_of(rounds) == expected
    later = [event.kind for event in rounds[1:]]
    assert later[0] == "draft"
    assert later.count("draft") / len(later) < 0.1
    assert later[40:].count("draft") / len(later[40:]) < 0.04, "trials become rare"


def test_where_rows_are_dear_even_a_good_drafter_is_left_alone(endless: Target) -> None:
    prompt = some_prompt(2, 4)
    expected = ids_of(list(plain(endless, prompt, Sampler(), 120)))
    assert share_drafted(drafted_with(FrankHead(expected, 0.7), endless, prompt, DEAR, Sampler(), 120)) < 0.3
    assert share_drafted(drafted_with(FrankHead(expected, 0.7), endless, prompt, CHEAP, Sampler(), 120)) == 1.0


def test_a_perfect_drafter_is_followed_to_the_bound(endless: Target) -> None:
    prompt = some_prompt(3, 4)
    expected = ids_of(list(plain(endless, prompt, Sampler(), 120)))
    rounds = drafted_with(FrankHead(expected, 1.0), endless, prompt, PLAIN_CPU, Sampler(), 120)
    accepted = [event.accepted_drafts for event in rounds[1:-1]]
    assert all(event.kind == "draft" for event in rounds[1:])
    assert accepted[-3:] == [BOUNDS.depth] * 3


@pytest.mark.parametrize("paid", COSTS.values(), ids=COSTS.keys())
@pytest.mark.parametrize("right", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_no_answer_costs_much_more_than_plain_steps(right: float, paid: Costs, endless: Target) -> None:
    """In modelled plain steps per token; at a cost where nothing pays, trials are all that is lost."""
    spent = tokens = 0.0
    for seed in range(2):
        prompt = some_prompt(20 + seed, 4)
        expected = ids_of(list(plain(endless, prompt, Sampler(), 150)))
        head = FrankHead(expected, right)
        engine = Spying(endless, tiny_drafter(endless), head, BOUNDS, paid)
        rounds = [head.follow(event) for event in engine.decode(prompt, Sampler(), 150)]
        tokens += len(expected) - 1
        spent += sum(event.kind == "plain" for event in rounds) + engine.spent[0]
    assert spent / tokens < 1.06
    if right >= 0.5 and paid is not DEAR:
        assert spent / tokens < 1.0


def test_trees_shrink_as_a_drafter_turns_out_to_be_too_sure(endless: Target) -> None:
    """The oracle gives its tokens 0.8 and is never right. Rows cost next to nothing; what is left is the one trial."""
    engine = Spying(endless, tiny_drafter(endless), OracleHead([], right=0.0), BOUNDS, FREE_DRAFTER)
    list(engine.decode(some_prompt(8, 4), Sampler(), 150))
    assert engine.nodes[0] >= 4
    assert engine.nodes[-1] == 1


@dataclasses.dataclass(frozen=True)
class Spying(Engine):
    """Notes what drafted rounds cost by its own table, and how many nodes they verified."""

    spent: list[float] = dataclasses.field(default_factory=lambda: [0.0])
    nodes: list[int] = dataclasses.field(default_factory=list)

    def plan(self, company: int = 1) -> AdaptiveTree:
        plan, spent, nodes = Engine.plan(self, company), self.spent, self.nodes
        assert isinstance(plan, AdaptiveTree)
        learn = plan.learn

        def noting(draft: tree.Draft, verdict: object) -> None:
            spent[0] += plan.drafting + plan.verify[draft.token_M.numel() - 1]
            nodes.append(draft.token_M.numel() - 1)
            learn(draft, verdict)  # type: ignore[arg-type]

        plan.learn = noting  # type: ignore[method-assign]
        return plan


def test_two_runs_take_the_same_rounds(endless: Target) -> None:
    prompt, sampler = some_prompt(5, 6), Sampler(temperature=1.0, seed=7)
    engine = dataclasses.replace(tiny_engine(endless, depth=5, nodes=20, topk=4), costs=PLAIN_CPU)
    first, second = (
        [(event.kind, event.new_ids, event.accepted_drafts) for event in engine.decode(prompt, sampler, 60)]
        for _ in range(2)
    )
    assert first == second


def test_a_dialogue_goes_on_behind_plain_steps(endless: Target) -> None:
    """The drafter's cache lags when an answer ends in plain steps; the next turn makes up for it."""
    memory, said = Memory(endless), some_prompt(1, 9)
    for right in (0.0, 1.0, 0.0, 1.0):
        expected = ids_of(list(plain(endless, said, Sampler(), 25)))
        head = OracleHead(expected, right)
        engine = Engine(endless, tiny_drafter(endless), head, BOUNDS, DEAR if right == 0 else CHEAP)
        rounds = [head.follow(event) for event in engine.decode(said, Sampler(), 25, memory)]
        assert ids_of(rounds) == expected
        said = [*said, *expected, 5, 6]


def test_the_drafter_is_fed_what_plain_steps_left_out(endless: Target) -> None:
    """Behind any drafted round its cache holds what reading the whole answer at once would have left."""
    prompt, memory, drafter = some_prompt(6, 7), Memory(endless), tiny_drafter(endless)
    engine = Engine(endless, drafter, OracleHead([], right=0.0), BOUNDS, DEAR)
    kinds = []
    for event in engine.decode(prompt, Sampler(), 60, memory):
        kinds.append(event.kind)
        if event.kind == "draft" and "plain" in kinds and len(kinds) > 30:
            break
    assert kinds[-2:] == ["plain", "draft"]
    length, ids_T = memory.slots.length, torch.tensor(memory.ids)
    assert length == len(memory.ids) - 2, "the last token of the round waits, with the feature before it"
    slots, cache = Slots(length), SlotCache(2, length + 1)
    feature_TD = prefill(endless, ids_T[:length], cache)
    Drafting(drafter, endless.lent, engine.head, BOUNDS, slots).feed(ids_T[1 : length + 1], feature_TD)
    assert slots.keys is not None and memory.slots.keys is not None
    torch.testing.assert_close(memory.slots.keys[:, :, :length], slots.keys, rtol=0, atol=1e-5)


# ---- the choice itself


def test_the_best_prefix_is_that_of_brute_force() -> None:
    draw = random.Random(0)
    for _ in range(300):
        gains = sorted((draw.random() for _ in range(draw.randrange(0, 9))), reverse=True)
        steps = [draw.choice([0.0, 0.1, 0.5, draw.random()]) for _ in range(len(gains) + 1)]
        spent = list(itertools.accumulate(steps))
        worth = [sum(gains[:n]) - spent[n] for n in range(len(gains) + 1)]
        chosen = best_prefix(torch.tensor(gains, dtype=torch.float64), torch.tensor(spent, dtype=torch.float64))
        assert worth[chosen] == pytest.approx(max(worth), abs=1e-9)


def test_nodes_by_hand() -> None:
    """Path probabilities 0.8 0.4 0.2 0.1 at 1.5 tokens per step: rows up to 0.13 steps pay for all but the last."""
    scores_N = torch.tensor([0.8, 0.4, 0.2, 0.1]).log()
    counts = {
        row: AdaptiveTree(costs(row=row, level=0.1), BOUNDS, CPU).count(scores_N) for row in (0.01, 0.13, 0.2, 0.4, 2)
    }
    assert counts == {0.01: 4, 0.13: 3, 0.2: 2, 0.4: 1, 2: 1}


def test_a_step_in_the_cost_is_stepped_over_where_it_pays() -> None:
    """A device that takes rows by fours: the fifth row is dear, the sixth to eighth come with it."""
    stairs = Costs(step_s=1, verify={1: 1.0, 4: 1.0, 5: 1.3, 8: 1.3}, level={1: 0.1, 8: 0.1}, base=0.1)
    plan = AdaptiveTree(stairs, BOUNDS, CPU)
    assert plan.count(torch.tensor([0.8, 0.4, 0.2, 0.15, 0.1]).log()) == 3
    assert plan.count(torch.tensor([0.8, 0.4, 0.2, 0.2, 0.2, 0.2, 0.2]).log()) == 7


def test_a_level_is_drafted_with_the_nodes_that_pay_or_not_at_all() -> None:
    """Hit rate 0.7, 1.5 tokens a step, rows at 0.05, a level at 0.2: nodes below 0.11 never pay, nor do 0.5 in all."""
    plan = AdaptiveTree(costs(row=0.05, level=0.2), BOUNDS, CPU)
    assert plan.width(torch.tensor([0.6, 0.2, 0.1]).log()) == 2
    assert plan.drafting == pytest.approx(0.1 + 0.2) and plan.expanded == 2
    assert plan.width(torch.tensor([0.4, 0.05, 0.02]).log()) == 0
    assert plan.drafting == pytest.approx(0.3), "no level, no cost"


def chain(*chances: float) -> tree.Draft:
    """A chain of nodes 1 2 3 …, each with its conditional probability."""
    parent_M = torch.tensor([0, *range(len(chances))])
    return tree.Draft(
        token_M=torch.arange(len(chances) + 1),
        parent_M=parent_M,
        depth_M=torch.arange(len(chances) + 1),
        sees_MM=tree.ancestry(parent_M, len(chances)),
        score_M=torch.tensor([1.0, *itertools.accumulate(chances, lambda a, b: a * b)]).log(),
        levels=len(chances),
    )


def test_calibration_is_accepted_over_expected_at_the_nodes_that_were_reached() -> None:
    """Drafted 0.9 0.5 0.8, the first accepted: 1 of 1.4 expected at two nodes; the third was never tried."""
    plan = AdaptiveTree(PLAIN_CPU, BOUNDS, CPU)
    hits, expected, tries, calibration = plan.hits, plan.expected, plan.tries, plan.calibration
    plan.learn(chain(0.9, 0.5, 0.8), judge(chain(0.9, 0.5, 0.8), torch.tensor([1, 9, 9, 9])))
    assert plan.hits == pytest.approx(0.95 * hits + 1)
    assert plan.expected == pytest.approx(0.95 * expected + 1.4 / calibration)
    assert plan.tries == pytest.approx(0.95 * tries + 2)


def test_calibration_follows_a_drafter_that_is_too_sure_and_one_that_is_not() -> None:
    plan = AdaptiveTree(PLAIN_CPU, BOUNDS, CPU)
    for picked, times in ((9, 60), (1, 60)):
        for _ in range(times):
            draft = chain(0.9 * plan.calibration)
            plan.learn(draft, judge(draft, torch.tensor([picked, 9])))
        assert plan.calibration < 0.1 if picked == 9 else plan.calibration > 0.8


def test_trials_are_further_and_further_apart_and_one_that_pays_ends_the_rest() -> None:
    plan, draft = AdaptiveTree(DEAR, BOUNDS, CPU), chain(0.9)
    rounds = []
    for _ in range(400):
        rounds.append(plan.drafts())
        if rounds[-1]:
            plan.learn(draft, judge(draft, torch.tensor([9, 9])))
    rests = [len(list(run)) for drafts, run in itertools.groupby(rounds) if not drafts]
    assert rests[:5] == [4, 8, 16, 32, LONGEST_PAUSE] and set(rests[5:-1]) == {LONGEST_PAUSE}
    assert plan.trials.small and plan.width(torch.tensor([0.9]).log()) == 0, "a trial is one level deep"
    plan = AdaptiveTree(PLAIN_CPU, BOUNDS, CPU)
    for picks in [[9, 9]] * 20:
        plan.learn(draft, judge(draft, torch.tensor(picks)))
    plan.trials.plain_left = 0
    assert plan.drafts()
    plan.learn(draft, judge(draft, torch.tensor([1, 9])))
    assert plan.trials.rate == 1.0 and plan.drafts(), "two tokens for 1.15 steps"
    assert not plan.trials.small, "and the next draft is a whole one"
    assert plan.trials.pause == LONGEST_PAUSE // 2, "one trial that paid is not yet trusted"
