"""Recorded forwards: replayed for other tokens and lengths, they say what forwards that run as they come say.

A tape (tape.py) stands in for a CUDA graph; the graph itself is tested where there is a GPU.
"""

import copy
import dataclasses
import gc
import random
import weakref
from collections.abc import Hashable
from typing import Any

import pytest
import torch

from coral_core.decoding import recorded as recording
from coral_core.decoding import tree
from coral_core.decoding.cache import Slots, rounded_rows
from coral_core.decoding.engine import Eager, Engine, plain
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.recorded import Recorded, padded_rows
from coral_core.decoding.rounds import Clock
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.seat import Memory
from coral_core.drafter.blocks import Attend, CosSin
from coral_core.errors import TargetError
from coral_core.head.heads import Candidates, FullHead, StaticHead
from coral_core.recipe.schema import TargetSpec
from coral_core.target.load import load_target, wrap
from coral_core.target.target import Target
from tests.decoding import tape
from tests.decoding.test_memory import ids_of, oracle_engine, words
from tests.tiny import VOCAB, StandIn, tiny_drafter, tiny_engine, tiny_target

TREE = TreeShape(depth=4, nodes=9, topk=3)
"""With its root 10 rows, which are filled up to 16."""
SAMPLERS = [Sampler(), Sampler(temperature=1.0, seed=3), Sampler(repetition_penalty=1.3)]


@pytest.fixture(autouse=True)
def taped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Recordings are tapes; the list grows with each of them."""
    made: list[str] = []

    def record(call):  # type: ignore[no-untyped-def]
        made.append("tape")
        return tape.record(call)

    monkeypatch.setattr(recording, "record", record)
    return made


def recorded(family: str) -> Target:
    return dataclasses.replace(tiny_target(family), stop_ids=frozenset(), graphs=True, idle=[])


def room_for(rows: int) -> Memory:
    memory = Memory(tiny_target("llama"))
    memory.slots.reserve(rows)
    return memory


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-sliding", "gemma3-mixed", "gpt2", "gpt-neox"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=["greedy", "T=1", "penalty"])
def test_replayed_answers_are_the_plain_ones(family: str, sampler: Sampler, taped: list[str]) -> None:
    """Two prompts, drafted with acceptance and plainly; most forwards are replays."""
    target = recorded(family)
    eager = dataclasses.replace(target, graphs=False)
    for seed in range(2):
        prompt = words(seed, 9 + seed)
        expected = ids_of(plain(eager, prompt, sampler, 40))
        assert ids_of(plain(target, prompt, sampler, 40)) == expected
        engine, head = oracle_engine(target, expected)
        rounds = list(map(head.follow, engine.decode(prompt, sampler, 40)))
        assert ids_of(iter(rounds)) == expected
        assert sum(event.accepted_drafts for event in rounds) > 10
    assert 0 < len(taped) < 20


def test_drafts_and_rounds_are_those_of_forwards_that_run_as_they_come() -> None:
    """The same trees, so that tau does not depend on it: with the drafter's own head, recorded too."""
    target = recorded("llama")
    drafter, shape = tiny_drafter(target), tiny_engine(target).shape
    prompt, found = words(3, 12), []
    for graphs_on in (False, True):
        own = dataclasses.replace(target, graphs=graphs_on)
        engine = Engine(own, drafter, FullHead(own.lent), shape)
        found.append([(event.new_ids, event.accepted_drafts) for event in engine.decode(prompt, Sampler(), 60)])
    assert found[0] == found[1]


@pytest.mark.parametrize("sampler", SAMPLERS[:2], ids=["greedy", "T=1"])
def test_a_recorded_draft_is_the_tree_of_one_that_runs_as_it_comes(sampler: Sampler, taped: list[str]) -> None:
    """Behind a prompt, then behind paths of every length: what fills them up is seen by nobody."""
    target, drafter = tiny_target("llama"), tiny_drafter(tiny_target("llama"))
    parts = (drafter, target, FullHead(target.lent), TREE)
    recorded, eager = Recorded().drafting(*parts, room_for(400)), Eager().drafting(*parts, room_for(400))
    for seed, fed in enumerate((20, 1, 5, 3, 2, 4, 5)):
        token_T, feature_TD = torch.tensor(words(seed, fed)), torch.randn(fed, 32)
        one, other = (drafting.draft(token_T, feature_TD, sampler, Clock()) for drafting in (recorded, eager))
        rows = other.token_M.numel()
        assert (one.token_M.numel(), rows) == (16, 10)
        for name in ("token_M", "parent_M", "depth_M"):
            assert torch.equal(getattr(one, name)[:rows], getattr(other, name))
        assert torch.equal(one.sees_MM[:rows, :rows], other.sees_MM)
        torch.testing.assert_close(one.score_M[:rows], other.score_M, rtol=0, atol=1e-4)
        assert one.token_M[rows:].tolist() == [tree.NO_TOKEN] * 6
        assert recorded.slots.length == eager.slots.length
    assert len(taped) == 1


