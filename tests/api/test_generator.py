"""Use from Python: ten lines load a target and a drafter, generate and stream."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coral_core import Drafter, Generator, Target
from coral_core.artifacts import Manifest
from coral_core.decoding.engine import plain
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from coral_core.embedded import FOLDER as PICO
from coral_core.errors import ArtifactError
from coral_core.export.run import export_hf
from coral_core.head.heads import FullHead, GroupedHead
from tests.api.test_stream import metaspace
from tests.export.helpers import publish, random_drafter
from tests.tiny import tiny_target


def test_the_package_stays_light_until_a_name_is_asked_for():
    code = "import sys, coral_core; assert 'torch' not in sys.modules; from coral_core import Drafter; Drafter"
    subprocess.run([sys.executable, "-c", code + "; assert 'torch' in sys.modules"], check=True)
    with pytest.raises(ImportError, match="cannot import name 'Draft'"):
        from coral_core import Draft  # noqa: F401


def test_ten_lines_stream_what_plain_decoding_says():
    target = Target.from_pretrained("pico")
    generator = Generator(target, Drafter.from_pretrained(PICO / "drafter"))
    options = {"max_new_tokens": 12, "temperature": 0.8, "seed": 3}
    rounds = list(generator.rounds("Book a table for two.", **options))
    pieces = list(generator.stream("Book a table for two.", **options))
    assert len(pieces) > 1
    assert generator.generate([{"role": "user", "content": "Book a table for two."}], **options) == "".join(pieces)
    from coral_core.target.template import prompt_ids

    prompt = prompt_ids(target.tokenizer, [{"role": "user", "content": "Book a table for two."}])
    expected = [t for event in plain(target, prompt, Sampler(temperature=0.8, seed=3), 12) for t in event.new_ids]
    assert [token for event in rounds for token in event.new_ids] == expected
    assert "".join(pieces) == target.tokenizer.decode(expected, skip_special_tokens=True)


def test_the_ten_lines_of_the_readme_run_as_they_stand(capsys):
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    code = next(part.split("```")[0] for part in text.split("```python")[1:] if "from coral_core import" in part)
    assert len(code.strip().splitlines()) <= 10
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 3


def test_the_answer_to_ids_goes_on_from_their_text(monkeypatch):
    """The first space of a sentencepiece text is the prompt's; after a dialogue an answer begins a text of its own."""
    tokenizer = metaspace()
    target = dataclasses.replace(tiny_target("llama"), tokenizer=tokenizer)
    generator = Generator(target, random_drafter(target), TreeShape(depth=2, nodes=3, topk=1))
    prompt, answer = (tokenizer.convert_tokens_to_ids(pieces) for pieces in (["▁def", "x"], ["▁return", "x"]))
    monkeypatch.setattr(generator, "rounds", lambda prompt: iter([Round(answer, "prefill")]))
    assert generator.generate(prompt) == " returnx"
    assert generator.generate("def") == generator.generate([{"role": "user", "content": "def"}]) == "returnx"


def test_the_head_comes_along_with_the_folder_that_has_one(tmp_path):
    target = dataclasses.replace(tiny_target("llama"), stop_ids=frozenset())
    source = publish(tmp_path, target, random_drafter(target), head=True)
    whole = Generator(target, Drafter.from_pretrained(export_hf(source, tmp_path)))
    in_run = Generator(target, Drafter.from_pretrained(tmp_path / "drafter"))
    for made in (whole, in_run):
        assert isinstance(made.engine.head, GroupedHead) and made.engine.head.active == 2
    manifest = Manifest.read(tmp_path / "head", "head", "")
    older = {**manifest.inputs, "drafter": "0" * 16}
    dataclasses.replace(manifest, inputs=older).write(tmp_path / "head")
    alone = Generator(target, Drafter.from_pretrained(tmp_path / "drafter"))
    assert isinstance(alone.engine.head, FullHead)
    answers = [[t for r in made.rounds([1, 5, 9], max_new_tokens=15) for t in r.new_ids] for made in (whole, alone)]
    assert answers[0] == answers[1] == [t for r in plain(target, [1, 5, 9], Sampler(), 15) for t in r.new_ids]


def test_the_users_drafter_keeps_its_own_dtype():
    """`to` works in place: a drafter in float32 must not be rounded by being used with a target in bfloat16."""
    target = tiny_target("llama")
    drafter = random_drafter(target).double()
    Generator(target, drafter)
    assert drafter.fc.weight.dtype == torch.float64


def test_the_tree_is_what_pays_here_unless_one_is_given(monkeypatch):
    target = tiny_target("llama")
    drafter, costs = random_drafter(target), object()
    monkeypatch.setattr("coral_core.run.measure_costs", lambda engine: costs)
    assert Generator(target, drafter).engine.costs is costs
    given = Generator(target, drafter, TreeShape(depth=2, nodes=3, topk=1)).engine
    assert given.costs is None and given.shape.nodes == 3


def test_the_drafter_of_another_target_is_refused(tmp_path):
    target, other = tiny_target("llama"), tiny_target("llama", seed=1)
    publish(tmp_path, target, random_drafter(target))
    with pytest.raises(ArtifactError, match="was made for target .* Load its own"):
        Generator(other, Drafter.from_pretrained(tmp_path / "drafter"))
    with pytest.raises(ArtifactError, match="is for a vocabulary of 100 and 32 hidden; the target has 96 and 32"):
        Generator(target, random_drafter(target, vocab_size=100))
