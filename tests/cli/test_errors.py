"""The one error boundary, seen from outside: exit codes, and one line on stderr."""

import os
import signal
import subprocess
import sys

import pytest

FAKE = """
import sys, time
import coral_cli.main as cli
from coral_cli.console import out, print_json
from coral_core.errors import ArtifactError

@cli.app.command("fake")
def fake() -> None:
    {body}

sys.argv = ["coral", "fake"]
cli.main()
"""


def coral(*arguments: str, cwd=None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a fresh interpreter."""
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])  # noqa: PTH109 (the checkout)
    command = [sys.executable, "-m", "coral_cli.main", *arguments]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def fake(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with the given body."""
    code = FAKE.format(body=body)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_success_is_0():
    done = coral("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("coral ")


@pytest.mark.parametrize("verb", ["prepare-data", "train", "group-head", "eval", "chat", "serve"])
def test_a_users_error_is_1_with_one_line(verb, tmp_path):
    done = coral(verb, "no-such.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    mend = "Write it (docs/your-model.md), or leave it out to work on pico"
    assert done.stderr == f"error: no recipe file no-such.yaml. {mend}\n"
    assert list(tmp_path.iterdir()) == [], "a refused recipe leaves nothing behind"


def test_an_unknown_key_is_1_with_the_nearest():
    done = coral("train", "train.stpes=3")
    assert done.returncode == 1
    assert done.stderr == "error: 'train.stpes=3': unknown key 'train.stpes'; did you mean 'train.steps'?\n"


def test_a_recipe_in_the_place_of_a_drafter_is_told(tmp_path):
    """It said that there is no recipe file some/drafter."""
    done = coral("import", "my.yaml", "some/drafter", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    mend = "the drafter's PATH comes first. Run: coral import PATH my.yaml"
    assert done.stderr == f"error: my.yaml is a recipe, and {mend}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--steps", "3"], "No such option"),
        (["train", "a.yaml", "b.yaml"], "one recipe file at most, got a.yaml, b.yaml"),
        (["trian"], "No such command 'trian'"),
        ([], "Usage: "),
    ],
)
def test_wrong_usage_is_2(arguments, message):
    done = coral(*arguments)
    assert done.returncode == 2
    assert message in done.stderr + done.stdout


def test_an_error_of_several_lines_becomes_one():
    done = fake("raise ArtifactError('the drafter is gone.\\nRun: coral train')")
    assert (done.returncode, done.stderr) == (1, "error: the drafter is gone. Run: coral train\n")


def test_debug_shows_the_traceback_of_a_users_error():
    done = fake("raise ArtifactError('gone')", CORAL_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ArtifactError: gone" in done.stderr


def test_a_bug_keeps_its_traceback():
    done = fake("raise ValueError('a bug')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ValueError: a bug" in done.stderr
    assert "error: a bug" not in done.stderr


@pytest.mark.parametrize("moment", ["at work", "while its words are read"])
def test_ctrl_c_is_130_with_one_line(moment):
    """A real signal."""
    code = FAKE.format(body="print('ready', flush=True); time.sleep(60)")
    if moment != "at work":
        code = code.replace("\ncli.main()", "\ncli.app.info.cls.parse_args = lambda *_: fake()\ncli.main()")
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None and run.stdout.readline() == "ready\n"
        run.send_signal(signal.SIGINT)
        _, stderr = run.communicate(timeout=30)
    assert (run.returncode, stderr) == (130, "interrupted; run the same command again to go on\n")


def test_ctrl_c_when_all_is_done_changes_nothing():
    code = FAKE.format(body="atexit.register(lambda: (print('ready', flush=True), time.sleep(1)))")
    with subprocess.Popen(
        [sys.executable, "-c", f"import atexit\n{code}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None and run.stdout.readline() == "ready\n"
        run.send_signal(signal.SIGINT)
        _, stderr = run.communicate(timeout=30)
    assert (run.returncode, stderr) == (0, "")


@pytest.mark.parametrize(
    "body", ["print_json(list(range(100_000)))", "[cli.typer.echo('x' * 99) for _ in range(9999)]"]
)
def test_a_reader_that_leaves_early_gets_no_complaint(body):
    """`coral eval --json | head -1`."""
    with subprocess.Popen(
        [sys.executable, "-c", FAKE.format(body=body)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.readline()
        run.stdout.close()
        assert run.stderr.read() == ""


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_terminal_that_lacks_letters_shows_question_marks(encoding):
    """A histogram's bars and ⟦ ⟧ ended in a traceback where the terminal knows ASCII alone."""
    done = fake("out.print('█ ⟦é⟧')", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Traceback" not in fake("raise ArtifactError('no ⟦é⟧')", PYTHONIOENCODING=encoding).stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")  # noqa: PTH110
@pytest.mark.parametrize("body", ["out.print('a')", "print_json({'a': 'b' * 100000})", "sys.stdout.write('a')"])
def test_an_output_that_takes_nothing_is_one_line(body):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [sys.executable, "-c", FAKE.format(body=body)]
        buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # what is short is written at the end
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=buffered, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: the output cannot be written: no space is left there, or nobody reads it\n"


def test_export_without_a_format_names_a_command(tmp_path):
    done = coral("export", "name=mine", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --to is missing. Run: coral export name=mine --to vllm, or see the others:")
