"""The pages say what is there: links lead somewhere, commands and keys exist, recipes load, imports work."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from coral_cli.main import app
from coral_core.recipe.loader import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"(?<!\\)\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(coral [^`]+)`")
NO_FILE = {"my.yaml", "recipe.yaml"}
"""Recipes of the reader's own."""


def anchors(text: str) -> set[str]:
    """What a link to a heading of this page may be."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page whose file or heading is not there."""
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        if ":" in name:
            continue
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def commands(text: str) -> list[str]:
    """The `coral` commands of a page's code, comments left out."""
    blocks = [body for kind, body in BLOCK.findall(text) if kind in ("", "bash", "sh", "console")]
    lines = [line.strip().removeprefix("$ ") for body in blocks for line in body.splitlines()]
    indented = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [line for line in [*lines, *indented, *INLINE.findall(text)] if line.startswith("coral ")]


def fault(command: str) -> str:
    """What is wrong with a command: its verb, an option, or a key of the recipe. Empty when nothing is."""
    words = shlex.split(command, comments=True)[1:]
    group = typer.main.get_command(app)
    known = {*group.get_params(group.make_context("coral", [], resilient_parsing=True))}
    verb = next((word for word in words if not word.startswith("-")), "")
    if verb and verb not in group.commands and verb.lower() == verb:
        return f"no verb {verb}"
    if verb in group.commands:
        known = {*group.commands[verb].params}
    options = {name for parameter in known for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help", "-h"}
    for word in words:
        if word.startswith("-") and word.partition("=")[0] not in options:
            return f"no option {word}"
        if re.match(r"[a-z_]+\.[a-z_]+=", word):
            try:
                load_recipe(None, [word, "name=mine"])
            except Exception as error:  # noqa: BLE001  # any refusal is a fault of the page
                return str(error)
        if word.endswith(".yaml") and word not in NO_FILE and not (ROOT / word).exists():
            return f"no recipe {word}"
    return ""


def code_faults(text: str, folder: Path) -> list[str]:
    """Recipes that do not load, and Python that does not compile or imports what is not there."""
    found = []
    for number, (kind, body) in enumerate(BLOCK.findall(text)):
        if kind == "yaml":
            path = folder / f"page-{number}.yaml"
            path.write_text(body, encoding="utf-8")
            try:
                load_recipe(path, [])
            except Exception as error:  # noqa: BLE001
                found.append(str(error))
        if kind == "python":
            for node in ast.walk(ast.parse(body)):
                if isinstance(node, ast.ImportFrom) and node.module:
                    module = importlib.import_module(node.module)
                    found += [f"{node.module}.{one.name}" for one in node.names if not hasattr(module, one.name)]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    wrong = {command: fault(command) for command in commands(page.read_text(encoding="utf-8"))}
    assert {command: why for command, why in wrong.items() if why} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_load_and_imports_work(page, tmp_path):
    assert code_faults(page.read_text(encoding="utf-8"), tmp_path) == []


def test_a_broken_page_is_seen(tmp_path):
    """Each kind of fault, so that the tests above can fail."""
    page = tmp_path / "page.md"
    page.write_text("# Here\n[a](absent.md) [b](#nowhere) [c](#here) [d](https://example.org)\n", encoding="utf-8")
    assert broken_links(page) == ["absent.md", "#nowhere"]
    assert fault("coral trian my.yaml") == "no verb trian"
    assert fault("coral train my.yaml --fast") == "no option --fast"
    assert "train.steps" in fault("coral train my.yaml train.stpes=3")
    assert fault("coral train absent.yaml") == "no recipe absent.yaml"
    assert fault("coral eval my.yaml --bench mt-bench train.steps=3  # measures") == ""
    wrong = "```yaml\nname: a\nstpes: 3\n```\n```python\nfrom coral_core import Nothing\n```\n"
    assert len(code_faults(wrong, tmp_path)) == 2
    assert commands("```\ncoral eval\npip install x\n```\nSee `coral chat`.\n\n    coral train\n") == [
        "coral eval",
        "coral train",
        "coral chat",
    ]
