"""`coral --help` answers at once: one convenient import at the top of a file costs every call seconds."""

import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "datasets", "accelerate", "sklearn", "numpy")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter; it prints what it found to stderr."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def heavy_after(code: str) -> str:
    """Which heavy modules are loaded once `code` has run."""
    done = run_python(f"import sys\n{code}\nprint([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)")
    return done.stderr.strip()


@pytest.mark.parametrize(
    "verb", [None, "prepare-data", "train", "group-head", "eval", "chat", "inspect", "serve", "env", "recipe"]
)
def test_help_imports_nothing_heavy(verb):
    argv = ["coral", *([verb] if verb else []), "--help"]
    code = (
        f"sys.argv = {argv}\nfrom coral_cli.main import main\n"
        "try: main()\nexcept SystemExit as done: assert done.code in (None, 0)"
    )
    assert heavy_after(code) == "[]"


def processor_s(code: str, says: str) -> float:
    """The best of several runs, in seconds of processor time, which a busy machine does not stretch."""
    took_s = []
    for _ in range(4):
        begun = os.times()
        done = run_python(code)
        ended = os.times()
        took_s.append(ended.children_user + ended.children_system - begun.children_user - begun.children_system)
        assert done.returncode == 0
        assert says in done.stdout
    return min(took_s)


def test_help_takes_little_more_than_the_import_of_typer():
    """1.4 times as long when this was written; importing rich alone would make it 3."""
    help_s = processor_s(
        "import sys; sys.argv = ['coral', '--help']; from coral_cli.main import main; main()", "prepare-data"
    )
    assert help_s < 2.5 * processor_s("import typer.main", "")


def test_reading_a_recipe_needs_no_torch():
    code = "from coral_core.recipe.loader import load_recipe, dump_yaml\ndump_yaml(load_recipe(None, ['seed=1']))"
    assert heavy_after(code) == "[]"


@pytest.mark.parametrize("verb", ["prepare-data", "train", "group-head", "eval", "chat", "serve"])
def test_a_slip_in_the_recipe_is_answered_before_anything_heavy_loads(verb):
    code = (
        f"sys.argv = ['coral', '{verb}', 'train.stpes=3']\nfrom coral_cli.main import main\nimport os\n"
        "sys.stderr = open(os.devnull, 'w')\ntry: main()\nexcept SystemExit as done: assert done.code == 1\n"
        "sys.stderr = sys.__stderr__"
    )
    assert heavy_after(code) == "[]"
