"""The train stage and `coral train`: what is published, what is refused, and with which words."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from coral_cli.main import app
from coral_core.artifacts import MANIFEST, OWN_SUM, Manifest
from coral_core.drafter.load import load_drafter
from coral_core.errors import ArtifactError
from coral_core.kernels import precision
from coral_core.recipe.schema import ADDED, PRESETS, REMOVED, Recipe
from coral_core.training import stage
from coral_core.training.stage import train_drafter
from tests.training.helpers import tiny_spec, tiny_store

RECIPE = Recipe(name="tiny", train=tiny_spec(steps=4, checkpoint_every=2))
OVERRIDES = ["name=tiny", "train.steps=4", "train.batch_size=4", "train.checkpoint_every=2"]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def run(tmp_path):
    tiny_store(tmp_path / "tiny" / "data", taps=True)
    return tmp_path / "tiny"


def say_the_data_was_made_with(run, **sections):
    dataclasses.replace(Manifest.read(run / "data", "data", ""), recipe=sections).write(run / "data")


def coral(*arguments):
    return CliRunner().invoke(app, ["train", *arguments])


def test_it_publishes_a_drafter_that_says_where_it_came_from(run):
    manifest, trained = train_drafter(RECIPE, run)
    assert trained
    assert sorted(path.name for path in (run / "drafter").iterdir()) == ["config.json", MANIFEST, "model.safetensors"]
    assert Manifest.read(run / "drafter", "drafter", "coral train") == manifest
    assert manifest.inputs == {"target": "t" * 16, "data": "f" * 16}
    assert manifest.recipe["train"]["steps"] == 4
    assert manifest.facts["last"]["step"] == 4
    assert load_drafter(run / "drafter").config.hidden_size == 32
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [4]


def test_a_line_of_the_log_that_was_cut_off_stays_alone(run):
    (run / "log.jsonl").write_text('{"step": 1}\n{"st')
    train_drafter(RECIPE, run)
    first, cut, last = (run / "log.jsonl").read_text().splitlines()
    assert (first, cut) == ('{"step": 1}', '{"st') and json.loads(last)["step"] == 4


def test_a_finished_drafter_is_not_trained_again_until_the_recipe_changes(run, monkeypatch):
    first, _ = train_drafter(RECIPE, run)
    other = dataclasses.replace(RECIPE, seed=1)
    again, trained = train_drafter(other, run)
    assert trained
    assert again.fingerprint != first.fingerprint
    monkeypatch.setattr(stage, "train", None)
    assert train_drafter(other, run) == (again, False)


def test_seeds_of_a_training_share_their_data(run):
    say_the_data_was_made_with(run, seed=0, data={"max_samples": RECIPE.data.max_samples})
    first, second = (train_drafter(dataclasses.replace(RECIPE, seed=seed), run)[0] for seed in (0, 1))
    assert first.facts["last"]["loss"] != second.facts["last"]["loss"]


def test_an_interrupted_training_goes_on_and_nothing_half_done_is_published(run):
    def interrupt(_stage, done, _total, _numbers):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_drafter(RECIPE, run, interrupt)
    assert not (run / "drafter").exists()
    seen = []
    train_drafter(RECIPE, run, lambda _stage, done, _total, _numbers: seen.append(done))
    assert seen == [2, 3, 4]


def test_an_unfinished_training_of_another_recipe_is_kept_and_named(run):
    def interrupt(_stage, done, _total, _numbers):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_drafter(RECIPE, run, interrupt)
    changed = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, warmup_steps=4))
    with pytest.raises(
        ArtifactError, match=r"train.warmup_steps 3; this run has 4. Give train.warmup_steps its old value to go on, or"
    ):
        train_drafter(changed, run)
    assert (run / ".drafter.partial" / "checkpoints" / "latest").exists()


def test_the_best_is_told_by_one_decoding_and_an_unfinished_training_starts_from_one_drafter(run, tmp_path):
    """Scores with a deeper tree do not compare; a drafter that was trained anew is another start."""

    def interrupt(_stage, done, _total, _numbers):
        if done == 3:
            raise KeyboardInterrupt

    train_drafter(RECIPE, run)
    start = tmp_path / "start"
    (run / "drafter").rename(start)
    spec = dataclasses.replace(RECIPE.train, eval_every=2, init_from=str(start))
    recipe = dataclasses.replace(RECIPE, train=spec)
    with pytest.raises(KeyboardInterrupt):
        train_drafter(recipe, run, interrupt, lambda drafter: 1.0)
    deeper = dataclasses.replace(recipe, decode=dataclasses.replace(recipe.decode, draft_depth=3))
    with pytest.raises(ArtifactError, match=r"decode\.draft_depth \d+; this run has 3\. Give decode\.draft_depth"):
        train_drafter(deeper, run, measure=lambda drafter: 1.0)
    made = Manifest.read(start, "drafter", "")
    dataclasses.replace(made, fingerprint="e" * 16).write(start)
    with pytest.raises(ArtifactError, match=r"init_from \w+; this run has e{16}\. .* --restart"):
        train_drafter(recipe, run, measure=lambda drafter: 1.0)
    assert (run / ".drafter.partial" / "checkpoints" / "latest").exists()
    made.write(start)
    assert train_drafter(recipe, run, measure=lambda drafter: 1.0)[1]


def test_a_start_that_is_no_drafter_is_named_with_what_to_give(run):
    recipe = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, init_from="runs/typo"))
    with pytest.raises(
        ArtifactError, match=r"train\.init_from is runs/typo: no drafter in .*such as runs/NAME/drafter"
    ):
        train_drafter(recipe, run)


def test_what_an_earlier_version_began_or_finished_is_known(run):
    """Its recipe lacked some keys, and said others that are always so now: no key that differs in its meaning."""

    def interrupt(_stage, done, _total, _numbers):
        if done == 3:
            raise KeyboardInterrupt

    def of_before(train):
        return {key: value for key, value in train.items() if key not in ADDED["train"]} | REMOVED["train"]

    recipe = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, candidates=0, unroll_drawn=False))
    with pytest.raises(KeyboardInterrupt):
        train_drafter(recipe, run, interrupt)
    checkpoints = run / ".drafter.partial" / "checkpoints"
    path = checkpoints / (checkpoints / "latest").read_text().strip() / "state.json"
    state = json.loads(path.read_text())
    state["identity"]["train"] = of_before(state["identity"]["train"])
    path.write_text(json.dumps({key: value for key, value in state.items() if key != OWN_SUM}))
    seen = []
    drawn = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, unroll_drawn=True))
    with pytest.raises(ArtifactError, match=r"has train\.unroll_drawn False; this run has True\. Give train\.unroll"):
        train_drafter(drawn, run)
    manifest, _ = train_drafter(recipe, run, lambda _stage, done, _total, _numbers: seen.append(done))
    assert seen == [2, 3, 4]
    old = manifest.recipe | {"train": of_before(manifest.recipe["train"])}
    dataclasses.replace(manifest, recipe=old, fingerprint="another").write(run / "drafter")
    assert train_drafter(recipe, run)[1] is False


def test_data_of_another_recipe_are_refused_naming_the_key(run):
    say_the_data_was_made_with(run, target={"model": "pico"}, data={"max_length": 64, "batch_size": 1})
    with pytest.raises(
        ArtifactError, match=r"made with data.max_length=64; this recipe says data.max_length=512. Run cor"
    ):
        train_drafter(RECIPE, run)


def test_keys_that_do_not_change_the_data_may_change(run):
    say_the_data_was_made_with(
        run, target={"model": "pico", "device": "cuda", "dtype": "bfloat16"}, data={"batch_size": 1}
    )
    train_drafter(RECIPE, run)


def test_the_manifest_says_what_auto_was_and_auto_takes_it_on_another_machine(run, monkeypatch):
    from accelerate.state import AcceleratorState

    def trained(named, faster):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(precision, "bfloat16_is_faster", lambda: faster)
        manifest, done = train_drafter(
            dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, precision=named)), run
        )
        return manifest.recipe["train"]["precision"], done

    assert trained("auto", faster=True) == ("bf16", True)
    assert trained("auto", faster=False) == ("bf16", False)
    assert trained("bf16", faster=False) == ("bf16", False)
    assert trained("no", faster=True) == ("no", True)


def test_an_unfinished_training_goes_on_under_auto_where_that_is_the_same(run, monkeypatch):
    def interrupt(_stage, done, _total, _numbers):
        if done == 3:
            raise KeyboardInterrupt

    auto = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, precision="auto"))
    monkeypatch.setattr(precision, "bfloat16_is_faster", lambda: False)
    with pytest.raises(KeyboardInterrupt):
        train_drafter(RECIPE, run, interrupt)
    monkeypatch.setattr(precision, "bfloat16_is_faster", lambda: True)
    with pytest.raises(ArtifactError, match=r"train\.precision no; this run has bf16\. Give train\.precision its"):
        train_drafter(auto, run)
    monkeypatch.setattr(precision, "bfloat16_is_faster", lambda: False)
    seen = []
    train_drafter(auto, run, lambda _stage, done, _total, _numbers: seen.append(done))
    assert seen == [2, 3, 4]


def test_the_command_prints_a_summary_on_stdout_and_says_when_it_is_done_already(run):
    arguments = [*OVERRIDES, "--runs", str(run.parent)]
    first = coral(*arguments)
    assert first.exit_code == 0, first.output
    assert "| accuracy 1" in first.stdout
    assert "| tokens/s" in first.stdout
    assert "Next: coral group-head" in first.stderr
    second = coral(*arguments)
    assert second.exit_code == 0
    assert "is finished already" in second.stderr
    assert second.stdout == first.stdout


def test_the_command_names_prepare_data_when_there_is_no_data(tmp_path):
    result = coral("--runs", str(tmp_path))
    assert result.exit_code == 1
    assert "error: no data in" in result.stderr
    assert "Run: coral prepare-data" in result.stderr


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(run, preset):
    result = coral(*OVERRIDES, f"train.preset={preset}", "--runs", str(run.parent))
    assert result.exit_code == 0, result.output
    last = Manifest.read(run / "drafter", "drafter", "coral train").facts["last"]
    steps = PRESETS[preset]["unroll_steps"]
    seen = {step for step in range(1, steps + 2) if f"accuracy_{step}" in last}
    if PRESETS[preset]["unroll_drawn"]:  # the few updates of this training do not draw every number of passes
        assert seen and seen <= set(range(1, steps + 1))
    else:
        assert seen == set(range(1, steps + 1))
    assert ("csra" in last) == bool(PRESETS[preset]["csra_weight"])


def test_an_unfinished_training_of_another_recipe_is_dropped_on_request(run):
    def interrupt(_stage, done, _total, _numbers):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_drafter(RECIPE, run, interrupt)
    arguments = [*OVERRIDES, "train.warmup_steps=4", "--runs", str(run.parent)]
    refused = coral(*arguments)
    assert refused.exit_code == 1
    assert "Give train." in refused.stderr
    assert "to go on, or drop that training. Run: coral train name=tiny" in refused.stderr
    assert (run / ".drafter.partial" / "checkpoints" / "latest").exists()
    done = coral(*arguments, "--restart")
    assert done.exit_code == 0, done.stderr
    assert Manifest.read(run / "drafter", "drafter", "coral train").recipe["train"]["warmup_steps"] == 4
