"""Answers in context, and features that do not know of their neighbours."""

from types import SimpleNamespace

import pytest
import torch

from coral_core.data import shards
from coral_core.data.meter import Meter
from coral_core.data.plan import Fit
from coral_core.data.prompts import Dialogue
from coral_core.data.shards import answer, tap_all
from coral_core.errors import CoralWarning, DataError
from coral_core.progress import silent
from coral_core.target.template import Encoded, Turn, append
from tests.data.helpers import CHATML, NOON, make_job, make_target
from tests.tiny import FAMILIES, VOCAB, tiny_target


def make_fit(tmp_path, **data) -> Fit:
    job = make_job(tmp_path, **data)
    return Fit(job.target, job.recipe.data, NOON)


def meter() -> Meter:
    return Meter(silent, "x", 100)


def test_features_of_a_padded_batch_are_those_of_one_by_one_forwards() -> None:
    """In float32 to 1e-5, in the order of the pieces, whatever shares a forward: the last layer's, after its norm."""
    generator = torch.Generator().manual_seed(0)
    for family in FAMILIES:
        target = tiny_target(family)
        lengths = [7, 1, 30, 12, 3, 19]
        pieces = [
            Encoded(torch.randint(3, VOCAB, (length,), generator=generator).tolist(), [False] * length)
            for length in lengths
        ]
        samples = tap_all(target, pieces, 4, torch.float32, meter())
        assert [sample.ids_T.tolist() for sample in samples] == [piece.ids for piece in pieces]
        for sample in samples:
            alone = target.model(input_ids=sample.ids_T[None], output_hidden_states=True).hidden_states[-1][0]
            torch.testing.assert_close(sample.feature_TD, alone, rtol=0, atol=1e-5, msg=family)


def test_each_turn_is_answered_in_view_of_the_answers_before_it(tmp_path) -> None:
    """Three turns, one by one by hand, are what a batch of dialogues of unlike lengths gives."""
    fit = make_fit(tmp_path, max_new_tokens=5, regenerate="greedy")
    target, tokenizer = make_target(), fit.tokenizer
    dialogue = Dialogue(("ab", "cd", "e"), system="s")
    others = [Dialogue(("x",)), Dialogue(("yyy", "z"))]
    pieces = answer(target, [others[0], dialogue, others[1]], fit, 0, meter())[1]
    texts: list[str] = []
    turns = []
    for _ in range(3):
        prompt = tokenizer.apply_chat_template(dialogue.messages(texts), add_generation_prompt=True)["input_ids"]
        ids: list[int] = []
        while len(ids) < 5 and not (ids and ids[-1] in target.stop_ids):
            with torch.no_grad():
                ids.append(int(target.model(torch.tensor([prompt + ids])).logits[0, -1].argmax()))
        texts.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
        turns.append((prompt, ids))
    written = [token for piece in pieces for token, own in zip(piece.ids, piece.answer, strict=True) if own]
    assert written == [token for _, ids in turns for token in ids]
    ends = [prompt + ids for prompt, ids in turns]
    assert pieces[-1].ids == ends[-1]
    assert all(piece.ids in ends for piece in pieces)


def test_a_later_turn_that_no_longer_fits_is_left_out(tmp_path) -> None:
    fit = make_fit(tmp_path, max_length=60, max_new_tokens=12)
    short, long = Dialogue(("a", "b")), Dialogue(("a", "b" * 60))
    pieces = answer(make_target(), [short, long], fit, 0, meter())
    assert all(len(piece.ids) <= 60 for several in pieces for piece in several)
    assert len(pieces[1]) == 1
    assert sum(map(any, (piece.answer for piece in pieces[1]))) == 1


def test_a_dialogue_ends_before_a_turn_that_the_template_refuses(tmp_path) -> None:
    """Mistral's refuses an empty answer, as an end token at once leaves; the other dialogues are answered all the same.
    Here short answers are refused."""
    strict = CHATML.replace(
        "{{'<|im_start|>'",
        "{% if message['role'] == 'assistant' and message['content']|length < 6 %}"
        "{{ raise_exception('empty') }}{% endif %}"
        "{{'<|im_start|>'",
        1,
    )
    job = make_job(tmp_path, make_target(strict), max_new_tokens=5, regenerate="greedy")
    fit = Fit(job.target, job.recipe.data, NOON)
    told = meter()
    two, one = answer(job.target, [Dialogue(("a", "b")), Dialogue(("c",))], fit, 0, told)
    assert len(two) == len(one) == 1 and told.done == 2
    assert sum(two[0].answer) <= 5, "of the first turn alone"
    with pytest.raises(DataError, match="refuses a dialogue: empty"):
        fit.prompt(Dialogue(("a", "b")).messages(["x"]))


