"""The loop's promises: resume, accumulation, processes, when it stops."""

import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from coral_core.artifacts import first_difference
from coral_core.drafter.load import save_drafter
from coral_core.errors import ArtifactError, CoralError
from coral_core.kernels import precision
from coral_core.store.store import Store
from coral_core.training.checkpoint import Checkpoint, Checkpoints
from coral_core.training.loop import Reports, train
from coral_core.training.trainer import learning_rate, unroll_steps
from coral_core.training.unroll import feature_noise
from tests.together import ROOT, exit_codes, start_together
from tests.training.helpers import tiny_spec, tiny_store

RUNNER = (sys.executable, "-m", "tests.training.runner")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one state per process; each test begins without."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def run_train(store, work, **changes):
    lines = []
    drafter = train(tiny_spec(**changes), store, seed=5, work=work, reports=Reports(lines.append))
    return drafter.state_dict(), lines


def start(work, kill_after, changes=()):
    command = [*RUNNER, str(work), str(kill_after), *changes]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture
def one_thread():
    """As many as runner.py uses: the order of a sum is part of its bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_ten_steps_equal_five_steps_a_kill_and_five_steps_bit_for_bit(tmp_path, one_thread):
    store = tiny_store(tmp_path / "data")
    killed = start(tmp_path, kill_after=5, changes=["candidates=16", "unroll_drawn=true"])
    expected, _ = run_train(store, tmp_path / "whole", candidates=16, unroll_drawn=True)
    assert killed.wait(300) == -signal.SIGKILL
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000005\n"
    steps = []
    reports = Reports(lambda _: None, lambda *seen: steps.append(seen[1]))
    found = train(
        tiny_spec(candidates=16, unroll_drawn=True), store, seed=5, work=tmp_path, reports=reports
    ).state_dict()
    assert steps == [5, 6, 7, 8, 9, 10]
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_a_resumed_training_goes_on_behind_every_micro_batch_of_its_steps(tmp_path, one_thread):
    """With two micro-batches a step, five steps have consumed ten of them, and not five."""
    store = tiny_store(tmp_path / "data")
    whole, _ = run_train(store, tmp_path / "whole", accumulate=2, steps=8, checkpoint_every=5)
    interrupted = Reports(lambda _: None, lambda stage, step, *_: stop_at(step, 6))
    with pytest.raises(KeyboardInterrupt):
        train(tiny_spec(accumulate=2, steps=8, checkpoint_every=5), store, seed=5, work=tmp_path, reports=interrupted)
    found, _ = run_train(store, tmp_path, accumulate=2, steps=8, checkpoint_every=5)
    assert Checkpoints(tmp_path / "checkpoints", {})._state()["step"] == 5
    for name, weight in whole.items():
        assert torch.equal(found[name], weight), name


def stop_at(step, last):
    if step == last:
        raise KeyboardInterrupt


def test_every_micro_batch_has_noise_of_its_own(tmp_path, monkeypatch):
    """The same in every run, and another one in every micro-batch of every step."""
    store, seen = tiny_store(tmp_path / "data"), []

    def noise(batch, scale, generator, **kinds):
        drawn = feature_noise(batch, scale, generator, **kinds)
        seen.append(round(float(drawn[0, 0, 0] / drawn[0, 0, 1]), 4))  # the width depends on the sequence's length
        return drawn

    monkeypatch.setattr("coral_core.training.trainer.feature_noise", noise)
    for run in ("a", "b"):
        run_train(store, tmp_path / run, accumulate=2, steps=3, feature_noise=0.1)
    assert len(set(seen)) == 6
    assert seen[:6] == seen[6:]


def test_two_processes_equal_one_with_the_same_global_batch(tmp_path):
    """Two gloo processes with batches of 3, against one that accumulates two batches of 3."""
    store = tiny_store(tmp_path / "data")
    running = start_together([*RUNNER, str(tmp_path), "0", "batch_size=3"])
    expected, lines = run_train(store, tmp_path / "one", accumulate=2, batch_size=3)
    assert exit_codes(running) == [0, 0]
    for rank in range(2):
        for name, weight in load_file(tmp_path / f"weights-{rank}.safetensors").items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)
    (found,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for name in ("step", "loss", "regression", "topk", "csra", "accuracy_1", "grad_norm"):
        assert found[name] == pytest.approx(lines[0][name], rel=1e-4), name


def test_accumulating_two_batches_of_two_equals_a_batch_of_four(tmp_path):
    """The sum is divided by the rows of the whole step, not by each batch's: EAGLE and SpecForge differ here."""
    store = tiny_store(tmp_path / "data")
    whole, _ = run_train(store, tmp_path / "a", batch_size=4, feature_noise=0.0, steps=4)
    halves, _ = run_train(store, tmp_path / "b", batch_size=2, accumulate=2, feature_noise=0.0, steps=4)
    for name, weight in whole.items():
        torch.testing.assert_close(halves[name], weight, rtol=1e-4, atol=1e-5)


