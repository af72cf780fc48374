"""What `coral publish` uploads: coral's own format, a model card, the recipe, and the engines' folders there are."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from coral_core.artifacts import MANIFEST, Manifest, check_files, write_text
from coral_core.errors import ArtifactError
from coral_core.export.card import CardFacts, card_text, hub_target
from coral_core.export.run import TOKEN_MAP, Source, export_hf, formats, open_source, serve_command
from coral_core.recipe.loader import load_recipe, to_mapping
from coral_core.recipe.schema import Recipe

RECIPE = "recipe.yaml"


@dataclasses.dataclass(frozen=True)
class Publication:
    """A folder ready for the Hub."""

    folder: Path
    card: str
    files: list[tuple[str, int]]
    """Path in the repository, and bytes."""
    warnings: list[str]


def prepare(recipe: Recipe, run: Path, repo: str, licence: str) -> Publication:
    """Make RUN/export/hf what is to be uploaded; nothing leaves the machine.

    Raises ArtifactError when the drafter is missing, or was not evaluated since it was made.
    """
    source = open_source(recipe, run, None)
    results = _results(run, source)
    folder = export_hf(source, run)
    engines = _copy_engines(run, folder, source)
    recipe_yaml = _made_by(recipe, run, source)
    write_text(folder / RECIPE, recipe_yaml)
    made_by = load_recipe(folder / RECIPE, [])
    facts = CardFacts(
        repo=repo,
        licence=licence,
        recipe=made_by,
        recipe_yaml=recipe_yaml,
        trained=source.manifest.facts,
        head=Manifest.read(source.head, "head", "coral group-head").facts if source.head else None,
        results=results,
        serve={to: _serve(to, made_by, source, repo, folder / to) for to in engines},
    )
    card = card_text(facts)
    write_text(folder / "README.md", card)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [(str(path.relative_to(folder)), path.stat().st_size) for path in paths]
    return Publication(
        folder, card, files, _warnings(facts, [to for to in formats(source.drafter) if to not in engines])
    )


def _serve(to: str, recipe: Recipe, source: Source, repo: str, made: Path) -> str:
    """From where `hf download` puts it."""
    places = hub_target(recipe) or "TARGET", f"{repo.split('/')[1]}/{to}"
    with_map = (made / TOKEN_MAP).exists()
    return serve_command(to, recipe, source.drafter.config, places, with_map=with_map)


def _results(run: Path, source: Source) -> dict[str, Any]:
    """results.json of this drafter: a card without numbers, or with another drafter's, helps nobody."""
    path = run / "eval" / "results.json"
    if path.exists():
        check_files(path.parent, [path.name], "coral eval")
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"no results in {path.parent}: a card says what was measured. Run: coral eval") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}. Run: coral eval") from error
    if (measured := results["drafter"]["fingerprint"]) != source.manifest.fingerprint:
        raise ArtifactError(
            f"{path} measured drafter {measured}, and the one in {source.folder} is {source.manifest.fingerprint}. "
            "Run: coral eval"
        )
    return results


def _copy_engines(run: Path, folder: Path, source: Source) -> list[str]:
    """The engines' folders of this drafter, one of each; older ones are left behind."""
    found = []
    for to in formats(source.drafter):
        copy, made = folder / f".{to}.partial", run / "export" / to
        for older in (copy, folder / to):
            shutil.rmtree(older, ignore_errors=True)
        if not (made / MANIFEST).exists():
            continue
        if Manifest.read(made, "export", f"coral export --to {to}").inputs["drafter"] == source.manifest.fingerprint:
            shutil.copytree(made, copy)
            copy.rename(folder / to)
            found.append(to)
    return found


def _made_by(recipe: Recipe, run: Path, source: Source) -> str:
    """The recipe as each stage read it, from the manifests: what was overridden since does not count."""
    mapping = to_mapping(recipe)
    stages = [source.manifest]
    if (run / "data" / MANIFEST).exists():
        stages.insert(0, Manifest.read(run / "data", "data", "coral prepare-data"))
    if source.head:
        stages.append(Manifest.read(source.head, "head", "coral group-head"))
    for manifest in stages:
        for section, values in manifest.recipe.items():
            mapping[section] = {**mapping[section], **values} if isinstance(values, dict) else values
    return yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True)


def _warnings(facts: CardFacts, missing: list[str]) -> list[str]:
    warnings = []
    if not facts.licence:
        warnings.append("no licence is said: give --licence, such as apache-2.0; the target's terms come first")
    if not hub_target(facts.recipe):
        warnings.append(f"the target '{facts.recipe.target.model}' is not on the Hub, so the card names no base_model")
    for key, value in (("target.model", facts.recipe.target.model), ("data.prompts", facts.recipe.data.prompts)):
        if Path(value).is_absolute():
            warnings.append(f"card and recipe show a path of this machine: {key}={value}")
    if missing:
        warnings.append(f"not among the files: folders for {', '.join(missing)}; coral export --to … makes them")
    return warnings
