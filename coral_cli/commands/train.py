"""`coral train`."""

from coral_cli.options import RUNS, Arguments, RunsOption, open_run


def train(arguments: Arguments = None, runs: RunsOption = RUNS) -> None:
    """Train the drafter on the tapped features."""
    open_run(arguments, runs)