def test_a_recorded_draft_is_of_one_head_one_sampler_and_so_many_columns(taped: list[str]) -> None:
    """All of them over one cache, in turns; behind 300 rows the attention reads twice as many columns."""
    target, drafter = tiny_target("llama"), tiny_drafter(tiny_target("llama"))
    heads = [FullHead(target.lent), StaticHead(target.lent, torch.arange(10, 40))]
    recorded, eager = room_for(600), room_for(600)
    made = []
    for fed in (20, 3, 300, 3):
        for sampler in SAMPLERS[:2]:
            for head in heads:
                token_T, feature_TD = torch.tensor(words(fed, fed)), torch.randn(fed, 32)
                drafts = [
                    forwards.drafting(drafter, target, head, TREE, memory).draft(token_T, feature_TD, sampler, Clock())
                    for forwards, memory in ((Recorded(), recorded), (Eager(), eager))
                ]
                assert drafts[0].token_M[:10].tolist() == drafts[1].token_M.tolist()
                recorded.slots.truncate(recorded.slots.length - (fed if fed == 300 else 0))
                eager.slots.truncate(recorded.slots.length)
        made.append(len(taped))
    assert made == [4, 4, 8, 8]


class Echo(StandIn, torch.nn.Module):
    """A drafter whose feature is the embedding of the token that it read."""

    def forward(
        self, embed_BTD: torch.Tensor, feature_BTD: torch.Tensor, cos_sin: CosSin, attend: Attend
    ) -> torch.Tensor:
        attend(*[embed_BTD[:, None]] * 3)  # the cache holds a row per token, as any drafter's does
        return embed_BTD


class SuccessorHead:
    """Proposes what followed a token in an answer: often right, and nothing that a recording could not hold."""

    recordable = True

    def __init__(self, target: Target, answer: list[int]) -> None:
        self.embed_VD = target.lent.embed_VD
        self.next_V = torch.arange(VOCAB)
        self.next_V[answer[:-1]] = torch.tensor(answer[1:])

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        token_N = torch.cdist(hidden_ND, self.embed_VD).argmin(-1)
        logprob_NV = hidden_ND.new_full((hidden_ND.shape[0], VOCAB), -9.0)
        return Candidates(logprob_NV.scatter(1, self.next_V[token_N][:, None], -0.1), torch.arange(VOCAB))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["greedy", "T=1", "penalty"])
def test_recorded_drafts_are_accepted_where_drafts_that_run_as_they_come_are(sampler: Sampler) -> None:
    """Paths of every length are fed to the drafter and filled up: the next draft is the same."""
    target, prompt, found = recorded("llama"), words(7, 11), []
    answer = ids_of(plain(dataclasses.replace(target, graphs=False), prompt, sampler, 50))
    for graphs_on in (False, True):
        own = dataclasses.replace(target, graphs=graphs_on)
        engine = Engine(own, Echo(), SuccessorHead(own, answer), TREE)  # type: ignore[arg-type]
        found.append([(event.new_ids, event.accepted_drafts) for event in engine.decode(prompt, sampler, 50)])
    assert found[0] == found[1]
    assert len({accepted for _, accepted in found[0]}) > 2
    assert [token for new_ids, _ in found[1] for token in new_ids] == answer


def test_a_later_answer_replays_what_an_earlier_one_recorded(taped: list[str]) -> None:
    target = recorded("llama")
    engine = tiny_engine(target)
    first = ids_of(engine.decode(words(1, 10), Sampler(), 30))
    made = len(taped)
    assert ids_of(engine.decode(words(1, 10), Sampler(), 30)) == first
    assert len(taped) == made
    assert len(target.idle) == 1


def test_an_answer_that_is_left_gives_its_memory_back() -> None:
    target = recorded("llama")
    rounds = tiny_engine(target).decode(words(1, 10), Sampler(), 30)
    next(rounds)
    assert target.idle == []
    rounds.close()
    (memory,) = target.idle
    assert (memory.ids, memory.cache.length, memory.slots.length, memory.unread.end) == ([], 0, 0, 0)
    eager = dataclasses.replace(target, graphs=False)
    assert ids_of(plain(target, words(2, 5), Sampler(), 8)) == ids_of(plain(eager, words(2, 5), Sampler(), 8))


