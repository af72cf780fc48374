"""`coral inspect`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from coral_core.errors import ArtifactError

MADE_BY = {"data": "prepare-data", "drafter": "train", "head": "group-head", "eval": "eval"}
"""The command that makes each kind of folder but exports, in the order in which they are to be run."""
BAR = 40
"""Width of the histogram's longest bar."""


def inspect(
    path: Annotated[Path, typer.Argument(help="A run, or the data, drafter or head in one.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a folder that coral made is, and whether it is whole."""
    from coral_cli.console import print_json, progress_bars, tell
    from coral_core.inspection import inspect as describe

    with progress_bars() as progress:
        found = describe(path, progress)
    if json:
        print_json(found)
    else:
        for part in found.get("stages", {"": found}).values():
            _print(part)
        for name in found.get("unfinished", []):
            tell(f"{name} is unfinished: the command that makes it goes on where it stopped")
    if found["damaged"]:
        raise ArtifactError(f"damaged: {', '.join(found['damaged'])}. {_remedy(path, found)}")


def _remedy(path: Path, found: dict[str, Any]) -> str:
    """The commands that make the damaged stages anew, with the run's own recipe."""
    from coral_core.artifacts import remedy

    whole, path = found["kind"] == "run", path.resolve()
    kinds = {name.split("/")[0] for name in found["damaged"]} if whole else {found["kind"]}
    run = path if whole else path.parents[1] if found["kind"] == "export" else path.parent
    recipe = run / "recipe.yaml"
    words = f" {shlex.quote(str(recipe))} --runs {shlex.quote(str(run.parent))}" if recipe.exists() else ""
    formats = [name.split("/")[1] for name in found["damaged"] if whole and name.startswith("export/")]
    formats += [path.name] if found["kind"] == "export" else []
    commands = [f"coral {verb}{words}" for kind, verb in MADE_BY.items() if kind in kinds]
    commands += [f"coral export{words} --to {name}" for name in dict.fromkeys(formats)]
    imported = "; a drafter that was imported: coral import" if "drafter" in kinds else ""
    return remedy(path, ", then ".join(commands) + imported)


def _print(found: dict[str, Any]) -> None:
    from coral_cli.console import out, print_table

    rows = [(key, str(value)) for key, value in _lines(found)]
    rows += [(f"from {name}", value) for name, value in found["inputs"].items()]
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items())
    rows += [("made with", versions), ("git commit", found["git_commit"] or "none")]
    rows += [(name, _weights_text(weights)) for name, weights in found.get("weights", {}).items()]
    print_table((found["kind"], found["path"]), rows)
    lengths = found.get("lengths", [])
    longest = max((step["samples"] for step in lengths), default=1)
    if lengths:
        out.print("\ntokens of a sample")
    for step in lengths:
        bar = "█" * round(BAR * step["samples"] / longest)
        out.print(f"{step['from']:>7,}-{step['to']:<7,} {step['samples']:>9,} {bar}", markup=False, soft_wrap=True)
    out.print()


def _lines(found: dict[str, Any]) -> list[tuple[str, Any]]:
    """The facts that are one number or one word, and the sum of those that are more."""
    from coral_cli.console import size_text

    facts = found["facts"]
    lines: list[tuple[str, Any]] = [("fingerprint", found["fingerprint"])]
    for name, value in facts.items():
        if name == "bytes":
            lines.append(("size", size_text(value)))
        elif isinstance(value, bool | int | float | str):
            lines.append((name.replace("_", " "), f"{value:,}" if isinstance(value, int) else value))
    lines += [(f"from {name}", f"{count:,} dialogues") for name, count in facts.get("sources", {}).items()]
    lines += [(f"left out: {reason}", f"{count:,}") for reason, count in facts.get("skipped", {}).items()]
    if "answer_share" in found:
        lines += [("shards", f"{found['shards']:,}"), ("answer tokens, share", f"{found['answer_share']:.1%}")]
        lines.append(("damaged files", ", ".join(found["damaged"]) or "none"))
    return lines


def _weights_text(weights: dict[str, Any]) -> str:
    from coral_cli.console import size_text

    dtypes = ", ".join(weights["dtypes"])
    return (
        f"{weights['parameters']:,} parameters in {weights['tensors']} tensors, {dtypes}, {size_text(weights['bytes'])}"
    )
