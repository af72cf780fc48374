"""`coral export`: the drafter as a folder that another engine loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from coral_cli import hints
from coral_cli.options import RUNS, Arguments, RunsOption, open_run

if TYPE_CHECKING:
    import torch

    from coral_core.export.run import Source
    from coral_core.run import Run
    from coral_core.target.target import Target

MEASURED_PROMPTS = 16
"""Held-out prompts on which the token map is compared with the full vocabulary."""


def export(
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="vllm, sglang, speculators, gguf (llama.cpp), eagle (its own code) or hf (coral's own). Needed.",
            show_default=False,
        ),
    ] = "",
    arguments: Arguments = None,
    map_size: Annotated[
        int | None,
        typer.Option("--map-size", min=1, help="Draft from so many frequent tokens (SGLang, or EAGLE-3's shape)."),
    ] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Write RUNS/NAME/export/FORMAT, a folder that an engine loads as it is, or say why it could not."""
    from coral_cli.console import tell
    from coral_core import embedded
    from coral_core.errors import CoralError

    if not to:
        raise CoralError("--to is missing. Run: coral export --to vllm, or see the others: coral export --help")
    from coral_core.export.run import FORMATS, HF, export_engine, export_hf, open_source, serve_command

    if to not in FORMATS:
        raise typer.BadParameter(f"--to is '{to}'; it must be one of {', '.join(FORMATS)}")
    with open_run(arguments, runs) as run:
        target = run.target()
        source = open_source(run.recipe, run.folder, target)
        wide = bool(source.drafter.config.taps)
        if map_size and (to == HF or not (wide or to == "sglang")):
            raise CoralError(f"--map-size {map_size}: {to} reads no token map. Leave it out, or export --to sglang")
        if to == HF:
            folder = export_hf(source, run.folder)
            next_step = hints.pasteable("coral publish --repo ORG/NAME")
            tell(f"written to {folder}. Next: {next_step}")
            return
        mapped = map_size if wide else to == "sglang"
        token_map = _token_map(run, source, target, map_size) if mapped else None
        folder = export_engine(to, source, target, run.folder, token_map)
        tell(f"written to {folder}, and read back. Serve it with:")
        model = embedded.model_source(run.recipe.target.model)
        with_map = token_map is not None and not wide
        typer.echo(serve_command(to, run.recipe, source.drafter.config, (model, str(folder)), with_map=with_map))


def _token_map(run: Run, source: Source, target: Target, size: int | None) -> torch.Tensor | None:
    """The most frequent tokens, where a head knows them; prints what drafting from them alone costs in tau."""
    from coral_cli.console import progress_bars, tell
    from coral_core.bench.acceptance import static_head_cost
    from coral_core.bench.questions import held_out
    from coral_core.errors import ArtifactError, CoralError
    from coral_core.export.run import frequent_tokens

    if source.head is None:
        if size:
            raise CoralError(f"--map-size {size}: no head in {source.folder} counts the tokens. Run: coral group-head")
        return None
    token_map = frequent_tokens(source, run.recipe, target, size)
    try:
        questions = held_out(run.folder, run.recipe.target.model)[:MEASURED_PROMPTS]
    except ArtifactError as error:
        tell(f"token map of {len(token_map):,} tokens, its cost not measured: {hints.pasteable(str(error))}")
        return token_map
    prompts = [list(question.ids) for question in questions]
    with progress_bars() as progress:
        whole, mapped = static_head_cost(run.recipe, target, source.drafter, token_map, prompts, progress)
    tell(
        f"token map: {len(token_map):,} of {target.lent.head_VD.shape[0]:,} tokens; expected tau {mapped:.2f} instead "
        f"of {whole:.2f} ({mapped / whole - 1:+.1%}), on {len(prompts)} held-out prompts"
    )
    return token_map
