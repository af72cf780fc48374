"""Processes that run one command together, as `accelerate launch` starts them; those that hang show where."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60
"""How long the processes may stand still, all of them: no processor time, however busy the machine is."""


def start_together(command: Sequence[str], processes: int = 2, **options: Any) -> list[subprocess.Popen]:
    """Each is told its rank in the environment, and shows its stacks when it is aborted."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "ACCELERATE_USE_CPU": "true"}
    common |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **{"cwd": ROOT, **options}
        )
        for rank in range(processes)
    ]


def exit_codes(running: Sequence[subprocess.Popen]) -> list[int]:
    """Of all processes, when they have ended. If they stand still for a minute, they are aborted and show where."""
    spent, since = -1.0, time.monotonic()
    while any(process.poll() is None for process in running):
        now = sum(_processor_s(process) for process in running)
        if now > spent + 0.2:
            spent, since = now, time.monotonic()
        elif time.monotonic() - since > PATIENCE_S:
            for process in running:
                process.send_signal(signal.SIGABRT)
        time.sleep(0.2)
    return [process.wait() for process in running]


def _processor_s(process: subprocess.Popen) -> float:
    try:
        times = psutil.Process(process.pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)
