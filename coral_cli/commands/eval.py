"""`coral eval`."""

from coral_cli.options import RUNS, Arguments, RunsOption, open_run


def evaluate(arguments: Arguments = None, runs: RunsOption = RUNS) -> None:
    """Measure tokens per round and speed against plain decoding."""
    open_run(arguments, runs)
