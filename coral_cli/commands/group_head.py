"""`coral group-head`."""

from coral_cli.options import RUNS, Arguments, RunsOption, open_run


def group_head(arguments: Arguments = None, runs: RunsOption = RUNS) -> None:
    """Group the LM head's rows and train the router."""
    open_run(arguments, runs)
