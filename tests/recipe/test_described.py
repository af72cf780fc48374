"""The schema that an editor checks a recipe with says what the loader says."""

import dataclasses
import typing

from coral_core.recipe.described import json_schema
from coral_core.recipe.schema import Recipe


def test_every_key_has_a_type_a_meaning_and_its_default():
    keys = 0
    for name, part in json_schema()["properties"].items():
        section = part.get("properties", {name: part})
        for key, described in section.items():
            assert described["description"], f"{name}.{key}"
            assert "default" in described and ("type" in described or "enum" in described)
            keys += 1
    hints = typing.get_type_hints(Recipe)
    assert keys == sum(
        len(dataclasses.fields(hint)) if dataclasses.is_dataclass(hint) else 1 for hint in hints.values()
    )


def test_choices_and_unknown_keys_are_refused_as_by_the_loader():
    schema = json_schema()
    assert schema["properties"]["target"]["properties"]["dtype"]["enum"] == ["auto", "float32", "bfloat16", "float16"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["train"]["additionalProperties"] is False
