"""The strict loader: every mistake becomes one line that names the place and the remedy."""

import dataclasses
from pathlib import Path

import pytest

from coral_core import embedded
from coral_core.artifacts import fingerprint
from coral_core.errors import RecipeError
from coral_core.recipe.loader import dump_yaml, load_recipe, section_fingerprint, to_mapping
from coral_core.recipe.schema import ADDED, PRESETS, REMOVED, DecodeSpec, Recipe


@pytest.fixture
def write(tmp_path: Path):
    """Write a recipe file and return its path."""

    def write(text: str) -> Path:
        path = tmp_path / "my.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path: Path | None, *overrides: str) -> str:
    """The message of the RecipeError, which must be one line."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("temperature", [-1.0, float("inf"), float("nan")])
def test_a_recipe_made_in_a_program_holds_no_nonsense(temperature):
    with pytest.raises(RecipeError, match="decode.temperature is .*; it must be a finite number, at least 0"):
        DecodeSpec(temperature=temperature)


def test_no_recipe_is_the_run_that_made_the_embedded_drafter():
    assert load_recipe(None, []) == load_recipe(embedded.RECIPE, [])
    assert load_recipe(None, ["data.max_samples=9", "data.holdout=1"]).data.max_samples == 9


def test_values_are_read_by_the_type_of_their_field(write):
    """PyYAML reads `3e-5` as text and `no` as False; both are plain values to whoever writes them."""
    recipe = load_recipe(
        write("name: 2024\ntrain:\n  learning_rate: 3e-5\n  precision: no\n  steps: 1_000\n  feature_noise: 1\n"), []
    )
    assert recipe.name == "2024"
    assert recipe.train.learning_rate == 3e-5
    assert recipe.train.precision == "no"
    assert recipe.train.steps == 1000
    assert type(recipe.train.feature_noise) is float


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train.steps=true", "train.steps is 'true'; it must be a whole number"),
        ("train.steps=3.5", "train.steps is '3.5'; it must be a whole number"),
        ("train.steps=1e3", "train.steps is '1e3'; it must be a whole number, such as 1000"),
        ('train.steps="3"', "train.steps is the text '3'; write it without quotes"),
        ("train.learning_rate=fast", "train.learning_rate is 'fast'; it must be a number"),
        ("train.learning_rate=true", "train.learning_rate is 'true'; it must be a number"),
        ("train.learning_rate=nan", "train.learning_rate is 'nan'; it must be a number"),
        ("train.learning_rate=.inf", "train.learning_rate is '.inf'; it must be a number"),
        ("train.preset=medusa", "train.preset is 'medusa'; it must be one of quick, drawn, coral, hass, eagle2, "),
        ("target.trust_remote_code=1", "target.trust_remote_code is '1'; it must be true or false"),
        ("data.prompts=", "data.prompts has no value"),
        ("data.prompts=~", "data.prompts has no value"),
        ("train.steps=[1, 2]", "train.steps must be one value, not a list"),
        ("train.steps=[1", "not valid YAML"),
        ("train=3", "train is a section; override one of its keys, such as train.preset="),
        ("train.steps", "'train.steps' is not an override; write section.key=value"),
        ("=3", "'=3' is not an override"),
    ],
)
def test_a_wrong_value_names_key_and_rule(line, message):
    assert message in refusal(None, line)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("train.stpes", "did you mean 'train.steps'?"),
        ("train.learning-rate", "did you mean 'train.learning_rate'?"),
        ("steps", "did you mean 'train.steps'?"),
        ("train.model", "did you mean 'target.model'?"),
        ("trian.steps", "did you mean 'train.steps'?"),
        ("decoed.max_new_tokens", "did you mean 'decode.max_new_tokens'?"),
        ("data.bach_size", "did you mean 'data.batch_size'?"),
        ("max_new_tokens", "did you mean 'data.max_new_tokens' or 'decode.max_new_tokens'?"),
        ("taget", "did you mean 'target'?"),
        ("head.zzzz", "the keys of head are kind, groups"),
        ("zzzz", "the keys of a recipe are name, seed, target"),
        ("train.steps.more", "unknown key 'train.steps.more'"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, hint):
    message = refusal(None, f"{key}=1")
    assert f"unknown key '{key}'" in message
    assert hint in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\ntrain:\n  stpes: 3\n", "my.yaml, line 3: unknown key 'train.stpes'; did you mean 'train.steps'?"),
        ("name: x\ntrain: 3\n", "my.yaml, line 2: 'train' is a section"),
        ("train:\n", "my.yaml, line 1: 'train' is a section"),
        ("train: [1]\n", "my.yaml, line 1: 'train' is a section"),
        ("train:\n  steps: {a: 1}\n", "my.yaml, line 2: train.steps must be one value"),
        ("train:\n  steps: 3\n  steps: 4\n", "my.yaml, line 3: key 'train.steps' is written twice"),
        ("name: x\n? [a]\n: 3\n", "my.yaml, line 2: a key must be a word"),
        ("name: x\n  seed: : 3\n", "my.yaml, line 2: not valid YAML"),
        ("name: x\n\tseed: 3\n", "my.yaml, line 2: not valid YAML"),
        ("name: x\n---\nname: y\n", "my.yaml, line 2: not valid YAML"),
        ("a: &a {b: *a}\n", "my.yaml, line 1: unknown key 'a'"),
        ("train: &a\n  steps: *a\n", "my.yaml, line 2: train.steps must be one value"),
        ("", "my.yaml is empty; write at least `name: my-run`"),
        ("# nothing\n", "my.yaml is empty"),
        ("- name\n", "my.yaml is not a recipe: it must be lines of `key: value`"),
        ("just words\n", "my.yaml is not a recipe"),
        ("name: \x07\n", "my.yaml: not valid YAML"),
        ("train:\n  steps: 0\n", "train.steps is 0; it must be at least 1"),
        ("name: ../up\n", "name is '../up'; it must be letters"),
        ("name: ''\n", "name is ''; it must be letters"),
    ],
)
def test_a_bad_file_is_one_line_with_the_place(write, text, message):
    assert message in refusal(write(text))


def test_a_missing_file_names_a_near_one(tmp_path, write):
    write("name: x\n")
    message = refusal(tmp_path / "mx.yaml")
    assert f"no recipe file {tmp_path / 'mx.yaml'}; did you mean {tmp_path / 'my.yaml'}? Write it" in message
    assert "nothing-like-it.yaml. Write it" in refusal(tmp_path / "nothing-like-it.yaml")


def test_names_that_share_only_the_ending_are_not_near(tmp_path, write, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("name: x\n").rename(tmp_path / "pico.yaml")
    assert "no recipe file nosuch.yaml. Write it" in refusal(Path("nosuch.yaml"))


def test_a_folder_and_a_binary_are_refused(tmp_path):
    assert "is a folder; give the recipe file in it" in refusal(tmp_path)
    binary = tmp_path / "model.safetensors"
    binary.write_bytes(b"\xff\xfe\x00\x9f")
    assert "is not text" in refusal(binary)


def test_an_unreadable_file_is_refused(write, monkeypatch):
    """Simulated: the tests may run as root, whom no permission stops."""

    def denied(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    path = write("name: x\n")
    monkeypatch.setattr(Path, "read_text", denied)
    assert f"cannot read the recipe {path}: Permission denied" in refusal(path)


def test_the_preset_fills_only_what_nobody_wrote(write):
    eagle2 = load_recipe(None, ["train.preset=eagle2"]).train
    assert {key: getattr(eagle2, key) for key in PRESETS["eagle2"]} == PRESETS["eagle2"]
    path = write("train:\n  preset: hass\n  unroll_steps: 5\n")
    assert (load_recipe(path, []).train.unroll_steps, load_recipe(path, []).train.csra_weight) == (5, 0.0)
    assert load_recipe(path, ["train.unroll_steps=2"]).train.unroll_steps == 2
    assert load_recipe(path, ["train.preset=coral"]).train.csra_weight == PRESETS["coral"]["csra_weight"]


def test_the_default_preset_is_the_default_values(write):
    """Else a recipe with no train section would differ from one that names the preset."""
    train = Recipe().train
    assert {key: getattr(train, key) for key in PRESETS[train.preset]} == PRESETS[train.preset]
    said = write(f"name: mine\ntrain:\n  preset: {train.preset}\n")
    assert load_recipe(said, []).train == load_recipe(write("name: mine\n"), []).train == train


@pytest.mark.parametrize("preset", ["eagle2", "hass", "coral", "quick", "drawn"])
def test_presets_on_eagle_2s_shape_mean_what_they_meant(write, preset):
    """What such a preset does not set was the schema's default, until that became another shape's."""
    train = load_recipe(write(f"name: mine\ntrain:\n  preset: {preset}\n"), []).train
    assert (train.shape, train.feature_noise, train.through_steps, train.step_decay) == ("eagle2", 0.2, False, 1.0)
    assert (train.regression_weight, train.distill_weight) == (1.0, 0.1)


@pytest.mark.parametrize("before", ["eagle2", "drawn", "coral3.1"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_that_is_said_over_a_runs_own_recipe_is_that_preset(write, before, preset):
    """There every key is written; what the run's preset did not decide stays."""
    path = write(dump_yaml(load_recipe(write(f"name: mine\ntrain:\n  preset: {before}\n  steps: 7\n"), [])))
    fresh = load_recipe(write(f"name: mine\ntrain:\n  preset: {preset}\n  steps: 7\n"), [])
    path = write(dump_yaml(load_recipe(write(f"name: mine\ntrain:\n  preset: {before}\n  steps: 7\n"), [])))
    assert load_recipe(path, [f"train.preset={preset}"]) == fresh
    noisy = write(f"name: mine\ntrain:\n  preset: {before}\n  csra_weight: 0.7\n  feature_noise: 0.02\n")
    assert load_recipe(noisy, ["train.preset=quick"]).train.feature_noise == 0.02


