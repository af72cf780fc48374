"""A dialogue that keeps its caches says what one that forwards its whole history says, and forwards less."""

import dataclasses
import random
from collections.abc import Iterator

import pytest
import torch

from coral_core.decoding import tree
from coral_core.decoding.cache import Slots
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.policy.costs import Costs
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.seat import Memory
from coral_core.errors import DataError
from coral_core.target.target import Target
from tests.tiny import VOCAB, OracleHead, tiny_drafter, tiny_engine, tiny_target

SAMPLERS = [Sampler(), Sampler(temperature=1.0, seed=3), Sampler(repetition_penalty=1.3)]


def ids_of(rounds: Iterator[Round]) -> list[int]:
    return [token for event in rounds for token in event.new_ids]


def words(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCAB), k=length)


def endless(family: str) -> Target:
    return dataclasses.replace(tiny_target(family), stop_ids=frozenset())


def oracle_engine(target: Target, answer: list[int]) -> tuple[Engine, OracleHead]:
    head = OracleHead(answer, right=0.8)
    return Engine(target, tiny_drafter(target), head, TreeShape(depth=4, nodes=12, topk=3)), head


@pytest.mark.parametrize("family", ["llama", "gemma4-shared"])
def test_plain_turns_go_on_from_the_rows_that_are_there(family: str) -> None:
    """A layer that reads another's rows (Gemma 4) keeps no count of its own."""
    target = endless(family)
    memory, said = Memory(target), words(0, 9)
    for turn in range(3):
        answer = ids_of(plain(target, said, Sampler(), 6, memory))
        assert answer == ids_of(plain(target, said, Sampler(), 6))
        said = [*said, *answer, *words(turn, 4)]


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3-mixed", "gemma4-shared", "gpt2"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=["greedy", "T=1", "penalty"])
def test_every_turn_is_what_it_is_without_memory(family: str, sampler: Sampler) -> None:
    """Four turns, drafted and plain by turns, one answer left in the middle."""
    target = endless(family)
    memory, said, accepted = Memory(target), words(0, 9), 0
    for turn, drafted in enumerate((True, False, True, True)):
        expected = ids_of(plain(target, said, sampler, 12))
        engine, head = oracle_engine(target, expected)
        rounds = engine.decode(said, sampler, 12, memory) if drafted else plain(target, said, sampler, 12, memory)
        answer: list[int] = []
        for event in map(head.follow, rounds):
            answer += event.new_ids
            accepted += event.accepted_drafts
            if turn == 2 and len(answer) > 5:
                break
        assert answer == expected[: len(answer)]
        assert turn == 2 or len(answer) == 12
        said = [*said, *answer, *words(turn, 4)]
    assert accepted >= 4


def forwarded(target: Target) -> tuple[Target, list[int]]:
    """The target, and the number of rows of each of its forwards from now on."""
    rows: list[int] = []

    @dataclasses.dataclass(frozen=True)
    class Counting(Target):
        def forward(self, ids_BT: torch.Tensor, **rest: object) -> torch.Tensor:
            rows.append(ids_BT.shape[1])
            return super().forward(ids_BT, **rest)  # type: ignore[arg-type]

    fields = {field.name: getattr(target, field.name) for field in dataclasses.fields(Target)}
    return Counting(**fields), rows


def test_history_is_not_forwarded_again() -> None:
    """The last answer token was never forwarded."""
    target, rows = forwarded(endless("llama"))
    engine, memory = tiny_engine(target), Memory(target)
    said = words(1, 30)
    answer = ids_of(engine.decode(said, Sampler(), 10, memory))
    assert rows[0] == 30
    rows.clear()
    said = [*said, *answer, *words(2, 5)]
    ids_of(engine.decode(said, Sampler(), 10, memory))
    assert rows[0] == 5 + 1
    rows.clear()
    ids_of(plain(target, [*said[:20], said[20] ^ 1], Sampler(), 4, memory))
    assert rows == [2, 1, 1, 1], "another history: what it shares with the last is kept"


