"""The recipe's JSON schema: for editors that complete keys and underline slips while a recipe is written."""

import ast
import dataclasses
import inspect
import typing
from typing import Any

from coral_core.recipe import schema

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def json_schema() -> dict[str, Any]:
    """Of a whole recipe: each key with its type, its meaning and its default. Unknown keys are errors there too."""
    notes = _notes()
    return {"$schema": DIALECT, "title": "A coral recipe", **_section(schema.Recipe, notes)}


def _section(kind: type, notes: dict[tuple[str, str], str]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    keys = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            keys[field.name] = _section(typing.cast(type, hint), notes)
        else:
            note = notes.get((kind.__name__, field.name), "")
            keys[field.name] = {**_type(hint), "description": note, "default": field.default}
    about = inspect.cleandoc(kind.__doc__ or "")
    return {"type": "object", "description": about, "properties": keys, "additionalProperties": False}


def _type(hint: Any) -> dict[str, Any]:
    if typing.get_origin(hint) is typing.Literal:
        return {"enum": list(typing.get_args(hint))}
    return {"type": _TYPES[hint]}


def _notes() -> dict[tuple[str, str], str]:
    """(class, field) -> the text under the field: Python keeps no docstring of a field, so the source is read."""
    notes = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, note in zip(node.body, node.body[1:], strict=False):
            is_text = isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                text = typing.cast(ast.Constant, typing.cast(ast.Expr, note).value).value
                notes[node.name, field.target.id] = " ".join(str(text).split())
    return notes
