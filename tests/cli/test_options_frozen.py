"""Every option there is. Knobs live in the recipe: adding an option means editing this list, so it is a decision."""

import typer.main

from coral_cli.main import app

OPTIONS = {
    "coral": ["--help", "--install-completion", "--show-completion", "--version"],
    "prepare-data": ["--dry-run", "--help", "--restart", "--runs", "--show"],
    "train": ["--dry-run", "--help", "--restart", "--runs"],
    "group-head": ["--help", "--runs"],
    "eval": [
        *("--bench", "--drafter", "--head", "--help", "--json", "--limit", "--questions", "--run-code"),
        "--runs",
    ],
    "serve": ["--active", "--help", "--host", "--port", "--runs", "--waiting"],
    "chat": ["--help", "--no-speculative", "--runs", "--show-drafts", "--speculative"],
    "inspect": ["--help", "--json"],
    "recipe": ["--help", "--schema"],
    "env": ["--help", "--json"],
    "export": ["--help", "--map-size", "--runs", "--to"],
    "import": ["--help", "--runs"],
    "publish": ["--help", "--licence", "--push", "--repo", "--runs"],
}
"""At most six of a command's own, --help not counted; eval's name what one run compares, which a recipe cannot."""


def options(command) -> list[str]:
    """The long names of a command's options, sorted."""
    context = command.make_context("coral", [], resilient_parsing=True)
    names = {name for parameter in command.get_params(context) for name in (*parameter.opts, *parameter.secondary_opts)}
    return sorted(name for name in names if name.startswith("--"))


def test_no_option_is_added_without_editing_the_list():
    group = typer.main.get_command(app)
    found = {"coral": options(group)} | {name: options(command) for name, command in group.commands.items()}
    assert found == OPTIONS
    assert all(len(names) <= 7 for command, names in found.items() if command != "eval")


def test_each_command_takes_recipe_and_overrides():
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        positional = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        folder, recipe = ("path", 1), ("arguments", -1)
        expected = {"inspect": [folder], "env": [], "import": [folder, recipe]}.get(name, [recipe])
        assert [(argument.name, argument.nargs) for argument in positional] == expected
