"""Copies of the text: taken where they are worth more than a draft, and never another word."""

import dataclasses
import itertools
import random

import pytest
import torch

from coral_core.decoding import tree
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.policy.copying import LONGEST, RIGHT, TRIES, Copying, agreeing
from coral_core.decoding.policy.trials import PAUSE, Trials
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.seat import Seat
from coral_core.decoding.table import Request, Table
from coral_core.recipe.schema import TargetSpec
from coral_core.target.load import load_target
from coral_core.target.target import Target
from coral_core.target.template import prompt_ids
from tests.decoding.policy.test_adaptive import BOUNDS, DEAR, PLAIN_CPU, drafted_with
from tests.decoding.test_lossless import SAMPLERS, ids_of, some_prompt
from tests.tiny import FAMILIES, OracleHead, tiny_drafter, tiny_target

FREE = [1.0] * 40
"""Further rows cost nothing."""
VERIFY = [1.0 + 0.03 * rows for rows in range(40)]
BOOK = [*range(1000, 2000)]
"""A text in which no token is there twice."""


def drafts_bring(rate: float) -> Trials:
    trials = Trials()
    trials.tokens, trials.spent = rate, 1.0
    return trials


def test_a_copy_is_what_followed_the_last_tokens_when_they_were_there_last() -> None:
    def copied(ids: list[int], most: int) -> list[int]:
        return Copying(drafts_bring(1.0), FREE).copy(ids, most)

    assert copied([1, 2, 3, 4, 5], 10) == [], "nothing was there before"
    assert copied([1, 2, 3, 4, 5, 6, 2, 3], 5) == [4, 5, 6, 2, 3]
    assert copied([1, 2, 3, 4, 5, 6, 2, 3, 9, 2, 3], 3) == [9, 2, 3], "the newest place of several"
    assert copied([1, 2, 3, 4, 5, 6, 2, 3, 9, 2, 3, 1, 2, 3], 2) == [4, 5], "three agreeing tokens before two"
    assert copied([1, 2, 3, 4, 5, 6, 2, 3, 9, 2, 3, 1, 2, 3, 8], 10) == [], "one token is too few"


def test_the_text_is_read_on_from_call_to_call() -> None:
    copying = Copying(drafts_bring(1.0), FREE)
    assert copying.copy([1, 2, 3, 4], 10) == []
    assert copying.copy([1, 2, 3, 4, 5, 6, 2, 3], 3) == [4, 5, 6]
    assert copying.copy([1, 2, 3, 4, 5, 6, 2, 3, 4, 5, 6, 8, 9, 6, 8], 1) == [9]


def test_a_copy_is_no_longer_than_it_pays() -> None:
    ids = [*range(100, 130), 100, 101]
    assert len(Copying(drafts_bring(1.0), FREE).copy(ids, 99)) == LONGEST
    assert len(Copying(drafts_bring(1.0), FREE).copy(ids, 3)) == 3
    assert len(Copying(drafts_bring(1.0), FREE[:5]).copy(ids, 99)) == 4, "no more rows than costs are known of"
    # With p = 0.5, copies of 1 to 4 bring 1.50, 1.75, 1.88, 1.94 tokens; with rows of 0.1 they cost 1.1, 1.2, 1.3, 1.4.
    dear = [1.0 + 0.1 * rows for rows in range(40)]
    assert RIGHT[0] == 0.5
    assert Copying(drafts_bring(1.0), dear).copy(ids, 99) == [102, 103, 104]
    assert Copying(drafts_bring(1.5), dear).copy(ids, 99) == [], "a draft brings more"


def rounds(copying: Copying, ids: list[int], count: int, right: int) -> None:
    """So many rounds at a place that two tokens agree with: so many tokens go on from there, then another one."""
    for place in range(0, 20 * count, 20):
        ids += BOOK[place : place + 2]
        copying.copy(ids, 99)
        ids += [*BOOK[place + 2 : place + 2 + right], -len(ids)]
        copying.trials.drafts()


def test_an_answer_learns_what_its_copies_are_worth() -> None:
    """Also from rounds that did not copy: what a copy would have brought is in the text."""
    copying, ids = Copying(drafts_bring(1.2), [1.0 + 0.02 * rows for rows in range(40)]), [*BOOK]
    first = copying.copy([*ids, *BOOK[980:982]], 99)
    assert first == BOOK[982 : 982 + len(first)] != []
    rounds(copying, ids, 9, right=0)
    assert copying.copy([*ids, *BOOK[980:982]], 99) == []
    rounds(copying, ids := [*ids, *BOOK], 9, right=12)
    assert len(copying.copy([*ids, *BOOK[980:982]], 99)) > len(first)


