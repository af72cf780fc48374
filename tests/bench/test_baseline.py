"""Plain decoders: which race, and that a rate begins behind the prefill."""

from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
import transformers

from coral_core.bench import baseline, race
from coral_core.bench.baseline import generate_lane, plain_lanes
from coral_core.bench.metrics import summarise
from coral_core.bench.race import Lane, Turn, run_lane
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from tests.tiny import tiny_target


class Clock:
    """A clock that stands until it is told."""

    now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (baseline, race):
        monkeypatch.setattr(module, "time", clock)
    return clock


def check(lane: Lane) -> None:
    """Five tokens, of which the prefill brought one in 100 s, and the others took 2 s each."""
    assert (lane.prefill_s, lane.decode_s) == (100.0, 8.0)
    turn = Turn("q", 0, 3, {"plain": lane, "m": lane}, {"m": None})
    assert summarise([[turn]], "m")["baseline_tokens_per_s"] == 0.5


def test_a_rate_begins_behind_the_prefill(clock: Clock) -> None:
    def rounds() -> Iterator[Round]:
        for number in range(5):
            clock.now_s += 2.0 if number else 100.0
            yield Round([7], "plain" if number else "prefill")

    check(run_lane(rounds()))


def test_so_does_the_rate_of_generate(clock: Clock) -> None:
    """transformers hands the prompt to the streamer before it reads it, and then each token."""
    target = tiny_target()

    class Model:
        generation_config = transformers.GenerationConfig()

        def generate(self, ids_BT: torch.Tensor, streamer: Any, **options: Any) -> torch.Tensor:
            streamer.put(ids_BT)
            for number in range(5):
                clock.now_s += 2.0 if number else 100.0
                streamer.put(torch.tensor([7]))
            streamer.end()
            return torch.cat((ids_BT, torch.full((1, 5), 7)), dim=1)

    check(generate_lane(race.dataclasses.replace(target, model=Model()), [3, 4, 5], Sampler(), 5))


def test_the_streamer_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[int]] = []
    put = baseline._FirstToken.put

    def noted(streamer: Any, value: torch.Tensor) -> None:
        given.append(value.flatten().tolist())
        put(streamer, value)

    monkeypatch.setattr(baseline._FirstToken, "put", noted)
    target = tiny_target()
    monkeypatch.setattr(target.model, "generation_config", transformers.GenerationConfig(pad_token_id=0))
    lane = generate_lane(target, [3, 4, 5], Sampler(), 6)
    assert len(lane.ids) == 6
    assert given == [[3, 4, 5], *([token] for token in lane.ids)]
    assert lane.prefill_s > 0 and lane.decode_s > 0


OTHER_JOBS: list[dict[str, Any]] = [
    {"return_dict_in_generate": True},
    {"stop_strings": ["###"]},
    {"num_beams": 4},
    {"suppress_tokens": list(range(3, 90))},
    {"no_repeat_ngram_size": 1},
    {"dola_layers": "low"},
]


@pytest.mark.parametrize("key", OTHER_JOBS, ids=[next(iter(key)) for key in OTHER_JOBS])
def test_a_generation_config_changes_no_baseline(key: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ended in a traceback or gave another text: coral reads the end tokens alone."""
    target = tiny_target()
    monkeypatch.setattr(target.model, "generation_config", transformers.GenerationConfig(pad_token_id=0))
    plain = generate_lane(target, [3, 4, 5], Sampler(), 20).ids
    end = plain[9]
    config = transformers.GenerationConfig(eos_token_id=end, pad_token_id=0, **key)
    monkeypatch.setattr(target.model, "generation_config", config)
    assert generate_lane(target, [3, 4, 5], Sampler(), 20).ids == plain[: plain.index(end) + 1]
    assert target.model.generation_config is config


def test_every_plain_decoder_says_what_ours_says() -> None:
    lanes = plain_lanes(tiny_target(), Sampler(), 5)
    assert list(lanes) == ["plain float32 inexact", "generate float32", "plain bfloat16 inexact", "generate bfloat16"]
    own = generate_lane(tiny_target(), [3, 4, 5], Sampler(), 5).ids
    assert lanes["plain float32 inexact"]([3, 4, 5]).ids == own
    assert lanes["generate float32"]([3, 4, 5]).ids == own
    assert len(lanes["plain bfloat16 inexact"]([3, 4, 5]).ids) >= 1


@pytest.mark.parametrize("short", ["copy", "memory", None])
def test_another_dtype_races_where_its_copy_has_room(short: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is of the target's bytes in 16 bits, whatever it is in itself."""
    target = tiny_target()
    numbers = sum(weight.numel() for weight in target.model.parameters())
    monkeypatch.setattr(baseline, "LIMIT_BYTES", 2 * numbers - (short == "copy"))
    memory = psutil.virtual_memory()._replace(available=4 * numbers - (short == "memory"))
    monkeypatch.setattr(baseline.psutil, "virtual_memory", lambda: memory)
    assert ("generate bfloat16" in plain_lanes(target, Sampler(), 5)) == (short is None)


def test_our_own_loop_races_as_fast_as_it_is_without_exact_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is exact, and so a little slower: as the baseline it would flatter a drafter."""
    seen = []
    monkeypatch.setattr(baseline, "plain", lambda form, *rest: seen.append(form.exact) or iter(()))
    monkeypatch.setattr(baseline, "run_lane", list)
    target = tiny_target()
    assert target.exact
    for name, decode in plain_lanes(target, Sampler(), 5).items():
        if name.startswith(race.PLAIN):
            decode([3, 4, 5])
    assert seen == [False, False]
    inexact = race.dataclasses.replace(target, exact=False)
    assert list(plain_lanes(inexact, Sampler(), 5)) == ["generate float32", "plain bfloat16", "generate bfloat16"]
