"""The whole stage: what it publishes, and that an interruption anywhere changes none of it."""

import collections
import contextlib
import dataclasses
import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coral_core.artifacts import Manifest, fingerprint
from coral_core.data import plan
from coral_core.data import stage as module
from coral_core.data.estimate import estimate
from coral_core.data.job import INDIFFERENT, Job, standing
from coral_core.data.plan import Fit
from coral_core.data.prompts import Dialogue, UnusableError
from coral_core.data.sources import Source
from coral_core.data.stage import prepare
from coral_core.data.written import PromptWriter
from coral_core.errors import ArtifactError
from coral_core.recipe.schema import REMOVED
from coral_core.target.template import prompt_ids
from tests.data.helpers import (
    CHATML,
    contents,
    make_job,
    make_target,
    prepare_telling,
    write_lines,
)
from tests.together import exit_codes, start_together

ROOT = Path(__file__).parent.parent.parent
SPAWN = multiprocessing.get_context("forkserver")
"""Processes that find torch imported: twenty of them are then a matter of seconds."""
SPAWN.set_forkserver_preload(["tests.data.helpers", "accelerate.state", "transformers.models.llama.modeling_llama"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """The files of a run of `make_job`'s defaults, and how often it reported progress."""
    calls: list[tuple] = []
    store = prepare(make_job(tmp_path_factory.mktemp("whole")), lambda *call: calls.append(call))
    return contents(store.folder), len(calls)


@pytest.fixture
def whole(uninterrupted: tuple[dict[str, bytes], int]) -> dict[str, bytes]:
    return uninterrupted[0]


@pytest.fixture
def calls(uninterrupted: tuple[dict[str, bytes], int]) -> int:
    return uninterrupted[1]


class InterruptedHereError(Exception):
    pass


def interrupt_at(call: int):
    """A progress that raises at the so-and-so-manieth call."""
    left = [call]

    def progress(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise InterruptedHereError(stage)

    return progress


def test_the_store_is_what_the_recipe_says(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    store = prepare(job)
    facts = store.manifest.facts
    assert (facts["dialogues"], facts["holdout_dialogues"], facts["dtype"]) == (16, 3, "bfloat16")
    assert len(store) == len(store.train_indices) + len(store.holdout_indices) == 16
    assert len(facts["shards"]) > 3
    assert all(shard["tokens"] <= 200 for shard in facts["shards"])
    assert facts["drafter_config"]["hidden_size"] == 16
    assert store.manifest.inputs["target"] == job.target.fingerprint
    prompts = [json.loads(line)["turns"][0] for line in (store.folder / "prompts.jsonl").read_text().splitlines()]
    assert len(set(prompts)) == 16
    for index, text in enumerate(prompts):
        sample = store[index]
        prompt = prompt_ids(job.target.tokenizer, [{"role": "user", "content": text}])
        assert sample.ids_T[: len(prompt)].tolist() == prompt
        assert sample.answer_T.tolist() == [False] * len(prompt) + [True] * (len(sample.ids_T) - len(prompt))
    assert store.holdout_prompts == [
        prompt_ids(job.target.tokenizer, [{"role": "user", "content": text}]) for text in prompts[-3:]
    ]
    assert sorted(path.name for path in store.folder.iterdir() if "shard" not in path.name) == [
        "holdout.json",
        "lent.safetensors",
        "manifest.json",
        "plan.json",
        "prompts.jsonl",
    ]


def test_fp8_features_are_those_of_float32_rounded_once(tmp_path: Path) -> None:
    exact, rounded = (prepare(make_job(tmp_path / name, feature_dtype=name)) for name in ("float32", "fp8"))
    assert rounded.manifest.facts["dtype"] == "float8_e4m3fn"
    for index in range(len(exact)):
        true_TD, read_TD = exact[index].feature_TD, rounded[index].feature_TD
        gap_TD = (read_TD - true_TD).abs() / true_TD.abs().amax(1, keepdim=True)
        assert 0 < gap_TD.max() <= 1 / 28 + 1e-6, "half a step of the topmost values, 16 of 448"


def test_every_stage_of_progress_ends(tmp_path: Path) -> None:
    calls = collections.defaultdict(list)
    prepare(make_job(tmp_path), lambda stage, done, total, numbers: calls[stage].append((done, total)))
    assert list(calls) == ["prompts", "answers"], "the features come with the answers"
    for stage, steps in calls.items():
        assert steps[-1] == (16, 16), stage
        assert sum(done == total for done, total in steps) == 1, stage


def test_an_interruption_at_any_report_of_progress_changes_nothing(
    tmp_path: Path, whole: dict[str, bytes], calls: int
) -> None:
    """One run is broken off again and again, at drawn moments, until it gets through."""
    draw, breaks = random.Random(0), 0
    while True:
        try:
            store = prepare(make_job(tmp_path), interrupt_at(draw.randrange(1, calls // 2)))
        except InterruptedHereError:
            breaks += 1
            assert not (tmp_path / "data").exists()
            assert breaks < 200
        else:
            break
    assert breaks >= 3
    assert contents(store.folder) == whole


@pytest.mark.parametrize(
    ("name", "call"),
    [("write_shard", 1), ("write_shard", 2), ("_finish", 1), ("_finish", 2), ("_seal", 1), ("seal", 1)],
)
def test_an_interruption_between_any_two_steps_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes], name: str, call: int
) -> None:
    """Just after a shard's file, its note, or the manifest is written; finished shards are not made again."""
    step, calls = getattr(module, name), []

    def breaking(*arguments, **options):
        found = step(*arguments, **options)
        calls.append(arguments)
        if len(calls) == call:
            raise InterruptedHereError
        return found

    monkeypatch.setattr(module, name, breaking)
    with pytest.raises(InterruptedHereError):
        prepare(make_job(tmp_path))
    monkeypatch.undo()
    made = []
    monkeypatch.setattr(module, "answer", lambda *rest, answer=module.answer: made.append(rest) or answer(*rest))
    store = prepare(make_job(tmp_path))
    assert contents(store.folder) == whole
    finished = {"write_shard": call - 1, "_finish": call}.get(name, len(store.manifest.facts["shards"]))
    assert len(made) == len(store.manifest.facts["shards"]) - finished


def test_rounds_of_prompts_that_were_finished_are_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coral_core.data.written.ROUND", 5)
    written, write = [], PromptWriter.write
    monkeypatch.setattr(PromptWriter, "write", lambda *given: written.append(given) or write(*given))
    whole = contents(prepare(make_job(tmp_path / "whole")).folder)
    rounds = len(written)
    with pytest.raises(InterruptedHereError):
        prepare(make_job(tmp_path), interrupt_at(40))
    saved = len(list((tmp_path / ".data.partial").glob("self-*.json")))
    assert saved >= 2
    written.clear()
    assert contents(prepare(make_job(tmp_path)).folder) == whole
    assert len(written) == rounds - saved > 0


def test_a_prompt_of_no_use_is_written_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target writes as many as are wanted, and one of them is too long with the template around it."""
    measure, refused = Fit.measure, []

    def strict(fit: Fit, dialogue: Dialogue) -> tuple[Dialogue, int]:
        if not refused:
            refused.append(dialogue)
            raise UnusableError("too long")
        return measure(fit, dialogue)

    monkeypatch.setattr(Fit, "measure", strict)
    store = prepare(make_job(tmp_path))
    assert refused and store.manifest.facts["dialogues"] == 16


def test_keys_that_are_gone_leave_what_was_made_with_them_finished(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    was = {key: value for key, value in (job.sections["data"] | REMOVED["data"]).items() if key not in INDIFFERENT}
    assert job.fingerprint({}) == fingerprint({"recipe": {"seed": 0, "data": was}, "inputs": {}})
    folder = prepare(job).folder
    manifest = Manifest.read(folder, "data", "")
    old = {**manifest.recipe, "data": manifest.recipe["data"] | REMOVED["data"]}
    dataclasses.replace(manifest, recipe=old).write(folder)
    assert standing(job).store is not None
    old["data"] = old["data"] | {"temperature": 0.5}
    dataclasses.replace(manifest, recipe=old, fingerprint="another").write(folder)
    assert standing(job).changed == ("data.temperature was 0.5, is 1.0",)


KILLED = """
import sys
from pathlib import Path
from coral_core.data import plan
from coral_core.data.stage import prepare
from coral_core.processes import part
from tests.data.helpers import make_job
import torch
torch.set_num_threads(1)
def progress(stage, done, total, numbers):
    sys.stdout.write(stage + "\\n")
    sys.stdout.flush()
plan.SHARD_TOKENS = 200
prepare(make_job(Path(sys.argv[1])), progress)
part()
"""


def start_ranks(folder: Path, processes: int) -> list[subprocess.Popen]:
    """As many processes as `accelerate launch` would start."""
    return start_together([sys.executable, "-c", KILLED, str(folder)], processes, stdout=subprocess.PIPE)


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_several_processes_make_one_store_the_same_as_one(
    tmp_path: Path, whole: dict[str, bytes], killed: bool
) -> None:
    """Each makes shards of its own, when two others were killed on the way too."""
    if killed:
        others = start_ranks(tmp_path, 2)
        out = others[0].stdout
        assert out is not None
        while b"features" not in out.readline():
            pass
        for process in others:
            process.kill()
            process.communicate()
        assert (tmp_path / ".data.partial").exists()
    running = start_ranks(tmp_path, 2)
    assert exit_codes(running) == [0, 0]
    told = [process.communicate()[0].decode() for process in running]
    assert ("answers" in told[0], told[1]) == (True, ""), "only the main process says how far it is"
    assert contents(tmp_path / "data") == whole


def killed_after(folder: Path, calls: int) -> bool:
    """Run prepare in a process of its own and kill -9 it after so many reports; whether it was still running."""
    here, there = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=prepare_telling, args=(folder, there))
    process.start()
    there.close()
    with contextlib.suppress(EOFError):
        for _ in range(calls):
            here.recv()
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_kill_9_twenty_times_changes_nothing(tmp_path: Path, whole: dict[str, bytes], calls: int) -> None:
    """At drawn moments, each time going on with what the one before had left; whatever was published is whole."""
    draw, killed = random.Random(1), 0
    while killed < 20:
        killed += killed_after(tmp_path, draw.randrange(1, calls // 4))
        if (tmp_path / "data").exists():
            assert contents(tmp_path / "data") == whole
            shutil.rmtree(tmp_path / "data")
    assert contents(prepare(make_job(tmp_path)).folder) == whole


def test_a_smaller_batch_may_go_on_where_a_larger_one_broke_off(
    tmp_path: Path, whole: dict[str, bytes], calls: int
) -> None:
    with pytest.raises(InterruptedHereError):
        prepare(make_job(tmp_path), interrupt_at(calls - 3))
    finished = sorted(path.name for path in (tmp_path / ".data.partial").glob("shard-*.safetensors"))
    assert finished
    job = make_job(tmp_path, batch_size=2)
    store = prepare(job)
    assert {name: contents(store.folder)[name] for name in finished} == {name: whole[name] for name in finished}
    assert standing(make_job(tmp_path)).store is not None


def test_a_finished_store_is_known_again_and_a_changed_recipe_is_named(tmp_path: Path) -> None:
    assert standing(make_job(tmp_path)).store is None
    prepare(make_job(tmp_path))
    assert standing(make_job(tmp_path)).store is not None
    changed = standing(make_job(tmp_path, max_new_tokens=9, seed=1))
    assert changed.store is None
    assert changed.changed == ("seed was 0, is 1", "data.max_new_tokens was 12, is 9")
    other = standing(make_job(tmp_path, make_target(CHATML, seed=1)))
    assert other.changed == ("the target's weights or chat template changed",)


def test_the_old_store_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    old = prepare(make_job(tmp_path)).manifest.fingerprint
    with pytest.raises(InterruptedHereError):
        prepare(make_job(tmp_path, max_samples=12), interrupt_at(20))
    assert standing(make_job(tmp_path)).store is not None
    store = prepare(make_job(tmp_path, max_samples=12))
    assert store.manifest.fingerprint != old
    assert len(store) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_content_of_the_prompt_file_counts_not_its_name(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": f"q{number}"} for number in range(9)])
    prepare(make_job(tmp_path, prompts=path, max_samples=9))
    assert standing(make_job(tmp_path, prompts=path, max_samples=9)).store is not None
    write_lines(path, [{"prompt": f"r{number}"} for number in range(9)])
    assert standing(make_job(tmp_path, prompts=path, max_samples=9)).changed == ("the prompt file's content changed",)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "lent.safetensors", "holdout.json"])
def test_only_what_is_damaged_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes], name: str
) -> None:
    folder = prepare(make_job(tmp_path)).folder
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(bytes(content))
    found = standing(make_job(tmp_path))
    assert (found.store, found.damaged) == (None, (name,))
    made = []
    monkeypatch.setattr(module, "answer", lambda *rest, answer=module.answer: made.append(rest) or answer(*rest))
    store = prepare(make_job(tmp_path))
    assert len(made) == (1 if "shard" in name else 0)
    assert contents(store.folder) == whole
    assert store.manifest.damaged(store.folder) == []


@pytest.mark.parametrize("damage", [None, "shard-00001.safetensors", "prompts.jsonl"])
def test_more_dialogues_go_on_from_those_that_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str | None
) -> None:
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": f"what is {number}?"} for number in range(60)])
    more = {"prompts": path, "max_samples": 30, "holdout": 4}
    fresh = contents(prepare(make_job(tmp_path / "fresh", **more)).folder)
    old = prepare(make_job(tmp_path, prompts=path, max_samples=18))
    shared = old.manifest.facts["shards"][:-1]  # the last one is not full
    assert len(shared) >= 3
    if damage:
        (old.folder / damage).write_bytes(b"")
    found = standing(make_job(tmp_path, **more))
    assert (found.store, found.count, found.words) == (None, True, False)
    assert found.changed == ("data.max_samples was 18, is 30", "data.holdout was 3, is 4")
    made = []
    monkeypatch.setattr(module, "answer", lambda *rest, answer=module.answer: made.append(rest) or answer(*rest))
    store = prepare(make_job(tmp_path, **more))
    assert contents(store.folder) == fresh
    kept = {None: len(shared), "prompts.jsonl": 0}.get(damage, len(shared) - 1)
    assert len(made) == len(store.manifest.facts["shards"]) - kept
    assert not standing(make_job(tmp_path, **more | {"seed": 1})).count


def test_auto_goes_on_with_data_of_another_dtype_and_a_named_dtype_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a machine made them that is faster in bfloat16."""
    target = make_target(layers=4)

    def job(**data: Any) -> Job:
        return make_job(tmp_path, target, **data)

    made = prepare(job())
    inputs = made.manifest.inputs | {"target_dtype": "bfloat16"}
    dataclasses.replace(made.manifest, inputs=inputs, fingerprint=job().fingerprint(inputs)).write(made.folder)
    whole = contents(made.folder)
    assert standing(job()).store is not None
    assert standing(job(max_samples=18)).count
    assert standing(job(shape="eagle3")).words
    named = dataclasses.replace(job().recipe, target=dataclasses.replace(job().recipe.target, dtype="float32"))
    found = standing(dataclasses.replace(job(), recipe=named))
    assert (found.store, found.changed) == (None, ("the target's dtype was bfloat16, is float32",))
    (made.folder / "shard-00001.safetensors").write_bytes(b"")
    answered = []
    monkeypatch.setattr(module, "answer", lambda *rest, answer=module.answer: answered.append(rest) or answer(*rest))
    assert contents(prepare(job()).folder) == whole
    assert len(answered) == 1


def test_more_of_a_stream_are_those_of_a_fresh_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub dataset is read only as far as it must be, so that a larger number draws other dialogues from the start."""
    rows = [(f"row {number}", {"prompt": f"what is {number:03}?"}) for number in range(99)]
    monkeypatch.setattr(plan, "open_source", lambda name, seed: Source(rows, ordered=False))
    more = {"prompts": "owner/name", "max_samples": 30}
    fresh = contents(prepare(make_job(tmp_path / "fresh", **more)).folder)
    prepare(make_job(tmp_path, prompts="owner/name", max_samples=18))
    assert standing(make_job(tmp_path, **more)).count
    assert contents(prepare(make_job(tmp_path, **more)).folder) == fresh


def test_fewer_dialogues_keep_what_is_still_learnt_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": f"what is {number}?"} for number in range(60)])
    fewer = {"prompts": path, "max_samples": 16, "holdout": 3}
    fresh = prepare(make_job(tmp_path / "fresh", **fewer))
    prepare(make_job(tmp_path, prompts=path, max_samples=30))
    made = []
    monkeypatch.setattr(module, "answer", lambda *rest, answer=module.answer: made.append(rest) or answer(*rest))
    store = prepare(make_job(tmp_path, **fewer))
    assert contents(store.folder) == contents(fresh.folder)
    learnt_from = [shard for shard in store.manifest.facts["shards"] if not shard["holdout_samples"]]
    assert len(made) == len(store.manifest.facts["shards"]) - len(learnt_from)


def test_a_disk_without_room_is_refused_before_the_first_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    calls = []
    with pytest.raises(ArtifactError, match=r"takes up to 81\.4 MB .* 0\.1 MB free\. Lower data\.max_samples"):
        prepare(make_job(tmp_path, max_samples=50_000), lambda *call: calls.append(call))
    assert calls == []
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "q" * number} for number in range(1, 100)])
    with pytest.raises(ArtifactError, match="its disk has"):
        prepare(make_job(tmp_path, prompts=path, max_samples=99))
    with pytest.raises(ArtifactError, match="its disk has"):
        estimate(make_job(tmp_path, max_samples=50_000))