def test_a_copy_that_is_right_to_its_end_has_no_wrong_token_and_late_copies_weigh_more() -> None:
    copying, ids = Copying(drafts_bring(1.0), FREE), [*BOOK]
    for right, at_least, at_most in ((LONGEST, 0.97, 1.0), (0, 0.0, 0.15), (LONGEST, 0.9, 1.0), (1, 0.4, 0.6)):
        rounds(copying, ids, 49, right)
        assert at_least <= copying.hits[0] / copying.tries[0] <= at_most, right
        ids += BOOK


def test_a_loop_is_copied_over_and_over() -> None:
    assert Copying(drafts_bring(1.0), FREE).copy([7, 5, 5, 5, 5], 99) == [5] * LONGEST
    assert Copying(drafts_bring(1.0), FREE).copy([1, 2, 3, 4, 3, 4], 5) == [3, 4, 3, 4, 3]


def tried(row: float, agreeing: int, pairs: int = 60) -> list[int]:
    """The rounds in which a draft was tried in a copy's place, where a row of verification costs so much."""
    copying = Copying(drafts_bring(1.0), [1.0 + row * rows for rows in range(40)])
    copying.trials.plain_left = pairs
    text = [7, *[5] * (agreeing + 1)]
    return [number for number in range(pairs) if copying.copy(text, 99) == [] and copying.trials.drafts()]


def test_a_draft_is_tried_in_a_copys_place_ever_more_seldom() -> None:
    found = tried(0.01, agreeing=2, pairs=300)
    assert [PAUSE, *[after - before - 1 for before, after in itertools.pairwise(found)]] == [4, 8, 16, 32, 64, 64, 64]


def test_a_copy_that_brings_much_for_its_cost_is_not_given_up() -> None:
    """Nine tokens agree: eleven or twelve more bring 7 tokens, for 1.1 plain steps or for 4.3."""
    assert tried(0.01, agreeing=9) == []
    assert tried(0.3, agreeing=9) != []


def test_after_copies_that_did_not_pay_a_draft_is_tried_soon_again() -> None:
    copying = Copying(drafts_bring(1.0), [1.0 + 0.01 * rows for rows in range(40)])
    copying.pause = 64
    assert copying.copy([7, 5, 5, 5, 5], 99) != [] and copying.pause == 64
    copying.trials.tokens = 3.0
    assert copying.copy([7, 5, 5, 5, 5], 99) == [] and copying.pause == PAUSE


def test_a_place_teaches_once() -> None:
    """Where nothing was there before, nothing is learnt of the copy before that."""
    copying, ids = Copying(drafts_bring(1.0), FREE), [*BOOK, *BOOK[:2]]
    copying.copy(ids, 9)
    copying.copy(ids := [*ids, -1], 9)
    before = [*copying.tries]
    copying.copy([*ids, -2], 9)
    assert copying.tries == before != [TRIES] * 4


@pytest.mark.parametrize("again", [0.0, 0.4, 0.7])
@pytest.mark.parametrize("wakes", [0, 60])
def test_copies_keep_no_good_drafter_from_drafting(again: float, wakes: int) -> None:
    """Every pair of tokens was there before, and what followed is right `again` times. Rounds cost as SmolLM2's."""

    def tokens_per_step(copies: bool) -> float:
        rng, trials, done, spent = random.Random(1), Trials(), 1, 0.0
        copying = Copying(trials, VERIFY)
        while done < len(answer):
            left = answer[done:]
            if copies and (copied := copying.copy(prompt + answer[:done], len(left) - 1)):
                accepted = next((at for at, token in enumerate(copied) if token != left[at]), len(copied))
                spent += VERIFY[len(copied)]
            elif trials.drafts():
                depth, cost = (1, 1.2) if trials.small else (6, 1.9)
                chance = 0.9 if done >= wakes else 0.0
                accepted = next((at for at in range(depth) if rng.random() > chance), depth)
                trials.learn(accepted + 1, cost)
                spent += cost
            else:
                accepted, spent = 0, spent + 1
            done += accepted + 1
        return len(answer) / spent

    rng = random.Random(0)
    follows: dict[tuple[int, ...], int] = {}
    text = [1, 2]
    while len(text) < 1600:
        pair = tuple(text[-2:])
        follows[pair] = follows[pair] if pair in follows and rng.random() < again else rng.randrange(8)
        text.append(follows[pair])
    prompt, answer = text[:800], text[800:]
    assert tokens_per_step(copies=True) > 0.85 * tokens_per_step(copies=False)


