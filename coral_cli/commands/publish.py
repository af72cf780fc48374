"""`coral publish`: the drafter, its head, its numbers and a model card, to the Hugging Face Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from coral_cli.options import RUNS, Arguments, RunsOption, open_run


def publish(
    repo: Annotated[str, typer.Option("--repo", help="Where to, as org/name.")],
    arguments: Arguments = None,
    licence: Annotated[
        str, typer.Option("--licence", help="The drafter's licence as the Hub names it, such as apache-2.0.")
    ] = "",
    push: Annotated[
        bool, typer.Option("--push", help="Upload; without it the card and the files are only shown.")
    ] = False,
    runs: RunsOption = RUNS,
) -> None:
    """Show the model card and the files that would be published; with --push, upload them."""
    from coral_cli.console import size_text, tell
    from coral_core.drafter.hub import upload
    from coral_core.errors import CoralError
    from coral_core.export.publication import prepare

    if repo.count("/") != 1:
        raise typer.BadParameter(f"--repo is '{repo}'; write it as org/name")
    if push and not licence:
        raise CoralError("a published model needs a licence; give --licence, such as --licence apache-2.0")
    with open_run(arguments, runs) as run:
        publication = prepare(run.recipe, run.folder, repo, licence)
        typer.echo(publication.card)
        for name, size_bytes in publication.files:
            tell(f"{name}  {size_text(size_bytes)}")
        for warning in publication.warnings:
            tell(f"note: {warning}")
        if push:
            address = upload(publication.folder, repo, message=f"{run.recipe.name}, by coral")
            tell(f"published: {address}")
        else:
            tell(f"nothing was uploaded; it lies in {publication.folder}. To publish: --push")