def test_a_dialogue_ends_behind_an_answer_that_special_tokens_part(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of gpt-oss, whose words of reasoning and answer run together in the text."""
    fit, start, end = make_fit(tmp_path, regenerate="greedy"), 1, 2
    said = iter([[70, end], [70, start, 71, end], [70, end]])
    monkeypatch.setattr(
        shards,
        "write",
        lambda target, prompts, *rest: [SimpleNamespace(ids=next(said), given_TI=None) for _ in prompts],
    )
    told, (whole, parted) = meter(), (Dialogue(("a", "b")), Dialogue(("c", "d")))
    with pytest.warns(CoralWarning, match="an answer holds special tokens"):
        first, second = answer(fit.target, [whole, parted], fit, 0, told)
    assert [sum(sum(piece.answer) for piece in pieces) for pieces in (first, second)] == [4, 4]
    assert second[-1].ids[-4:] == [70, start, 71, end]
    assert fit.refused([whole]) == 0 and fit.refused([parted]) == 1


def test_of_a_dialogue_that_goes_on_the_last_features_alone_are_kept() -> None:
    first, second = Turn([1, 2], [3], torch.zeros(3, 1)), Turn([1, 2, 3, 4], [5], torch.ones(5, 1))
    pieces: list[Encoded] = []
    append(pieces, first)
    append(pieces, second)
    assert [piece.ids for piece in pieces] == [[1, 2, 3, 4, 5]] and pieces[0].given_TI is second.given_TI
    append(pieces, Turn([1, 9], [3], torch.zeros(3, 1)))
    assert len(pieces) == 2


def test_a_dialogue_counts_as_soon_as_its_last_answer_ends(tmp_path) -> None:
    """Not when a whole shard has: the time left is told from it."""
    told: list[int] = []
    shown = Meter(lambda stage, done, total, numbers: told.append(done), "answers", 100)
    long = "x" * make_fit(tmp_path).spec.max_length
    dialogues = [Dialogue(("a",)), Dialogue(("b", "c")), Dialogue(("d",)), Dialogue(("e",)), Dialogue(("f", long))]
    answer(make_target(), dialogues, make_fit(tmp_path, max_new_tokens=5, batch_size=1), 0, shown)
    assert sorted(set(told)) == [0, 1, 2, 3, 4, 5]


def test_no_answer_exceeds_the_lengths_of_the_recipe(tmp_path) -> None:
    fit = make_fit(tmp_path, max_length=40, max_new_tokens=30)
    dialogues = [Dialogue(("q" * length,)) for length in range(1, 8)]
    pieces = [piece for several in answer(make_target(), dialogues, fit, 0, meter()) for piece in several]
    assert max(len(piece.ids) for piece in pieces) <= 40
    assert all(1 <= sum(piece.answer) <= 30 for piece in pieces)
    assert [piece.answer for piece in pieces] == [sorted(piece.answer) for piece in pieces], "answers come last"


def test_sampled_answers_follow_the_seed(tmp_path) -> None:
    fit = make_fit(tmp_path, regenerate="sample")
    dialogues = [Dialogue((text,)) for text in ("one", "two", "three")]
    first, again, other = (answer(make_target(), dialogues, fit, seed, meter()) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_given_answers_are_kept_and_cut(tmp_path) -> None:
    fit = make_fit(tmp_path, regenerate="none", max_length=50)
    given = Dialogue(("Hi", "and"), ("Yes", "n" * 40), "")
    (pieces,) = answer(make_target(CHATML), [given], fit, 0, meter())
    (piece,) = pieces
    assert len(piece.ids) == 50
    text = "".join(
        fit.tokenizer.decode([token]) if not own else f"[{fit.tokenizer.decode([token])}]"
        for token, own in zip(piece.ids, piece.answer, strict=True)
    )
    assert text.startswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Y][e][s][<|im_end|>]\n<|im_start|>")


def test_features_that_came_with_the_answers_are_not_read_again(tmp_path, monkeypatch) -> None:
    """Of several turns the last one's hold all; beside a piece that has none, in the pieces' order."""
    fit, target = make_fit(tmp_path, max_new_tokens=5, regenerate="greedy"), make_target(layers=4).tapping((1, 2, 3))
    dialogues = [Dialogue(("x",)), Dialogue(("ab", "cd", "e"), system="s"), Dialogue(("yyy", "z"))]
    kept = [piece for several in answer(target, dialogues, fit, 0, meter(), torch.float32) for piece in several]
    assert all(piece.given_TI is not None for piece in kept)
    bare = [Encoded(piece.ids, piece.answer) for piece in kept]
    read: list[int] = []
    tapped = shards.tap
    monkeypatch.setattr(
        shards, "tap", lambda target, ids_BT, valid_BT: read.append(len(ids_BT)) or tapped(target, ids_BT, valid_BT)
    )
    wanted = tap_all(target, bare, 4, torch.float32, meter())
    assert sum(read) == len(bare)
    read.clear()
    samples = tap_all(target, [kept[0], bare[1], *kept[2:]], 4, torch.float32, meter())
    assert read == [1]
    for sample, other in zip(samples, wanted, strict=True):
        assert torch.equal(sample.ids_T, other.ids_T) and torch.equal(sample.answer_T, other.answer_T)
        torch.testing.assert_close(sample.feature_TD, other.feature_TD, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(sample.tap_TI, other.tap_TI, rtol=1e-5, atol=1e-4)
