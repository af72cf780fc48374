"""`coral recipe`: checks a recipe without a run, and prints what it says or what a recipe may say."""

from __future__ import annotations

from typing import Annotated

import typer

from coral_cli.options import Arguments, read_recipe


def recipe(
    arguments: Arguments = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of a recipe, for an editor, instead.")
    ] = False,
) -> None:
    """Check a recipe without a run, and print it with every default written out."""
    from coral_cli.console import print_json
    from coral_core.recipe.described import json_schema
    from coral_core.recipe.loader import dump_yaml

    if schema:
        print_json(json_schema())
    else:
        typer.echo(dump_yaml(read_recipe(arguments)), nl=False)
