"""Reading a recipe: YAML and `section.key=value` overrides in, one checked Recipe out. Not for reading anything else.

The YAML is only parsed into nodes here, and each scalar is read by the type of the field it is for: PyYAML's own
guesses turn `precision: no` into False and leave `3e-5` as text. Nodes also know their line, for messages.
"""

import dataclasses
import difflib
import json
import math
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from coral_core import embedded
from coral_core.artifacts import Manifest, fingerprint, first_difference
from coral_core.errors import RecipeError
from coral_core.recipe.schema import ADDED, FORGOTTEN, PRESETS, REMOVED, UNSET, Recipe

_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WHOLE = re.compile(r"[+-]?\d+(_\d+)*")


def load_recipe(path: Path | None, overrides: list[str]) -> Recipe:
    """The recipe in `path` (None: the embedded pico's own) with `section.key=value` overrides on top.

    A recipe without a name takes its file's. Keys that nobody wrote come from `train.preset`, then from the schema's
    defaults; a preset among the overrides wins over the file's keys too, and over what the file's own preset had set,
    as in the recipe.yaml of a run, where every key stands. Raises RecipeError, one line, for a file that
    cannot be read, an unknown key, a value of the wrong type or out of range, and another model under pico's name.
    """
    given: dict[str, Any] = {}
    given.update(_leaves(_read(path or embedded.RECIPE), "", str(path or embedded.RECIPE)))
    if path is not None:
        given.setdefault("name", re.sub(r"[^\w.-]+", "-", path.stem).lstrip("."))
    said: dict[str, Any] = {}
    for override in overrides:
        said.update(_override(override))
    if preset := said.get("train.preset"):  # said later than the file's keys, so it wins over them
        of_file = keys_of(given.get("train.preset", Recipe().train.preset))
        given = {key: value for key, value in given.items() if of_file.get(key) != value}
        given.update({f"train.{key}": value for key, value in PRESETS[preset].items()})
    given.update(said)
    for key, value in keys_of(given.get("train.preset", Recipe().train.preset)).items():
        given.setdefault(key, value)
    recipe: Recipe = _build(Recipe, given, "")
    if recipe.name == embedded.NAME != recipe.target.model:
        mend = "Write a recipe of your own (docs/your-model.md), or give name=mine to use pico's settings"
        raise RecipeError(
            f"the run is named 'pico', which is that of the embedded model, and target.model is "
            f"'{recipe.target.model}'. {mend if path is None else 'Give the run a name of its own, such as name=mine'}"
        )
    return recipe


def keys_of(preset: str) -> dict[str, Any]:
    """The keys that a preset decides on, with the values that they have where a recipe does not say them."""
    return {f"train.{key}": value for key, value in {**UNSET, **PRESETS[preset]}.items()}