def test_it_learns_and_the_log_says_so(tmp_path):
    store = tiny_store(tmp_path / "data", samples=4)
    _, lines = run_train(store, tmp_path / "work", steps=60, feature_noise=0.0)
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert lines[-1]["accuracy_1"] > lines[0]["accuracy_1"]
    expected = {"stage", "step", "loss", "regression", "distill", "topk", "csra", "cosine", "accuracy_1", "accuracy_2"}
    expected |= {"accuracy_3", "grad_norm", "learning_rate", "tokens_per_s", "elapsed_s"}
    assert set(lines[0]) == expected
    json.dumps(lines)


def test_same_seed_same_drafter_another_seed_another(tmp_path):
    store = tiny_store(tmp_path / "data")
    seeds = [
        train(tiny_spec(steps=2), store, seed=s, work=tmp_path / f"{n}", reports=Reports(lambda _: None))
        for n, s in enumerate((1, 1, 2))
    ]
    weights = [drafter.fc.weight for drafter in seeds]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, precision, monkeypatch):
    store = tiny_store(tmp_path / "data")
    lent = store.lent()
    lent.embed_VD.fill_(math.nan)
    monkeypatch.setattr(Store, "lent", lambda _: lent)
    updates = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: updates.append(1))
    with pytest.raises(CoralError, match=r"step 1: the loss is nan .* nothing was updated. Lower train.learning_rate"):
        run_train(store, tmp_path / "work", precision=precision)
    assert not updates


def test_an_exploding_rate_stops_with_the_step(tmp_path):
    store = tiny_store(tmp_path / "data")
    with pytest.raises(CoralError, match=r"step \d+: the loss is"):
        run_train(store, tmp_path / "work", learning_rate=1e30, steps=200)


def test_bf16_trains_with_float32_weights_and_auto_is_it_where_it_is_faster(tmp_path, monkeypatch):
    store = tiny_store(tmp_path / "data")
    exact, _ = run_train(store, tmp_path / "a", steps=3)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    mixed, lines = run_train(store, tmp_path / "b", steps=3, precision="bf16")
    assert all(weight.dtype == torch.float32 for weight in mixed.values())
    assert math.isfinite(lines[-1]["loss"])
    for name, weight in exact.items():
        assert not torch.equal(mixed[name], weight)
        torch.testing.assert_close(mixed[name], weight, rtol=0, atol=2e-2)  # bf16 against float32: the policy's bound
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(precision, "bfloat16_is_faster", lambda: True)
    chosen, _ = run_train(store, tmp_path / "c", steps=3, precision="auto")
    assert all(torch.equal(chosen[name], weight) for name, weight in mixed.items())


def test_schedule_drawn():
    """Three steps of warm-up to the peak, then a cosine whose last step is at a tenth of it."""
    spec = tiny_spec(steps=8, warmup_steps=3, learning_rate=1.0)
    rates = [learning_rate(spec, step) for step in range(8)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 0.8682, 0.55, 0.2318, 0.1], abs=1e-4)


def test_the_passes_grow_in_equal_parts():
    """Three passes, growing over 6 of 8 steps: three steps with one, three with two, and two with all."""
    spec = tiny_spec(steps=8, unroll_steps=3, unroll_growth=0.75)
    assert [unroll_steps(spec, step, 0) for step in range(8)] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert [unroll_steps(tiny_spec(steps=3, unroll_steps=2), step, 0) for step in range(3)] == [2, 2, 2]


def test_drawn_passes_have_their_shares_and_a_seed_repeats_them():
    spec = tiny_spec(steps=4000, unroll_steps=3, unroll_drawn=True)
    drawn = [unroll_steps(spec, step, 5) for step in range(4000)]
    assert [drawn.count(passes) / 4000 for passes in (1, 2, 3)] == pytest.approx([0.4, 0.3, 0.3], abs=0.03)
    assert drawn == [unroll_steps(spec, step, 5) for step in range(4000)]
    assert drawn != [unroll_steps(spec, step, 6) for step in range(4000)]
    grown = [unroll_steps(tiny_spec(steps=8, unroll_growth=0.75, unroll_drawn=True), step, 5) for step in range(8)]
    assert grown[:3] == [1, 1, 1]
    assert max(grown[3:6]) <= 2


