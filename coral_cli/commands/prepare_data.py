"""`coral prepare-data`."""

from coral_cli.options import RUNS, Arguments, RunsOption, open_run


def prepare_data(arguments: Arguments = None, runs: RunsOption = RUNS) -> None:
    """Let the target answer the prompts, and tap its features."""
    open_run(arguments, runs)
