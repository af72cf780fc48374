"""Streamed text is `decode` of the whole, for every kind of decoder and whatever the ids are, in linear time."""

import functools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from coral_core.api.stream import TextStream
from tests.data.helpers import make_tokenizer

CODE = "def f(x):\n    if x:\n        return  x\n\n    # naïve ☕ 你好 \U0001f600\n    return 'don't' , x !\n"
WORDS = [
    "▁def",
    "▁return",
    "▁",
    "▁▁",
    "▁▁▁▁",
    "def",
    "return",
    "x",
    "(",
    "):",
    "'",
    "'t",
    "n",
    "▁n",
    ".",
    "▁.",
    "é",
    "\n",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _fast(vocabulary: list[str], decoder: Any, **options: Any) -> transformers.PreTrainedTokenizerFast:
    numbers = {piece: number for number, piece in enumerate(["<unk>", "<s>", "</s>", *vocabulary])}
    inner = tokenizers.Tokenizer(models.BPE(numbers, [], unk_token="<unk>", byte_fallback="<0x00>" in numbers))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoder
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **options
    )


def llama2() -> transformers.PreTrainedTokenizerFast:
    """The decoder of Llama-2, Vicuna and Mistral 0.x: bytes, and the first space of all stripped."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _fast([*BYTES, *WORDS], decoders.Sequence(steps))


def gemma() -> transformers.PreTrainedTokenizerFast:
    return _fast(
        [*BYTES, *WORDS], decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    )


def metaspace() -> transformers.PreTrainedTokenizerFast:
    return _fast(WORDS, decoders.Metaspace())


def wordpiece() -> transformers.PreTrainedTokenizerFast:
    """Cleans up the spaces before punctuation, as BERT does."""
    pieces = ["<unk>", "<s>", "</s>", "def", "##ing", "n", "##'t", "'", "t", "s", ".", "!", ",", "\n", "##\n", "don"]
    inner = tokenizers.Tokenizer(
        models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>")
    )
    inner.decoder = decoders.WordPiece(cleanup=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=True,
    )


KINDS = {"byte-level": make_tokenizer, "llama-2": llama2, "gemma": gemma, "metaspace": metaspace, "word": wordpiece}


@functools.cache
def tokenizer_of(kind: str) -> transformers.PreTrainedTokenizerFast:
    return KINDS[kind]()


def streamed(tokenizer: Any, ids: list[int], at_once: int, before: Sequence[int] = ()) -> str:
    stream = TextStream(tokenizer, before)
    pieces = [stream.feed(ids[first : first + at_once]) for first in range(0, len(ids), at_once)]
    text = "".join([*pieces, stream.rest()])
    assert text == stream.text
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_is_the_decoded_whole(kind: str) -> None:
    """Code, and ids at random: specials in the midst, bytes that are no character, spaces first, runs of bytes."""
    tokenizer, draw = tokenizer_of(kind), random.Random(0)
    answers = [tokenizer(CODE * 3)["input_ids"]]
    for few in (3, 20, len(tokenizer)):
        some = [draw.sample(range(len(tokenizer)), min(few, len(tokenizer))) for _ in range(12)]
        answers += [draw.choices(pieces, k=draw.choice((5, 150))) for pieces in some]
    for ids in answers:
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        for at_once in (1, 4):
            assert streamed(tokenizer, ids, at_once) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_prompt_the_text_is_what_the_whole_has_beyond_the_prompts(kind: str) -> None:
    """Cut at every place of code, and at random places of ids at random."""
    tokenizer, draw = tokenizer_of(kind), random.Random(1)
    code = tokenizer(CODE)["input_ids"]
    cuts = [(code, cut) for cut in range(len(code))]
    for few in (3, 20, len(tokenizer)):
        some = draw.sample(range(len(tokenizer)), min(few, len(tokenizer)))
        cuts += [(draw.choices(some, k=150), draw.randrange(150)) for _ in range(20)]
    compared = 0
    for ids, cut in cuts:
        prompt, whole = (tokenizer.decode(some, skip_special_tokens=True) for some in (ids[:cut], ids))
        if whole.startswith(prompt) and not prompt.endswith("\ufffd"):  # else the answer changes the prompt's own text
            assert prompt + streamed(tokenizer, ids[cut:], 1, ids[:cut]) == whole
            compared += 1
    assert compared > len(code) / 2


@pytest.mark.parametrize("kind", ["llama-2", "metaspace"])
def test_an_answer_after_a_prompt_keeps_its_first_space(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    prompt, answer = (tokenizer.convert_tokens_to_ids(pieces) for pieces in (["▁def", "x"], ["▁return", "x"]))
    assert streamed(tokenizer, answer, 1, [1, *prompt]) == " returnx"
    assert streamed(tokenizer, answer, 1) == streamed(tokenizer, answer, 1, [1]) == "returnx"


def test_a_character_that_a_prompt_of_ids_leaves_open_is_told_whole() -> None:
    for kind, pieces in (("llama-2", ["<0xC3>", "<0xA9>"]), ("byte-level", make_tokenizer().tokenize("é"))):
        tokenizer = tokenizer_of(kind)
        x, first, last = tokenizer.convert_tokens_to_ids(["x", *pieces])
        assert streamed(tokenizer, [last, x], 1, [x, first]) == "éx"


def test_an_indented_line_keeps_its_spaces() -> None:
    """Decoding that began again at a line's end lost one space of every indented line."""
    tokenizer = tokenizer_of("llama-2")
    pieces = ["▁def", "\n", "▁▁▁▁", "▁return", "<0x0A>", "▁▁▁▁", "x"] * 40
    ids = tokenizer.convert_tokens_to_ids(pieces)
    assert streamed(tokenizer, ids, 1) == "def\n     return\n    x" + " def\n     return\n    x" * 39


def test_a_wrong_byte_spoils_its_run_before_any_of_it_is_shown() -> None:
    tokenizer = tokenizer_of("llama-2")
    ids = tokenizer.convert_tokens_to_ids(["x", "<0xC3>", "<0xA9>", "<0xFF>", "x"])
    assert streamed(tokenizer, ids, 1) == tokenizer.decode(ids) == "x\ufffd\ufffd\ufffdx"


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.decoded = inner, 0

    def decode(self, ids: list[int], **options: Any) -> str:
        self.decoded += len(ids)
        return str(self.inner.decode(ids, **options))

    def convert_ids_to_tokens(self, token: int) -> str:
        return str(self.inner.convert_ids_to_tokens(token))


@pytest.mark.parametrize("kind", ["byte-level", "llama-2"])
@pytest.mark.parametrize("what", ["x", "a broken character", "a run of bytes"])
def test_one_long_line_takes_linear_time(kind: str, what: str) -> None:
    tokenizer = tokenizer_of(kind)
    broken = "<0x80>" if kind == "llama-2" else tokenizer.tokenize("é")[1]
    piece = {"x": "x", "a broken character": broken, "a run of bytes": "<0x41>" if kind == "llama-2" else broken}[what]
    counting = Counting(tokenizer)
    ids = tokenizer.convert_tokens_to_ids([piece]) * 3000
    assert len(streamed(counting, ids, 1)) == 3000
    assert counting.decoded < 80 * len(ids)


def test_text_comes_as_soon_as_it_is_sure() -> None:
    stream = TextStream(tokenizer_of("llama-2"))
    ids = tokenizer_of("llama-2").convert_tokens_to_ids(["▁", "x", "▁return", "<0xC3>", "<0xA9>", "x", "\n"])
    assert [stream.feed([token]) for token in ids] == ["", "x", " return", "", "", "éx", "\n"]