def to_mapping(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested plain values, every default written out."""
    return dataclasses.asdict(recipe)


def dump_yaml(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(to_mapping(recipe), sort_keys=False, allow_unicode=True)


def section_fingerprint(recipe: Recipe, *sections: str, **inputs: str) -> str:
    """Fingerprint of the named sections (or top keys, as "seed") and of upstream artifacts' fingerprints."""
    mapping = to_mapping(recipe)
    for section, keys in ADDED.items():
        values = mapping[section]
        mapping[section] = {key: value for key, value in values.items() if key not in keys or value != keys[key]}
    for section, gone in REMOVED.items():
        mapping[section] = mapping[section] | gone
    return fingerprint({"recipe": {name: mapping[name] for name in sections}, "inputs": inputs})


def settled(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of a recipe of any version, with the keys of all others, at what is done without them."""
    found: dict[str, Any] = {}
    for name, values in sections.items():
        same = ADDED.get(name, {}) | REMOVED.get(name, {})
        if isinstance(values, Mapping):
            values = {**same, **values}
        found[name] = values
    return found


def changes(manifest: Manifest, sections: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """How recipe sections and inputs differ from a manifest's: "train.steps was 10, is 5; the data changed".

    '' where they do not, whatever version made it.
    """
    if "imported_from" in manifest.facts:
        return f"it was imported from {manifest.facts['imported_from']}"
    # Through JSON, which knows no tuples: as the manifest's own values went.
    found = first_difference(settled(manifest.recipe), json.loads(json.dumps(settled(sections))))
    keys = [f"{found[0]} was {found[1]}, is {found[2]}"] if found else []
    named = [name for name in {**manifest.inputs, **inputs} if manifest.inputs.get(name) != inputs.get(name)]
    return "; ".join(keys + [f"the {name} changed" for name in named])


# ---- from text to nodes


def _read(path: Path) -> yaml.MappingNode:
    """The YAML mapping in a file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        mend = "Write it (docs/your-model.md), or leave it out to work on pico"
        raise RecipeError(f"no recipe file {path}{_near_file(path)} {mend}") from error
    except IsADirectoryError as error:
        raise RecipeError(f"{path} is a folder; give the recipe file in it, such as {path / 'recipe.yaml'}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not text (byte {error.start} is not UTF-8); a recipe is a YAML file") from error
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}. Check it with: ls -l {path}") from error
    node = _compose(text, str(path))
    if node is None:
        raise RecipeError(f"{path} is empty; write at least `name: my-run`, or leave the recipe out to work on pico")
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path} is not a recipe: it must be lines of `key: value`, as in recipes/pico.yaml")
    return node


def _near_file(path: Path) -> str:
    """'; did you mean …?' when a recipe of nearly that name lies beside it, or in recipes/; else a full stop.

    Names are compared without `.yaml`, which all of them have in common.
    """
    beside = {str(other): other.stem for folder in (path.parent, Path("recipes")) for other in folder.glob("*.yaml")}
    near = difflib.get_close_matches(path.stem, beside.values(), n=1, cutoff=0.5)
    return next((f"; did you mean {other}?" for other, name in beside.items() if name in near), ".")


def _compose(text: str, source: str) -> yaml.Node | None:
    """The node tree of one YAML document; a syntax error names the line."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}, line {mark.line + 1}" if mark else source
        raise RecipeError(f"{where}: not valid YAML: {error.problem or error.context}. Mend that line") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not valid YAML: {str(error).splitlines()[0]}. Mend it") from error


def _override(text: str) -> dict[str, Any]:
    """`section.key=value` as {dotted key: typed value}; the value is a YAML scalar."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"'{text}' is not an override; write section.key=value, such as train.steps=100")
    if _is_gone(key, _compose(raw, f"'{text}'"), f"'{text}'"):
        return {}
    kind = _field_type(key, f"'{text}'")
    if dataclasses.is_dataclass(kind):
        raise RecipeError(f"'{text}': {key} is a section; override one of its keys, such as {_keys(kind, key)[0]}=…")
    node = _compose(raw, f"'{text}'") or yaml.ScalarNode("tag:yaml.org,2002:null", "")
    return {key: _scalar(kind, node, key, f"'{text}'")}


# ---- from nodes to typed values


def _leaves(node: yaml.Node, prefix: str, source: str) -> Iterator[tuple[str, Any]]:
    """Every value written in a mapping as (dotted key, typed value)."""
    seen: set[str] = set()
    for key_node, value_node in node.value:
        where = f"{source}, line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{where}: a key must be a word")
        key = f"{prefix}{key_node.value}"
        if _is_gone(key, value_node, where):
            continue
        kind = _field_type(key, where)
        if key in seen:
            raise RecipeError(f"{where}: key '{key}' is written twice; keep one of them")
        seen.add(key)
        if not dataclasses.is_dataclass(kind):
            yield key, _scalar(kind, value_node, key, where)
        elif isinstance(value_node, yaml.MappingNode):
            yield from _leaves(value_node, f"{key}.", source)
        else:
            raise RecipeError(f"{where}: '{key}' is a section; write its keys indented below it, or leave it out")