def test_an_unrelated_prompt_shares_nothing() -> None:
    target = endless("llama")
    engine, memory = tiny_engine(target), Memory(target)
    ids_of(engine.decode([3, 4, 5], Sampler(), 6, memory))
    assert ids_of(engine.decode([7, 8], Sampler(), 6, memory)) == ids_of(plain(target, [7, 8], Sampler(), 6))
    again = ids_of(engine.decode([7, 8], Sampler(), 6, memory))
    assert again == ids_of(plain(target, [7, 8], Sampler(), 6)), "the same prompt a second time"


class Interrupting:
    """A target whose k-th forward from now on stops between two layers, as Ctrl-C may."""

    def __init__(self, target: Target, after: int) -> None:
        self.left = after
        self.hook = target.model.model.layers[1].register_forward_pre_hook(self)

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 2, 4])
@pytest.mark.parametrize("drafted", [True, False])
def test_an_answer_stopped_between_two_layers_leaves_a_memory_that_goes_on(after: int, drafted: bool) -> None:
    target = endless("llama")
    engine, memory = tiny_engine(target), Memory(target)
    said = words(3, 8)
    said += ids_of(engine.decode(said, Sampler(), 6, memory)) + words(4, 3)
    interrupting = Interrupting(target, after)
    try:
        with pytest.raises(KeyboardInterrupt):
            ids_of(engine.decode(said, Sampler(), 9, memory) if drafted else plain(target, said, Sampler(), 9, memory))
    finally:
        interrupting.hook.remove()
    expected = ids_of(plain(target, said, Sampler(), 9))
    assert ids_of(engine.decode(said, Sampler(), 9, memory)) == expected


def drafted_rows(memory: Memory) -> torch.Tensor:
    assert memory.slots.keys is not None
    return memory.slots.keys[:, :, : memory.slots.length]


