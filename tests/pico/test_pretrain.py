"""What pico is trained on and how it grows, on made-up corpora."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from coral_core.errors import DataError
from recipes.pico import corpora, pretrain
from recipes.pico.tokenizer import train_tokenizer

QUESTION = "how many apples does tom have after he buys four more in the morning"


def dialogue(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(f"word{i} of the {i * 37} apples that tom buys in the morning" for i in range(500))


def test_a_dialogue_that_quotes_a_benchmark_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "bench.jsonl").write_text(json.dumps({"turns": [f"Well, {QUESTION}?"], "id": 3}) + "\n")
    quotes, clean = dialogue("x", QUESTION.upper()), dialogue("how many apples does tom have after lunch", "two")
    assert corpora.clean([quotes, clean], corpora.benchmark_ngrams(tmp_path)) == [clean]


def test_questions_are_found_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "bench.jsonl").write_text(json.dumps({"data": {"turns": [{"text": QUESTION}]}}) + "\n")
    assert QUESTION.split()[:10] in [gram.split() for gram in corpora.benchmark_ngrams(tmp_path)]


def test_a_folder_without_questions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bench.jsonl").write_text(json.dumps({"turns": ["Too short."]}) + "\n")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=f"no file .* in {folder} holds 10 words in a row.* Give --benchmarks"):
            corpora.benchmark_ngrams(folder)


def test_a_dialogue_and_its_copy_fall_on_the_same_side() -> None:
    many = [dialogue(f"question {i}", "answer") for i in range(3000)]
    train, held = corpora.split(many + many[::-1])
    assert 20 <= len(held) // 2 <= 45
    assert len(held) % 2 == 0
    assert not {d[0]["content"] for d in train} & {d[0]["content"] for d in held}


def test_rows_are_full_and_corpora_have_their_shares(tokenizer) -> None:
    texts = {
        "sgd": [dialogue(f"table {i}", "yes") for i in range(50)],
        "tldr": [dialogue(f"command {i}", "ls") for i in range(9)],
    }
    packed = corpora.pack(texts, tokenizer, rows=200, length=64, seed=0)
    assert packed.shape == (200, 64)
    text = tokenizer.decode(packed.flatten())
    ratio = text.count("table") * 1.0 / text.count("command")
    assert ratio == pytest.approx(corpora.SHARES["sgd"] / corpora.SHARES["tldr"], rel=0.25)
    assert np.array_equal(packed, corpora.pack(texts, tokenizer, rows=200, length=64, seed=0))


def test_a_novel_is_cut_into_pieces(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "novels.jsonl.gz", "wt") as out:
        out.write(json.dumps({"text": "x" * (corpora.NOVEL_CHARACTERS + 1)}) + "\n")
    assert [len(piece[0]["content"]) for piece in corpora.read(tmp_path, "novels")] == [corpora.NOVEL_CHARACTERS, 1]


def test_the_template_marks_the_answers(tokenizer) -> None:
    messages = [{"role": "system", "content": "be brief"}, *dialogue("apples", "buys 12"), *dialogue("morning", "the")]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [t for t, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "buys 12<|end|>the<|end|>"
    assert tokenizer.tokenize("1024") == ["1", "0", "2", "4"]


def test_a_grown_model_is_the_same_function(tmp_path: Path, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(pretrain, "HIDDEN", 32)
    monkeypatch.setattr(pretrain, "HEADS", 2)
    torch.manual_seed(0)
    shallow = pretrain.fresh(2, tokenizer)
    for layer in shallow.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.1)
        torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.1)
    shallow.save_pretrained(tmp_path)
    deep = pretrain.grown(tmp_path, 6, tokenizer)
    ids = torch.arange(5, 30)[None]
    assert torch.equal(deep(ids).logits, shallow(ids).logits)
    with pytest.raises(SystemExit, match="no multiple of the 2 layers"):
        pretrain.grown(tmp_path, 5, tokenizer)


def test_the_rate_warms_up_holds_and_falls() -> None:
    rates = [pretrain.rate_at(step, 100, 0.5) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 20)
    assert set(rates[19:51]) == {1.0}
    assert rates[75] == pytest.approx(0.5)
    assert min(pretrain.rate_at(step, 100, 0.0) for step in range(20, 100)) == 1.0