def _keys(kind: Any, prefix: str = "") -> list[str]:
    """Dotted names of the fields of one section."""
    return [f"{prefix}.{field.name}" if prefix else field.name for field in dataclasses.fields(kind)]


def _is_gone(key: str, node: yaml.Node | None, where: str) -> bool:
    """Whether a key of before says what coral now always does. Raises RecipeError where it asks for something else."""
    section, _, name = key.partition(".")
    if key in FORGOTTEN:
        return True
    if name not in REMOVED.get(section, {}):
        return False
    kept = REMOVED[section][name]
    value = _scalar(type(kept), node, key, where) if isinstance(node, yaml.ScalarNode) else None
    if value != kept:
        raise RecipeError(f"{where}: {key} is no longer a key; coral always takes {kept!r}. Leave the key out")
    return True


def _field_type(key: str, where: str) -> Any:
    """The type of the field with that dotted key. Raises RecipeError with the nearest key when there is none."""
    kind: Any = Recipe
    for name in key.split("."):
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if name not in hints:
            raise RecipeError(f"{where}: unknown key '{key}'; {_nearest(key)}")
        kind = hints[name]
    return kind


def _nearest(key: str) -> str:
    """A hint at the known keys most like an unknown one: the word counts twice, the section it stands in once."""
    sections = {name: kind for name, kind in typing.get_type_hints(Recipe).items() if dataclasses.is_dataclass(kind)}
    known = [*_keys(Recipe), *(path for name, kind in sections.items() for path in _keys(kind, name))]
    section, _, word = key.replace("-", "_").rpartition(".")

    def likeness(path: str) -> float:
        other_section, _, other_word = path.rpartition(".")
        alike = difflib.SequenceMatcher(None, word, other_word).ratio()
        return 2 * alike + difflib.SequenceMatcher(None, section, other_section).ratio() if alike >= 0.6 else 0.0

    if best := max(map(likeness, known)):
        return f"did you mean {' or '.join(repr(path) for path in known if likeness(path) == best)}?"
    within = _keys(sections[section]) if section in sections else _keys(Recipe)
    return f"the keys of {section if section in sections else 'a recipe'} are {', '.join(within)}"


def _scalar(kind: Any, node: yaml.Node, key: str, where: str) -> Any:
    """One YAML scalar read as the type of its field."""
    if not isinstance(node, yaml.ScalarNode):
        raise RecipeError(f"{where}: {key} must be one value, not a list or a section")
    text, plain = node.value, node.style is None
    if plain and node.tag == "tag:yaml.org,2002:null":
        raise RecipeError(f"{where}: {key} has no value; give one, or leave the line out for the default")
    if typing.get_origin(kind) is typing.Literal:
        rule, value = f"one of {', '.join(typing.get_args(kind))}", text if text in typing.get_args(kind) else None
    elif kind is str:
        rule, value = "text", text
    elif not plain:
        raise RecipeError(f"{where}: {key} is the text '{text}'; write it without quotes")
    elif kind is bool:
        rule, value = "true or false", _BOOLS.get(text.lower())
    elif kind is int:
        rule, value = f"a whole number{_whole_hint(text)}", int(text) if _WHOLE.fullmatch(text) else None
    else:
        rule, value = "a number", _finite(text)
    if value is None:
        raise RecipeError(f"{where}: {key} is '{text}'; it must be {rule}")
    return value


def _finite(text: str) -> float | None:
    """The number that a text writes (1, 0.5, 3e-5), or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _whole_hint(text: str) -> str:
    """', such as 1000' for 1e3 and 1000.0."""
    value = _finite(text)
    return f", such as {int(value)}" if value is not None and value.is_integer() else ""


# ---- from typed values to the recipe


def _build(kind: type, given: dict[str, Any], prefix: str) -> Any:
    """Make a section from the values given for it; what is not given takes the default."""
    values: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            values[name] = _build(typing.cast(type, hint), given, f"{key}.")
        elif key in given:
            values[name] = given[key]
    return kind(**values)