def test_the_last_override_wins(write):
    recipe = load_recipe(write("seed: 1\n"), ["seed=2", "seed=3", "data.prompts=a=b.jsonl"])
    assert (recipe.seed, recipe.data.prompts) == (3, "a=b.jsonl")


@pytest.mark.parametrize("overrides", [[], ["train.preset=eagle2", "train.topk_weight=0.5", "name=123", "seed=-1"]])
def test_a_dumped_recipe_reads_back_equal(write, overrides):
    recipe = load_recipe(None, overrides)
    assert load_recipe(write(dump_yaml(recipe)), []) == recipe


def test_every_key_is_dumped():
    mapping = to_mapping(Recipe())
    assert set(mapping) == {field.name for field in dataclasses.fields(Recipe)}
    for line in ("learning_rate:", "csra_temperature: 0.2", "draft_depth:"):
        assert line in dump_yaml(Recipe())


def test_a_fingerprint_depends_on_what_is_named_and_nothing_else():
    def of(*overrides: str, data: str = "d") -> str:
        return section_fingerprint(load_recipe(None, list(overrides)), "seed", "train", data=data)

    assert of() == of("decode.draft_depth=3", "name=other")
    assert len({of(), of("train.steps=7"), of("seed=7"), of(data="e")}) == 4