def test_a_pass_that_begins_between_two_lines_is_a_mean_over_its_own_steps(tmp_path):
    """A rate of almost nothing, and one batch for all: pass 2 says the same, from step 6 on or from the first."""
    store = tiny_store(tmp_path / "data", samples=4)
    keys = {"steps": 10, "batch_size": 4, "learning_rate": 1e-12, "feature_noise": 0.0, "unroll_steps": 2}
    _, (grown,) = run_train(store, tmp_path / "a", unroll_growth=0.5, **keys)
    _, (whole,) = run_train(store, tmp_path / "b", **keys)
    assert grown["accuracy_2"] == pytest.approx(whole["accuracy_2"])
    assert grown["cosine"] == pytest.approx(whole["cosine"] / 2, rel=1e-4)


def test_a_changed_recipe_is_refused_naming_the_key(tmp_path):
    store = tiny_store(tmp_path / "data")
    run_train(store, tmp_path / "work", steps=8)
    with pytest.raises(
        ArtifactError, match=r"train.learning_rate 0.003; this run has 0.001. Give train.learning_rate its"
    ):
        run_train(store, tmp_path / "work", steps=8, learning_rate=1e-3)


def test_first_difference_drawn():
    was = {"seed": 1, "train": {"steps": 5, "topk": 3}}
    assert first_difference(was, was) is None
    assert first_difference(was, {"seed": 1, "train": {"steps": 5, "topk": 4}}) == ("train.topk", 3, 4)
    assert first_difference(was, {"seed": 1, "train": {"steps": 5}}) == ("train.topk", 3, "absent")
    assert first_difference(was, {**was, "data": "a"}) == ("data", "absent", "a")


def a_checkpoint(step):
    return Checkpoint(
        step, {"fc.weight": torch.full((2,), float(step))}, {"fc.weight/step": torch.tensor(1.0)}, {"n": 1}
    )