def test_two_drafters_over_one_memory_keep_apart() -> None:
    """An evaluation races several; a recording of the first must not draft for the second."""
    target, shape = recorded("llama"), tiny_engine(tiny_target()).shape
    prompt, found = words(4, 12), []
    for graphs_on in (False, True):
        own = dataclasses.replace(target, graphs=graphs_on)
        head = FullHead(own.lent)
        engines = [Engine(own, tiny_drafter(own, seed), head, shape) for seed in (1, 2)]
        found.append([[event.accepted_drafts for event in e.decode(prompt, Sampler(), 60)] for e in engines])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_a_growing_cache_voids_its_recordings(taped: list[str]) -> None:
    """The second turn needs more room than the first: its storage is another one."""
    target = recorded("llama")
    longer = dataclasses.replace(target, max_positions=2000)
    memory, said = Memory(longer), words(5, 8)
    for turn, length in enumerate((20, 400)):
        expected = ids_of(plain(dataclasses.replace(longer, graphs=False), said, Sampler(), length))
        assert ids_of(plain(longer, said, Sampler(), length, memory)) == expected
        said = [*said, *expected, *words(turn, 3)]
    assert memory.cache.capacity >= 400


def test_a_longer_context_reads_more_columns(taped: list[str]) -> None:
    """Past a bound, a forward over more columns is recorded, and the answer goes on."""
    target = dataclasses.replace(recorded("llama"), max_positions=2000)
    prompt = words(6, rounded_rows(1) - 20)
    expected = ids_of(plain(dataclasses.replace(target, graphs=False), prompt, Sampler(), 60))
    assert ids_of(plain(target, prompt, Sampler(), 60)) == expected
    assert len(taped) == 2


def test_what_waits_for_the_device_cannot_be_recorded() -> None:
    """The tape refuses what a CUDA graph refuses; a user is told how to do without."""
    with pytest.raises(TargetError, match=r"_local_scalar_dense waits for the device.*Set target.graphs to false"):
        recording.run({}, "key", Slots(8), lambda x: x * int(x.sum()), {"x": torch.ones(3)})


def test_a_recording_keeps_what_its_call_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph holds addresses: a drafter that is dropped in between must not be freed under it."""
    drafter = tiny_drafter(tiny_target())
    alive, recordings = weakref.ref(drafter), dict[Hashable, Any]()
    monkeypatch.setattr(recording, "record", lambda call: (lambda: None, call()))
    recording.run(recordings, "key", Slots(8), lambda x, own=drafter: x + own.fc.weight.sum(), {"x": torch.ones(1)})
    del drafter
    gc.collect()
    assert alive() is not None
    recordings.clear()
    gc.collect()
    assert alive() is None


def test_a_call_that_fails_leaves_the_cache_appending() -> None:
    slots = Slots(8)
    states_BJTE = torch.ones(1, 1, 2, 4)
    with pytest.raises(RuntimeError), slots.place(torch.tensor([5, 6]), 8):
        slots.update(states_BJTE, states_BJTE)
        raise RuntimeError
    key_BJKE, _ = slots.update(2 * states_BJTE, states_BJTE)
    assert slots.length == key_BJKE.shape[2] == 2
    assert float(key_BJKE.min()) == 2


def test_columns_and_rows_are_few_numbers() -> None:
    assert [rounded_rows(rows) for rows in (1, 256, 257, 300, 1500, 2048, 2049, 2100, 5000)] == [
        *(256, 256, 512, 512, 2048, 2048, 2304, 2304, 5120)
    ]
    assert all(rows <= rounded_rows(rows) <= max(2 * rows, 256) for rows in range(1, 40000, 7))
    assert all(rounded_rows(rows) <= 1.13 * rows for rows in range(2049, 40000, 7))
    assert [padded_rows(rows) for rows in (1, 2, 3, 9, 61, 64, 65)] == [1, 2, 4, 16, 64, 64, 128]


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(TargetError, match="target.graphs records CUDA graphs, and the target is on cpu"):
        load_target(TargetSpec(device="cpu", graphs=True))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_cuda_graphs_say_what_forwards_that_run_as_they_come_say(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device, with real graphs, in float32."""
    monkeypatch.undo()
    model = copy.deepcopy(tiny_target(family).model).to("cuda")
    target = dataclasses.replace(wrap(model, None), stop_ids=frozenset(), graphs=True)
    eager = dataclasses.replace(target, graphs=False)
    drafter = tiny_drafter(target).to("cuda")
    for seed in range(3):
        prompt = random.Random(seed).choices(range(3, VOCAB), k=9)
        expected = ids_of(plain(eager, prompt, Sampler(), 60))
        assert ids_of(plain(target, prompt, Sampler(), 60)) == expected
        engine = Engine(target, drafter, FullHead(target.lent), TreeShape(depth=4, nodes=7, topk=3))
        assert ids_of(engine.decode(prompt, Sampler(), 60)) == expected
