"""`coral chat`."""

from coral_cli.options import RUNS, Arguments, RunsOption, open_run


def chat(arguments: Arguments = None, runs: RunsOption = RUNS) -> None:
    """Talk with the target, drafted or plain."""
    open_run(arguments, runs)