def test_a_key_that_was_added_later_leaves_old_fingerprints_as_they_were():
    """A run that was made before `train.candidates` was a key is finished today too, with the whole vocabulary."""
    recipe = load_recipe(None, ["train.preset=coral"])
    train = {key: value for key, value in to_mapping(recipe)["train"].items() if key not in ADDED["train"]}
    train |= REMOVED["train"]
    assert section_fingerprint(recipe, "train") == fingerprint({"recipe": {"train": train}, "inputs": {}})
    others = [load_recipe(None, [f"train.{pair}"]) for pair in ("candidates=9", "unroll_growth=0.5")]
    assert len({section_fingerprint(other, "train") for other in (recipe, *others)}) == 3


def test_a_recipe_without_a_name_takes_its_files(tmp_path):
    path = tmp_path / "my model v2.1.yaml"
    path.write_text("seed: 1\n", encoding="utf-8")
    assert load_recipe(path, []).name == "my-model-v2.1"
    assert load_recipe(path, ["name=other"]).name == "other"


@pytest.mark.parametrize("overrides", [["target.model=org/model"], ["target.model=org/model", "name=pico"]])
def test_only_picos_own_run_is_named_pico(overrides):
    """Another model's data in runs/pico would stand where pico's own are looked for."""
    with pytest.raises(RecipeError, match="named 'pico'.*name=mine"):
        load_recipe(None, overrides)
    assert load_recipe(None, ["target.model=org/model", "name=mine"]).name == "mine"


def test_whose_settings_a_run_beside_picos_has_is_said(write):
    """pico's own, with its rate and its prompts, where no recipe is named; else the file's."""
    said = "Write a recipe of your own (docs/your-model.md), or give name=mine to use pico's settings"
    assert said in refusal(None, "target.model=org/model")
    message = refusal(write("name: pico\ntarget:\n  model: org/model\n"))
    assert message.endswith("Give the run a name of its own, such as name=mine")


def test_a_recipe_of_before_may_say_what_coral_now_always_does(write):
    """A run's recipe has every default written out; what it made is still known as finished."""
    lines = {
        section: "".join(f"  {key}: {str(value).lower()}\n" for key, value in gone.items())
        for section, gone in REMOVED.items()
    }
    text = "name: mine\n" + "".join(f"{section}:\n{keys}" for section, keys in lines.items())
    old = load_recipe(write(text), ["train.csra_negatives=256"])
    assert old == load_recipe(write("name: mine\n"), [])
    for section, gone in REMOVED.items():
        was, added = to_mapping(old)[section] | gone, ADDED.get(section, {})
        was = {key: value for key, value in was.items() if key not in added or value != added[key]}
        assert section_fingerprint(old, section) == fingerprint({"recipe": {section: was}, "inputs": {}})


@pytest.mark.parametrize("value", ["query", "[1]"])
def test_a_key_that_is_gone_says_what_to_do(write, value):
    with pytest.raises(RecipeError, match="line 3: train.csra_gradient is no longer a key.*'both'. Leave the key out"):
        load_recipe(write(f"name: mine\ntrain:\n  csra_gradient: {value}\n"), [])
    with pytest.raises(RecipeError, match="csra_negatives is no longer a key; coral always takes 256"):
        load_recipe(None, ["train.csra_negatives=64"])


def test_a_key_that_is_gone_and_decided_no_result_may_have_any_value(write):
    """Every run that was made with pico's recipe says `draft_confidence: 0.05`, and is still to be evaluated."""
    old = write("name: mine\ndata:\n  endpoint_requests: 8\n  shard_tokens: 32768\ndecode:\n  draft_confidence: 0.05\n")
    assert load_recipe(old, ["decode.draft_confidence=0.03"]) == load_recipe(write("name: mine\n"), [])
