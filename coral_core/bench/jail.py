"""The inside of the sandbox: a script that sandbox.py starts, never imported. Standard library only.

stdin: a secret on the first line, then the program. stdout: the secret, once the program has run to its end.
"""

import builtins
import os
import resource
import sys
from pathlib import Path

NAMES = """
    os.remove os.rename os.rmdir os.mkdir os.link os.symlink os.truncate os.chmod os.chown os.system os.exec os.fork
    os.forkpty os.posix_spawn os.spawn os.kill os.killpg os.utime os.putenv os.unsetenv os.chdir os.fchdir
    os.chflags os.setxattr os.removexattr pty.spawn subprocess.Popen ctypes.dlopen ctypes.dlsym shutil.rmtree
    shutil.move signal.pthread_kill fcntl.fcntl mmap.__new__ _posixsubprocess.fork_exec resource.setrlimit
    sys.setprofile gc.get_objects
"""
FORBIDDEN = frozenset(NAMES.split())
NETWORK = ("socket.", "urllib.", "ftplib.", "smtplib.", "http.", "webbrowser.")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def refuse(event: str, arguments: tuple[object, ...]) -> None:
    """The audit hook: what a solution to a puzzle has no need to do. It cannot be taken off again."""
    if event in FORBIDDEN or event.startswith(NETWORK):
        raise PermissionError(f"{event} is not allowed here")
    if event == "open":
        path, mode, flags = arguments
        writes = isinstance(mode, str) and set(mode) & set("wax+")
        if writes or (isinstance(flags, int) and flags & WRITING) or isinstance(path, int):
            raise PermissionError(f"writing {path!r} is not allowed here")


def main() -> None:
    cpu_s, memory_bytes = (int(text) for text in sys.argv[1:])
    secret, _, program = sys.stdin.buffer.read().decode("utf-8", "replace").partition("\n")
    out = sys.stdout
    sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115  # open for as long as the program runs
    sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    sys.argv = ["program"]
    limits = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 1 << 16,  # the secret must still go out
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 32,
    }
    if sys.platform == "darwin":  # it refuses to set this one
        del limits[resource.RLIMIT_AS]
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))
    sys.addaudithook(refuse)
    exec(compile(program, "program", "exec"), {"__name__": "__main__", "__builtins__": builtins})
    out.write(secret)
    out.flush()
    os._exit(0)  # nothing that the program registered to run at exit


if __name__ == "__main__":
    main()
