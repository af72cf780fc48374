"""Which targets a drafter serves beside its own: fine-tunes and quantised forms, and nothing that cannot work."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from coral_core.artifacts import COMPATIBILITY, Manifest
from coral_core.embedded import FOLDER as PICO
from coral_core.errors import ArtifactError, CoralWarning
from coral_core.target.compatibility import describe, refuse_other_target
from coral_core.target.load import wrap
from coral_core.target.target import Target
from tests.tiny import SHAPE, tiny_target

OTHER_SYSTEM = "<|system|>Be brief.<|end|>"


def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(PICO / "target")


def described(changed: Any) -> dict[str, Any]:
    return describe(dataclasses.replace(tiny_target(), tokenizer=changed))


def sibling(target: Target, **changes: Any) -> Target:
    """The target with one weight changed, as a fine-tune has them all, and what else is wanted."""
    model = copy.deepcopy(target.model)
    model.model.layers[0].mlp.up_proj.weight.view(-1)[:8] += 0.01
    return dataclasses.replace(wrap(model, target.tokenizer), **changes)


def made_for(target: Target) -> Manifest:
    inputs = {"target": target.fingerprint}
    return Manifest(kind="drafter", fingerprint="d", inputs=inputs, recipe={}, facts={COMPATIBILITY: describe(target)})


def test_special_tokens_fillers_and_a_system_message_make_no_other_family() -> None:
    plain = described(tokenizer())
    more = tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    more.add_tokens(["[PAD512]"])
    assert described(more) == plain
    greeted = tokenizer()
    greeted.chat_template = OTHER_SYSTEM + greeted.chat_template
    assert described(greeted) == plain


def test_another_word_or_another_mark_of_a_turn_is_told() -> None:
    plain, worded, marked, none = described(tokenizer()), tokenizer(), tokenizer(), tokenizer()
    worded.add_tokens(["coral-reef"])
    assert described(worded)["tokenizer"] != plain["tokenizer"]
    marked.chat_template = marked.chat_template.replace("<|end|>", "<|stop|>")
    assert (described(marked)["template"], described(marked)["tokenizer"]) != (plain["template"], plain["tokenizer"])
    assert described(marked)["tokenizer"] == plain["tokenizer"]
    none.chat_template = None
    assert described(none)["template"] == ""


def test_its_own_target_says_nothing(recwarn: pytest.WarningsRecorder) -> None:
    refuse_other_target(made_for(tiny_target()), Path("there"), "Mend it", tiny_target())
    assert not recwarn.list


def test_a_sibling_is_served_and_said_to_be_one() -> None:
    other = sibling(tiny_target())
    assert other.fingerprint != tiny_target().fingerprint
    with pytest.warns(CoralWarning, match=r"in there was made for a sibling .* tokens per round may be fewer") as said:
        refuse_other_target(made_for(tiny_target()), Path("there"), "Mend it", other)
    assert "chat template" not in str(said[0].message)
    mine = dataclasses.replace(tiny_target(), tokenizer=tokenizer())
    other = sibling(mine)
    other.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.warns(CoralWarning, match="its chat template differs: answers are this target's own"):
        refuse_other_target(made_for(dataclasses.replace(mine, tokenizer=tokenizer())), Path("x"), "Mend it", other)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"hidden_size": 48}, "made for a target with 32 hidden; this target has 48 hidden. Mend it"),
        ({"vocab_size": 104}, "with a vocabulary of 96; this target has a vocabulary of 104. Mend it"),
    ],
)
def test_another_shape_is_refused(shape: dict[str, int], words: str) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SHAPE, **shape})
    other = wrap(transformers.AutoModelForCausalLM.from_config(config), None)
    with pytest.raises(ArtifactError, match=words):
        refuse_other_target(made_for(tiny_target()), Path("there"), "Mend it", other)


def test_another_tokenizer_is_refused() -> None:
    other = tokenizer()
    other.add_tokens(["coral-reef"])
    mine = dataclasses.replace(tiny_target(), tokenizer=tokenizer())
    with pytest.raises(ArtifactError, match=r"made for a target with tokenizer \w+; this target has tokenizer \w+\."):
        refuse_other_target(made_for(mine), Path("there"), "Mend it", sibling(mine, tokenizer=other))


def test_a_manifest_that_says_nothing_of_its_target_serves_that_one_alone() -> None:
    old = dataclasses.replace(made_for(tiny_target()), facts={})
    refuse_other_target(old, Path("there"), "Mend it", tiny_target())
    with pytest.raises(ArtifactError, match="was made for target .*, and this target is"):
        refuse_other_target(old, Path("there"), "Mend it", sibling(tiny_target()))
