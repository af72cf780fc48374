"""`target.chat_template`: each name is the published format, letter for letter; one that is absent is told early."""

import shutil
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

from coral_cli.main import app
from coral_core import embedded
from coral_core.errors import DataError, TargetError
from coral_core.recipe.schema import TargetSpec
from coral_core.target.load import load_target
from coral_core.target.named_templates import choose, ends
from coral_core.target.target import Target
from coral_core.target.template import NAMED, encode, prompt_ids, user_turn
from tests.target.chat_templates import CHATML, LLAMA_2, TAGGED, VICUNA
from tests.target.test_template import DIALOGUE, FAMILIES, draw, make_tokenizer
from tests.tiny import SHAPE

PUBLISHED = {"chatml": ("ChatML", CHATML), "llama-2": ("Llama-2", LLAMA_2), "vicuna": ("Vicuna", VICUNA)}
SYSTEM = {"role": "system", "content": "Be brief."}


def bare(family: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with a family's special tokens, and no template."""
    tokenizer = make_tokenizer(FAMILIES[family])
    tokenizer.chat_template, tokenizer.name_or_path = None, "some/base"
    return tokenizer


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize("opening", [[], [SYSTEM]], ids=["", "system"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_named_template_is_the_published_format(name: str, opening: list[dict[str, str]], turns: int) -> None:
    family, published = PUBLISHED[name]
    tokenizer = bare(family)
    choose(tokenizer, name)
    for begun in (False, True):
        options = {"conversation": [*opening, *DIALOGUE[:turns]], "tokenize": False, "add_generation_prompt": begun}
        assert tokenizer.apply_chat_template(**options) == tokenizer.apply_chat_template(
            **options, chat_template=published
        )


@pytest.mark.parametrize(("name", "end"), [("chatml", "<|im_end|>"), ("llama-2", "</s>"), ("vicuna", "</s>")])
def test_the_token_that_ends_an_answer_is_found(name: str, end: str) -> None:
    tokenizer = bare(PUBLISHED[name][0])
    choose(tokenizer, name)
    assert set(ends(tokenizer, incomplete=True)) == {tokenizer.convert_tokens_to_ids(end)}


def test_plain_continues_the_text() -> None:
    tokenizer = bare("Llama-2")
    choose(tokenizer, "plain")
    assert ends(tokenizer, incomplete=True) == []
    assert tokenizer.decode(prompt_ids(tokenizer, [DIALOGUE[0]])) == "Hi there."
    assert tokenizer.decode(prompt_ids(tokenizer, [SYSTEM, *DIALOGUE[:3]])) == (
        "Be brief.\n\nHi there.Hello you.\n\nAnd now?"
    )
    pieces = encode(tokenizer, DIALOGUE, [tokenizer.eos_token_id])  # two: a full stop and a blank line are one token
    assert [draw(tokenizer, piece) for piece in pieces] == [
        "Hi there.⟦Hello you.⟧",
        "Hi there.Hello you.\n\nAnd now?⟦Good bye.⟧",
    ]


def test_plain_begins_as_the_tokenizer_begins_a_text() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.FOLDER / "target")
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    choose(tokenizer, "plain")
    assert prompt_ids(tokenizer, [DIALOGUE[0]]) == tokenizer(DIALOGUE[0]["content"])["input_ids"]


def test_plain_has_no_users_turn_to_write() -> None:
    tokenizer = bare("Llama-2")
    choose(tokenizer, "plain")
    with pytest.raises(DataError, match=r"puts nothing after a user's words.*Set data\.prompts to a file"):
        user_turn(tokenizer)


def base_model(folder: Path, weights: bool) -> Path:
    """A random Llama with pico's tokenizer and no chat template; it ends at token 2."""
    config = transformers.LlamaConfig(**{**SHAPE, "vocab_size": 8192})
    if weights:
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.generation_config.eos_token_id = 2
        model.save_pretrained(folder)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded.FOLDER / "target" / name, folder)
    return folder


def load(folder: Path, chat_template: str) -> Target:
    return load_target(TargetSpec(model=str(folder), chat_template=chat_template))


def test_a_target_is_another_one_with_its_template_and_ends_where_that_says(tmp_path: Path) -> None:
    folder, file = base_model(tmp_path / "base", weights=True), tmp_path / "mine.jinja"
    end = transformers.AutoTokenizer.from_pretrained(folder).eos_token
    file.write_text(TAGGED.replace("<|im_end|>", end))
    plain, mine = load(folder, "plain"), load(folder, str(file))
    number = mine.tokenizer.convert_tokens_to_ids(end)
    assert plain.stop_ids == {2}
    assert mine.stop_ids == {2, number} == set(mine.model.generation_config.eos_token_id)
    assert len({plain.fingerprint, mine.fingerprint, load(folder, "").fingerprint}) == 3
    (tmp_path / "copy.jinja").write_text(file.read_text())
    assert load(folder, str(tmp_path / "copy.jinja")).fingerprint == mine.fingerprint


@pytest.mark.parametrize("own_end", [True, False])
def test_a_fine_tuned_base_model_ends_where_its_tokenizer_and_template_do(tmp_path: Path, own_end: bool) -> None:
    """Its generation_config.json is the base's. A control token that is not the tokenizer's end may end a part of an
    answer alone, as gpt-oss's <|end|> does, and adds nothing."""
    folder = base_model(tmp_path / "tuned", weights=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token if own_end else next(t for t in tokenizer.all_special_tokens if t != tokenizer.eos_token)
    (folder / "chat_template.jinja").write_text(TAGGED.replace("<|im_end|>", end))
    target = load(folder, "")
    wanted = {2, tokenizer.eos_token_id} if own_end else {2}
    own = target.model.generation_config.eos_token_id
    assert target.stop_ids == wanted == set(own if isinstance(own, list) else [own])


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("chatlm", r"target\.chat_template is 'chatlm': did you mean chatml\?"),
        ("no/such.jinja", r"it is no file that can be read\. Set it to chatml, llama-2, vicuna, a file"),
        ("broken.jinja", r"target\.chat_template is 'broken\.jinja': the chat template .* refuses a dialogue"),
        ("chatml", r"which ends an answer with <\|im_end\|>, and the tokenizer has no such token.*=plain"),
    ],
)
def test_what_cannot_serve_is_refused_in_one_line(
    chosen: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.jinja").write_text("{% for message in messages %}")
    with pytest.raises(TargetError, match=message) as caught:
        choose(bare("Llama-2"), chosen)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("verb", ["prepare-data", "chat", "eval"])
def test_a_model_without_a_template_is_refused_before_its_weights_are_read(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base_model(tmp_path / "base", weights=False)
    shutil.copytree(embedded.FOLDER / "drafter", "runs/mine/drafter")
    options = {"eval": ["--bench", "mine", "--questions", "mine.jsonl"]}.get(verb, ["data.holdout=0"])
    (tmp_path / "mine.jsonl").write_text('{"prompt": "Hello"}\n')
    done = CliRunner().invoke(app, [verb, "name=mine", "target.model=base", "head.kind=full", *options])
    assert done.exit_code == 1
    assert "has no chat template. Set target.chat_template to chatml, llama-2, vicuna" in done.stderr
    assert done.stderr.count("\n") == 1


def test_every_name_is_a_file() -> None:
    assert sorted(path.stem for path in (Path(embedded.__file__).parent / "target" / "templates").iterdir()) == sorted(
        NAMED
    )
