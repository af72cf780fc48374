"""Answers from a server: a small stub here, `transformers serve` with pico under `slow`."""

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coral_core.data import ahead, plan
from coral_core.data import endpoint as module
from coral_core.data.estimate import estimate
from coral_core.data.job import Job, standing
from coral_core.data.stage import prepare
from coral_core.embedded import FOLDER as PICO
from coral_core.errors import DataError, RecipeError
from coral_core.recipe.loader import load_recipe
from coral_core.store.store import Store
from coral_core.target.load import load_target
from coral_core.target.template import closing_ids
from tests.data.helpers import CHATML, make_job, make_target, make_tokenizer, write_lines
from tests.data.server import Server, serving

ROWS = [{"turns": [f"q{number}", "and then?"]} for number in range(12)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_WAIT_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as running:
        yield running


def job(folder: Path, url: str, rows: list[Any] = ROWS, **data: Any) -> Job:
    folder.mkdir(exist_ok=True)
    path = write_lines(folder / "p.jsonl", rows)
    keys = {"prompts": path, "endpoint": url, "max_samples": len(rows), "max_new_tokens": 20, "max_length": 200}
    return make_job(folder, **{**keys, "regenerate": "greedy", **data})


def texts(store: Store, kept: Job) -> set[str]:
    """Each sample as text, the target's own words in brackets."""
    decode = kept.target.tokenizer.decode
    found = set()
    for index in range(len(store)):
        sample, text, before = store[index], "", False
        for token, own in zip(sample.ids_T.tolist(), sample.answer_T.tolist(), strict=True):
            text += ("[" if own and not before else "]" if before and not own else "") + decode([token])
            before = own
        found.add(text + ("]" if before else ""))
    return found


def test_every_turn_is_the_servers_answer_and_the_mask_is_its_words(tmp_path: Path, server: Server) -> None:
    made = job(tmp_path, server.url)
    store = prepare(made)
    assert texts(store, made) == {
        f"<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n[1 {words.upper()}<|im_end|>]\n"
        "<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n[3 AND THEN?<|im_end|>]"
        for words in (row["turns"][0] for row in ROWS)
    }
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in server.bodies} == {("served", 0, 20)}
    assert len(server.bodies) == 24
    assert set(server.keys) == {None}


def test_an_answer_cut_at_its_limit_has_no_end(tmp_path: Path, server: Server) -> None:
    made = job(tmp_path, server.url, [{"prompt": f"{n}{'long' * 9}"} for n in range(4)], max_new_tokens=8, holdout=1)
    store = prepare(made)
    assert {text[-9:] for text in texts(store, made)} == {f"1 {n}LONGL]"[-9:] for n in range(4)}
    assert [int(store[index].answer_T.sum()) for index in range(4)] == [8] * 4


def test_sampling_has_a_seed_of_its_own_for_each_answer(tmp_path: Path, server: Server) -> None:
    prepare(job(tmp_path, server.url, regenerate="sample"))
    assert len({body["seed"] for body in server.bodies}) == 24
    assert {(body["temperature"], body["top_p"]) for body in server.bodies} == {(1.0, 1.0)}