def test_checkpoints_rotate_and_the_latest_is_read(tmp_path):
    checkpoints = Checkpoints(tmp_path, {"seed": 1})
    assert checkpoints.load() is None
    for step in (5, 10, 15):
        checkpoints.save(a_checkpoint(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000010", "step-00000015"]
    found = checkpoints.load()
    assert found.step == 15
    assert found.numbers == {"n": 1}
    torch.testing.assert_close(found.weights["fc.weight"], torch.tensor([15.0, 15.0]))


def test_a_checkpoint_cut_short_is_never_the_latest(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, {"seed": 1})
    checkpoints.save(a_checkpoint(5))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("coral_core.training.checkpoint.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(a_checkpoint(10))
    assert checkpoints.load().step == 5
    monkeypatch.undo()
    checkpoints.save(a_checkpoint(10))
    assert checkpoints.load().step == 10


def test_latest_never_names_a_checkpoint_that_is_not_there(tmp_path, monkeypatch):
    """Killed at any of the renames of a save: what latest names is whole."""
    checkpoints = Checkpoints(tmp_path, {"seed": 1})
    checkpoints.save(a_checkpoint(5))
    replace = os.replace
    for rename in range(4):
        calls = []

        def killed(old, new, calls=calls, rename=rename):
            calls.append(new)
            if len(calls) > rename:
                raise KeyboardInterrupt
            replace(old, new)

        monkeypatch.setattr(os, "replace", killed)
        try:
            checkpoints.save(a_checkpoint(10 + rename))
        except KeyboardInterrupt:
            monkeypatch.undo()
            assert (tmp_path / (tmp_path / "latest").read_text().strip()).exists()
            found = checkpoints.load()
            assert found is not None
            assert found.weights["fc.weight"][0] == found.step
    monkeypatch.undo()
    assert checkpoints.load().step == 13


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b""), lambda path: path.unlink(), flip_last_byte])
@pytest.mark.parametrize("file", ["state.json", "weights.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, file, damage):
    checkpoints = Checkpoints(tmp_path, {"seed": 1})
    for step in (5, 10):
        checkpoints.save(a_checkpoint(step))
    damage(tmp_path / "step-00000010" / file)
    assert checkpoints.load().step == 5
    damage(tmp_path / "step-00000005" / file)
    with pytest.raises(ArtifactError, match=r"step-00000010 is damaged: .*Run: coral train --restart"):
        checkpoints.load()


def test_a_best_drafter_with_a_flipped_byte_is_not_published(tmp_path):
    checkpoints = Checkpoints(tmp_path, {"seed": 1})
    checkpoints.save_best(5, 2.0, a_checkpoint(5).weights)
    assert checkpoints.best()[:2] == (5, 2.0)
    flip_last_byte(tmp_path / "best" / "weights.safetensors")
    with pytest.raises(ArtifactError, match=r"best is damaged: weights.safetensors has another .*--restart"):
        checkpoints.best()


def test_a_train_spec_field_is_part_of_the_identity(tmp_path):
    """Whatever is added to the recipe's train section later is compared too."""
    from coral_core.training.loop import identity

    spec = tiny_spec()
    store = tiny_store(tmp_path / "data")
    assert identity(spec, store, 0, 1)["train"].keys() == {field.name for field in dataclasses.fields(spec)}


def test_the_drafter_that_decoded_best_is_returned_also_after_a_kill(tmp_path):
    """Scores 1.5, 2.5, 2.0: the second wins, though the first run ends before the third."""
    store = tiny_store(tmp_path / "data", samples=14, holdout=8)
    scores, seen, lines = iter([1.5, 2.5, 2.0]), {}, []

    def measure(drafter):
        score = next(scores)
        seen[score] = drafter.fc.weight.clone()
        return score

    def interrupt(_stage, done, _total, _numbers):
        if done == 9:
            raise KeyboardInterrupt

    spec = tiny_spec(steps=12, eval_every=4, checkpoint_every=8)
    with pytest.raises(KeyboardInterrupt):
        train(spec, store, seed=5, work=tmp_path, reports=Reports(lines.append, interrupt, measure))
    drafter = train(spec, store, seed=5, work=tmp_path, reports=Reports(lines.append, measure=measure))
    assert torch.equal(drafter.fc.weight, seen[2.5])
    assert not torch.equal(seen[2.5], seen[2.0])
    measured = [(line["step"], line["tokens_per_round"]) for line in lines if line["stage"] == "acceptance"]
    assert measured == [(4, 1.5), (8, 2.5), (12, 2.0)]
    for line in lines:
        if line["stage"] == "acceptance":
            assert len(line["accuracy_by_depth"]) == len(line["accuracy_by_depth"][0]) == 5
            assert -1 <= line["held_out_cosine"] <= 1


def test_a_second_stage_starts_from_another_drafter(tmp_path):
    store = tiny_store(tmp_path / "data")
    spec = tiny_spec(steps=2)
    first = train(spec, store, seed=5, work=tmp_path / "a", reports=Reports(lambda _: None))
    save_drafter(first, tmp_path)
    slow = tiny_spec(steps=1, learning_rate=1e-12, init_from=str(tmp_path))
    second = train(slow, store, seed=9, work=tmp_path / "b", reports=Reports(lambda _: None))
    torch.testing.assert_close(second.fc.weight, first.fc.weight)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    with pytest.raises(ArtifactError, match=r"vocab_size 7, this target's drafter has \d+. Set another"):
        train(slow, store, seed=9, work=tmp_path / "c", reports=Reports(lambda _: None))


def test_a_tracker_is_told_the_numbers_of_the_log(tmp_path, monkeypatch):
    from accelerate import tracking
    from accelerate.utils import LoggerType

    told = []

    class Told(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "tensorboard", False, None

        def __init__(self, _run, **_):
            super().__init__()

        def store_init_configuration(self, values):
            told.append(values["steps"])

        def log(self, values, step, **_):
            told.append((step, values))

        def finish(self):
            told.append("finished")

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorboard" or find(name))
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Told)
    _, lines = run_train(tiny_store(tmp_path / "data"), tmp_path / "work", steps=2, tracker="tensorboard")
    numbers = [{key: value for key, value in line.items() if key not in ("stage", "step")} for line in lines]
    assert told == [2, *((line["step"], told) for line, told in zip(lines, numbers, strict=True)), "finished"]


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(CoralError, match="train.tracker=wandb is not installed. Run: pip install wandb"):
        run_train(tiny_store(tmp_path / "data"), tmp_path / "work", tracker="wandb")