def test_longer_agreement_is_another_class() -> None:
    ids = [*range(100, 130), *range(100, 109)]
    assert [agreeing(ids[: 30 + size], size) for size in (2, 3, 8, 9)] == [2, 3, 8, 8]
    assert agreeing([5, 2, 3, 7, 6, 2, 3], 3) == 2
    copying, text = Copying(drafts_bring(1.0), [1.0 + 0.2 * rows for rows in range(40)]), [*BOOK]
    rounds(copying, text, 9, right=0)
    assert copying.copy([*text, *BOOK[980:982]], 4) == [] and copying.copy([*text, *BOOK[980:989]], 4) != []


def test_a_chain_is_one_path() -> None:
    draft = tree.chain(torch.tensor([7]), [8, 9])
    assert draft.token_M.tolist() == [7, 8, 9] and draft.parent_M.tolist() == [0, 0, 1]
    assert draft.depth_M.tolist() == [0, 1, 2] and draft.levels == 2
    assert torch.equal(draft.sees_MM, tree.ancestry(draft.parent_M, 2))


@pytest.mark.parametrize("name", ["greedy", "T=1.0"])
def test_the_answer_is_the_plain_one_in_every_family(name: str) -> None:
    """Most tokens were there before, so that copies are tried, and most are wrong."""
    copied = []
    for family in FAMILIES:
        target = dataclasses.replace(tiny_target(family), stop_ids=frozenset())
        sampler, prompt = SAMPLERS[name], some_prompt(4, 9) * 3
        expected = ids_of(list(plain(target, prompt, sampler, 30)))
        rounds = drafted_with(OracleHead(expected, 0.5), target, prompt, PLAIN_CPU, sampler, 30)
        assert ids_of(rounds) == expected, family
        copied.append("copy" in [event.kind for event in rounds])
    assert sum(copied) > len(FAMILIES) / 3


@pytest.fixture(scope="module")
def pico() -> Target:
    return load_target(TargetSpec(model="pico"))


def asked_twice(target: Target) -> tuple[list[int], list[int]]:
    """A dialogue in which pico is asked what it just answered, and its answer."""
    asked = [{"role": "user", "content": "I would like a table for two."}]
    first = ids_of(list(plain(target, prompt_ids(target.tokenizer, asked), Sampler(), 40)))
    said = target.tokenizer.decode(first, skip_special_tokens=True)
    prompt = prompt_ids(target.tokenizer, [*asked, {"role": "assistant", "content": said}, *asked])
    return prompt, ids_of(list(plain(target, prompt, Sampler(), 40)))


@pytest.mark.parametrize("right", [0.0, 0.6])
def test_where_the_text_repeats_copies_bring_most_of_it(right: float, pico: Target) -> None:
    """The rounds between them, and the drafter that reads the copied rows afterwards, change no word."""
    prompt, expected = asked_twice(pico)
    rounds = drafted_with(OracleHead(expected, right), pico, prompt, PLAIN_CPU, Sampler(), 40)
    assert ids_of(rounds) == expected
    copies = [event for event in rounds if event.kind == "copy"]
    assert sum(event.accepted_drafts for event in copies) > len(expected) / 3


def test_copies_need_verified_rows_that_pay(pico: Target) -> None:
    prompt, expected = asked_twice(pico)
    rounds = drafted_with(OracleHead(expected, 1.0), pico, prompt, DEAR, Sampler(), 40)
    assert ids_of(rounds) == expected and "copy" not in [event.kind for event in rounds]


def test_trees_of_one_size_are_the_drafters_alone(pico: Target) -> None:
    prompt, expected = asked_twice(pico)
    head = OracleHead(expected, 1.0)
    engine = Engine(pico, tiny_drafter(pico), head, BOUNDS)
    rounds = [head.follow(event) for event in engine.decode(prompt, Sampler(), 40)]
    assert ids_of(rounds) == expected and {event.kind for event in rounds} == {"prefill", "draft"}


def test_answers_side_by_side_say_the_same_when_one_is_left_alone(pico: Target) -> None:
    prompt, expected = asked_twice(pico)
    table = Table(Engine(pico, tiny_drafter(pico), OracleHead([], 0.0), BOUNDS, PLAIN_CPU), 2)
    said: list[tuple[Seat, list[int]]] = []
    for new in (40, 5):
        seat, event = table.sit(Request(prompt, Sampler(), new))
        said.append((seat, list(event.new_ids)))
    kinds = set()
    while table.seats:
        for seat, event in table.step():
            next(ids for own, ids in said if own is seat).extend(event.new_ids)
            kinds.add(event.kind)
    assert [ids for _, ids in said] == [expected, expected[:5]]
    assert "copy" in kinds