def test_requests_run_at_once_and_never_more_than_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of two dialogues: were they answered one after another, two requests would be the most."""
    monkeypatch.setattr(ahead, "REQUESTS", 6)
    monkeypatch.setattr(plan, "SHARD_TOKENS", 160)
    with serving(Server(delay_s=0.03)) as server:
        store = prepare(job(tmp_path, server.url))
        assert len(store.manifest.facts["shards"]) == 12
        assert 4 <= server.busiest <= 6


def test_what_fails_for_a_while_is_tried_again(tmp_path: Path) -> None:
    failures = (503, "drop", 429, "garbage", 500, 502, "drop")
    with serving(Server(fail=failures)) as server, serving(Server()) as calm:
        troubled, whole = job(tmp_path / "a", server.url), job(tmp_path / "b", calm.url)
        assert texts(prepare(troubled), troubled) == texts(prepare(whole), whole)
        assert len(server.bodies) == 24 + len(failures)


def test_several_servers_share_the_work_and_stand_in_for_each_other(tmp_path: Path) -> None:
    with serving(Server()) as one, serving(Server(models=("b", "c"), fail=(500,) * 99)) as other:
        prepare(job(tmp_path, f"{one.url}/, {other.url}"))
        assert len(one.bodies) == 24
        assert len(other.bodies) >= 12
        assert {body["model"] for body in other.bodies} == {str(PICO / "target")}, "one model of several: by its name"


def test_a_server_that_goes_away_stops_the_run_and_its_return_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "SHARD_TOKENS", 160)
    monkeypatch.setattr(ahead, "REQUESTS", 1)
    with serving(Server()) as server:
        server.fail = [0] * 9 + [500] * module.TRIES
        with pytest.raises(DataError, match=r"no answer in 8 tries \(500 .*no such luck.*\).*run the same command"):
            prepare(job(tmp_path, server.url))
    finished = len(list((tmp_path / ".data.partial").glob("shard-*.safetensors")))
    assert finished >= 1
    with serving(Server()) as server:
        store = prepare(job(tmp_path, server.url))
        assert len(server.bodies) == 24 - 2 * finished
    assert len(store) == 12
    assert standing(job(tmp_path, '""')).store is not None, (
        "where the answers came from is no part of the recipe's name"
    )


def test_a_key_is_sent_when_there_is_one(tmp_path: Path, server: Server) -> None:
    made = job(tmp_path, server.url)
    prepare(Job(made.recipe, made.target, made.folder, endpoint_key="k"))
    assert set(server.keys) == {"Bearer k"}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"finish_reason": "tool_calls"}, "ended an answer by 'tool_calls'. Start the server without tools"),
        ({"message": {"content": "", "role": "assistant"}, "finish_reason": "length"}, "ended an answer by 'length'"),
        ({"message": {"content": "x", "reasoning_content": "y"}}, "without a reasoning parser"),
        ({"message": None}, "does not speak OpenAI's chat protocol"),
    ],
)
def test_an_answer_that_is_not_the_targets_is_refused(
    tmp_path: Path, server: Server, choice: dict, message: str
) -> None:
    server.choice = choice
    with pytest.raises(DataError, match=message):
        prepare(job(tmp_path, server.url))


def test_a_refusal_is_told_in_the_servers_words_at_once(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "REQUESTS", 1)
    server.fail = [400] * 500
    with pytest.raises(DataError, match=r"refuses a dialogue: 400 .*no such luck"):
        prepare(job(tmp_path, server.url))
    assert len(server.bodies) <= 2


def test_no_server_is_told_before_anything_is_made(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    for act in (prepare, estimate):
        with pytest.raises(DataError, match=rf"no server answers at data\.endpoint {url} \(.*refused\)\. Start it"):
            act(job(tmp_path, url))
    assert not (tmp_path / ".data.partial").exists()


def test_slips_in_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.endpoint is 'host:8000'; it must be an address such as http://"):
        load_recipe(None, ["data.endpoint=host:8000"])
    with pytest.raises(DataError, match="data.endpoint is set, but data.regenerate is none"):
        prepare(job(tmp_path, "http://x/v1", regenerate="none"))


def test_the_end_of_an_answer_is_the_templates() -> None:
    target = make_target()
    assert target.tokenizer.convert_ids_to_tokens(closing_ids(target.tokenizer, target.stop_ids)) == ["<|im_end|>"]
    plain = make_tokenizer(CHATML.replace("<|im_end|>", "."))
    assert closing_ids(plain, frozenset({5, 3})) == [3]
    assert closing_ids(plain, frozenset()) == []


@pytest.mark.slow
def test_transformers_serve_gives_the_words_that_the_target_gives_here(tmp_path: Path) -> None:
    """Greedy answers of pico over HTTP, and here: the same text, but for rare ties in a batch of another shape."""
    pytest.importorskip("fastapi", reason="pip install 'transformers[serving]'")
    command = shutil.which("transformers")
    if command is None:
        pytest.skip("the transformers command is not on the path")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [command, "serve", str(PICO / "target"), "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"]
    process = subprocess.Popen(words)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        rows = json.loads((PICO / "holdout.json").read_text())[:8]
        target = load_target(load_recipe(None, []).target)
        prompts = [{"prompt": target.tokenizer.decode(ids, skip_special_tokens=True)} for ids in rows]
        path = write_lines(tmp_path / "p.jsonl", prompts)
        keys = [f"data.prompts={path}", "data.max_samples=8", "data.holdout=1", "data.max_new_tokens=24"]
        server = [f"data.endpoint=http://127.0.0.1:{port}/v1"]
        there, here = (
            prepare(Job(load_recipe(None, [*keys, *more]), target, tmp_path / name / "data"))
            for name, more in (("there", server), ("here", []))
        )
    finally:
        process.kill()
        process.wait()
    same = [there[index].ids_T.tolist() == here[index].ids_T.tolist() for index in range(len(here))]
    assert sum(same) >= len(same) - 1


def wait_for(url: str, process: subprocess.Popen) -> None:
    for _ in range(600):
        assert process.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(url, timeout=2).read()
        except OSError:
            time.sleep(0.5)
        else:
            return
    pytest.fail("the server did not start")
