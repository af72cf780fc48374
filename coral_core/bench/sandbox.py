"""Running code that a model wrote, with limits: for HumanEval, and only when a user asks for it.

The program runs in a fresh interpreter (jail.py) without the environment, in an empty folder, with limits on time,
memory and output, and under an audit hook that refuses to write or remove files, open sockets, start processes or load
native code. That stops what a model writes by accident. It is no wall against an attacker: use a container for a model
that you do not trust.
"""

import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from coral_core.errors import CoralError

TIME_LIMIT_S = 5.0
MEMORY_LIMIT_BYTES = 1 << 30
JAIL = Path(__file__).with_name("jail.py")


def runs_through(program: str, time_limit_s: float = TIME_LIMIT_S, memory_bytes: int = MEMORY_LIMIT_BYTES) -> bool:
    """Whether a Python program reaches its end without an error and within its limits.

    The end is proved by a secret that jail.py says last: a program that leaves early with exit code 0 does not know it.
    Raises CoralError where there are no such limits (not a POSIX system).
    """
    if sys.platform == "win32":
        raise CoralError("HumanEval's programs need the limits of a POSIX system; leave out --run-code")
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as empty:
        command = [sys.executable, "-I", "-B", str(JAIL), str(int(time_limit_s) + 1), str(memory_bytes)]
        try:
            done = subprocess.run(
                command,
                input=f"{secret}\n{program}".encode("utf-8", "replace"),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=empty,
                env={},
                timeout=time_limit_s,
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout == secret.encode()