def test_the_drafter_goes_on_from_the_rows_it_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong rows of the drafter change no word, only how many are accepted: nothing else would notice them.

    One answer is stopped while a tree grows, whose rows must not be taken for committed ones; one is plain, which
    the drafter did not follow.
    """
    target = endless("llama")
    engine, memory, fresh = tiny_engine(target), Memory(target), Memory(target)
    said, calls = words(5, 8), iter(range(99))

    def interrupted(*arguments: object) -> object:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return extend(*arguments)  # type: ignore[arg-type]

    extend = tree.extend
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tree, "extend", interrupted)
        ids_of(engine.decode(said, Sampler(), 9, memory))
    assert memory.slots.length == len(memory.ids) - 1, "rows of the half-grown tree do not count"
    said = [*memory.ids, *words(6, 3)]
    said += ids_of(plain(target, said, Sampler(), 5, memory)) + words(7, 3)
    said += ids_of(engine.decode(said, Sampler(), 5, memory)) + words(8, 3)
    ids_of(engine.decode(said, Sampler(), 5, memory))
    ids_of(engine.decode(said, Sampler(), 5, fresh))
    torch.testing.assert_close(drafted_rows(memory), drafted_rows(fresh), rtol=0, atol=1e-5)


def test_rows_that_wait_for_the_drafter_are_not_forwarded_again() -> None:
    """Rounds that do not draft leave their features; the next turn, and a shorter one, go on from them."""
    target, rows = forwarded(endless("llama"))
    tiny, memory = tiny_engine(target), Memory(target)
    engine = dataclasses.replace(tiny, costs=NOTHING_PAYS)
    said = words(1, 30)
    answer = ids_of(engine.decode(said, Sampler(), 60, memory))
    assert memory.slots.length < 70, "most rounds were plain steps"
    rows.clear()
    said = [*said, *answer, *words(2, 5)]
    ids_of(engine.decode(said, Sampler(), 1, memory))
    assert rows == [5 + 1] and memory.slots.length < 70
    for history in (said[:80], [*said[:75], *words(3, 9)], said[:10], said):
        rows.clear()
        ids_of(tiny.decode(history, Sampler(), 4, memory))
        assert rows[0] < 12 or history is said
        fresh = Memory(target)
        ids_of(tiny.decode(history, Sampler(), 4, fresh))
        assert memory.ids == fresh.ids
        torch.testing.assert_close(drafted_rows(memory), drafted_rows(fresh), rtol=0, atol=1e-5)


NOTHING_PAYS = Costs(step_s=0.01, verify={1: 1.0, 2: 2.0}, level={1: 1.0}, base=1.0)
COPIES_PAY = Costs(step_s=0.01, verify={1: 1.0, 2: 1.0}, level={1: 1.0}, base=9.0)


@pytest.mark.parametrize("seed", range(8))
def test_the_drafter_goes_on_after_any_turns(seed: int) -> None:
    """Turns that draft, copy, step, or have no drafter; histories that go on, end before, or say another thing."""
    target, rng = endless("llama"), random.Random(seed)
    tiny, memory = tiny_engine(target), Memory(target)
    said, kinds, accepted = words(seed, 12), set(), 0
    for _ in range(12):
        costs, new = rng.choice([None, None, NOTHING_PAYS, COPIES_PAY]), rng.choice([1, 3, 14])
        expected = ids_of(plain(target, said, Sampler(), new))
        drafting, head = oracle_engine(target, expected)
        engine = rng.choice([dataclasses.replace(drafting, costs=costs)] * 3 + [Engine(target)])
        rounds = [head.follow(event) for event in engine.decode(said, Sampler(), new, memory)]
        assert ids_of(iter(rounds)) == expected
        kinds |= {event.kind for event in rounds}
        accepted += sum(event.accepted_drafts for event in rounds if event.kind == "draft")
        if rounds[-1].kind == "draft":
            fresh = Memory(target)
            ids_of(tiny.decode(memory.ids, Sampler(), 3, fresh))
            rows = memory.slots.length
            torch.testing.assert_close(drafted_rows(memory), drafted_rows(fresh)[:, :, :rows], rtol=0, atol=1e-5)
        said = [*said, *expected]
        if rng.random() < 0.5 or len(said) > 60:
            said = said[: rng.randrange(5, len(said))]
        said += words(rng.randrange(99), rng.randrange(1, 4))
    assert kinds >= {"draft", "plain"} and accepted


def test_a_plain_turn_leaves_what_waits_for_the_drafter() -> None:
    target, rows = forwarded(endless("llama"))
    engine, memory = dataclasses.replace(tiny_engine(target), costs=NOTHING_PAYS), Memory(target)
    said = words(1, 30)
    said += ids_of(engine.decode(said, Sampler(), 60, memory))
    said += ids_of(plain(target, said, Sampler(), 2, memory))
    rows.clear()
    ids_of(engine.decode([*said, *words(2, 5)], Sampler(), 1, memory))
    assert rows == [5 + 2 + 1], "the plain answer's tokens, whose features nobody kept, the last one before, and five"


def test_a_turn_that_copied_is_not_forwarded_again() -> None:
    target, rows = forwarded(endless("llama"))
    tiny, memory, fresh = tiny_engine(target), Memory(target), Memory(target)
    said = words(1, 9)
    rounds = list(dataclasses.replace(tiny, costs=COPIES_PAY).decode(said, Sampler(), 50, memory))
    assert [event.kind for event in rounds].count("copy") > 3
    said = [*said, *ids_of(iter(rounds)), *words(2, 5)]
    rows.clear()
    ids_of(tiny.decode(said, Sampler(), 4, memory))
    assert rows[0] == 5 + 1
    ids_of(tiny.decode(said, Sampler(), 4, fresh))
    torch.testing.assert_close(drafted_rows(memory), drafted_rows(fresh), rtol=0, atol=1e-5)


def test_reserve_keeps_what_is_held() -> None:
    slots = Slots(3)
    states_BJTE = torch.arange(6.0).reshape(1, 1, 3, 2)
    slots.update(states_BJTE, -states_BJTE)
    slots.truncate(2)
    slots.reserve(5)
    keys, values = slots.update(states_BJTE, -states_BJTE)
    assert keys[0, 0].tolist() == [[0, 1], [2, 3], [0, 1], [2, 3], [4, 5]]
    assert torch.equal(values, -keys)
    slots.reserve(2)
    assert slots.capacity == 5


def test_a_prompt_that_does_not_fit_leaves_the_memory_alone() -> None:
    target = endless("llama")
    memory = Memory(target)
    ids_of(plain(target, words(6, 9), Sampler(), 3, memory))
    before = list(memory.ids)
    with pytest.raises(DataError, match="context"):
        ids_of(tiny_engine(target).decode(words(6, 9) * 30, Sampler(), 3, memory))
    assert memory.ids == before
