"""`coral env` and `coral recipe`: what a bug report needs, and a recipe that is checked without a run."""

import json

from tests.cli.test_errors import coral


def test_env_names_versions_devices_and_folders(tmp_path):
    done = coral("env", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert {"coral", "python", "torch", "transformers", "threads", "memory", "processor"} <= found.keys()
    assert "models and datasets are kept in" in found
    assert list(tmp_path.iterdir()) == []


def test_env_tells_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in coral("env", "--json").stdout


def test_recipe_prints_every_default_and_makes_no_run(tmp_path):
    (tmp_path / "my.yaml").write_text("seed: 3\n", encoding="utf-8")
    done = coral("recipe", "my.yaml", "train.steps=7", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "name: my\nseed: 3\n" in done.stdout and "  steps: 7\n" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["my.yaml"]
    assert coral("recipe", "train.stpes=7", cwd=tmp_path).returncode == 1
