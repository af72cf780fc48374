"""The model card: what the drafter is for, how it was made, what was measured, how it is served, its licence."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from coral_core.export.run import engine_name
from coral_core.recipe.schema import Recipe
from coral_core.report.tables import interval, number

TAGS = ["speculative-decoding", "coral", "eagle", "draft-model"]
PAPERS = {
    "drawn": "CORAL (arXiv 2502.16880), one drawn pass an update, its loss over some rows of the LM head",
    "quick": "CORAL (arXiv 2502.16880), its loss over some rows of the LM head",
    "eagle2": "EAGLE-2 (arXiv 2406.16858)",
    "hass": "HASS (arXiv 2408.15766)",
    "coral": "CORAL (arXiv 2502.16880)",
    "eagle3": "EAGLE-3 (arXiv 2503.01840)",
    "coral3": "EAGLE-3 with CORAL's alignment (arXiv 2503.01840, 2502.16880)",
    "coral3.1": "EAGLE-3.1 with CORAL's alignment (arXiv 2503.01840, 2502.16880)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says."""

    repo: str
    licence: str
    """'' is not said yet."""
    recipe: Recipe
    """As drafter and head were made."""
    recipe_yaml: str
    trained: dict[str, Any]
    """The drafter manifest's facts."""
    head: dict[str, Any] | None
    """The head manifest's facts."""
    results: dict[str, Any]
    """eval/results.json."""
    serve: dict[str, str]
    """Format -> the command by which its folder is served."""


def hub_target(recipe: Recipe) -> str:
    """The target's Hub id; '' for a folder or a GGUF file, and for pico, which is nowhere else."""
    model = recipe.target.model
    local = model.startswith((".", "/", "~")) or model.lower().endswith(".gguf") or Path(model).is_dir()
    return model if model.count("/") == 1 and not local else ""


def card_text(facts: CardFacts) -> str:
    """README.md of the repository."""
    licence = f"{facts.licence or 'Not said yet'}."
    sections = [
        _front(facts),
        _opening(facts),
        _measured(facts.results),
        _use(facts),
        _made(facts),
        f"## Recipe\n\n```yaml\n{facts.recipe_yaml.strip()}\n```",
        f"## Licence\n\n{licence} The target has a licence of its own, which this one does not change.",
    ]
    return "\n\n".join(sections) + "\n"


def _front(facts: CardFacts) -> str:
    values: dict[str, Any] = {"license": facts.licence or "other", "tags": TAGS, "library_name": "coral"}
    if target := hub_target(facts.recipe):
        values |= {"base_model": target, "base_model_relation": "adapter"}
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _opening(facts: CardFacts) -> str:
    target, revision = facts.recipe.target.model, facts.recipe.target.revision
    where = f"`{target}`, revision `{revision}`" if hub_target(facts.recipe) else f"`{target}`"
    fingerprint = facts.results["target"]["fingerprint"]
    coral = f"coral {facts.results['versions']['coral']}"
    made = f"Trained with {coral}, by {PAPERS[facts.recipe.train.preset]}:"
    if source := facts.trained.get("imported_from"):
        made = f"Imported from `{source}` with {coral}, which did not train it:"
    return (
        f"# {facts.repo.split('/')[1]}\n\n"
        f"A drafter for {where} (coral's fingerprint of its weights: `{fingerprint}`). It makes that model decode "
        f"faster by speculation; it is no model of its own, and what the target says does not change. {made} "
        f"{facts.trained['parameters']:,} parameters."
    )


def _measured(results: dict[str, Any]) -> str:
    header = (
        "| bench | T | questions | tau | tokens/s | plain tokens/s | speedup | accepted at depth 1, 2, … | lossless |"
    )
    lines = [header, "|---" * 9 + "|"]
    for name, numbers in results["benches"].items():
        depths = " ".join(f"{share:.2f}" for share in numbers["accepted_by_depth"]) or "-"
        lossless = numbers["lossless"]
        cells = [
            name,
            f"{numbers['temperature']:g}",
            str(numbers["questions"]),
            number(numbers["tokens_per_round_micro"]),
            number(numbers["tokens_per_s"], digits=1),
            f"{number(numbers['baseline_tokens_per_s'], digits=1)} ({numbers['baseline']})",
            interval(numbers["speedup"], numbers["speedup_ci95"]),
            depths,
            f"{lossless['equal']} of {lossless['checked']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    tree, head = results.get("tree", {}), results["head"]
    settings = ", ".join(f"{key} {value}" for key, value in {**tree, **head}.items())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        "## Measured\n\n" + "\n".join(lines) + "\n\n"
        "tau is tokens per round, the target's own included; the speedup is against the fastest plain decoding found "
        f"in the same process. {results['device']}, {results['dtype']}; {settings}; {versions}.\n\n"
        f"    {results['command']}"
    )


def _use(facts: CardFacts) -> str:
    target = hub_target(facts.recipe) or ("pico" if facts.recipe.target.model == "pico" else "TARGET")
    code = (
        "```python\nfrom coral_core import Drafter, Generator, Target\n\n"
        f'target = Target.from_pretrained("{target}")\n'
        f'generator = Generator(target, Drafter.from_pretrained("{facts.repo}"))\n'
        'for text in generator.stream("Hello!"):\n    print(text, end="", flush=True)\n```'
    )
    served = [f"{engine_name(to)}:\n\n    {command}" for to, command in facts.serve.items()]
    fetch = [f"    hf download {facts.repo} --local-dir {facts.repo.split('/')[1]}"] if served else []
    return "## Use\n\n" + "\n\n".join([code, *fetch, *served])


def _made(facts: CardFacts) -> str:
    imported = facts.trained.get("imported_from")
    lines = [f"Data: not known to coral, which imported the drafter from `{imported}`." if imported else _data(facts)]
    if facts.head:
        recall = facts.head.get("recall", {})
        lines.append(
            f"Grouped head: {facts.head['groups']} groups, {facts.head['active']} active; recall of the target's "
            f"argmax {recall.get('argmax', float('nan')):.1%}."
        )
    verbs = [f"import {imported}"] if imported else ["prepare-data", "train"]
    if facts.head:
        verbs += ["prepare-data", "group-head"] if imported else ["group-head"]
    commands = [f"coral {verb} recipe.yaml" for verb in (*verbs, "eval")]
    lines.append("Made by, with the recipe below:\n\n    " + "\n    ".join(commands))
    last = {key: value for key, value in facts.trained.get("last", {}).items() if key.startswith(("loss", "accuracy"))}
    if last:
        lines.append(f"At the last training step: {json.dumps({k: round(v, 4) for k, v in last.items()})}.")
    return "## How it was made\n\n" + "\n\n".join(lines)


def _data(facts: CardFacts) -> str:
    data, spec = facts.trained.get("data", {}), facts.recipe.data
    counts = f"{data['samples']:,} dialogues, {data['answer_tokens']:,} answer tokens" if data else "not known here"
    prompts = "prompts that the target wrote itself" if spec.prompts == "self" else f"prompts from `{spec.prompts}`"
    answers = (
        "answers as they were in it" if spec.regenerate == "none" else f"answered by the target ({spec.regenerate})"
    )
    return f"Data: {counts}; {prompts}, {answers}."
