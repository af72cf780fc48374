"""Masks drawn by hand over the chat templates of nine families: ⟦ ⟧ encloses what the target wrote.

The tokenizer is a byte-level BPE made here, with the family's special tokens.
"""

import dataclasses

import pytest
import tokenizers
import transformers

from coral_core.errors import DataError
from coral_core.target.template import (
    Encoded,
    Turn,
    encode,
    join,
    keeps_turns,
    prompt_ids,
    takes_system,
    user_turn,
)
from tests.target.chat_templates import (
    CHATML,
    GEMMA,
    LLAMA_2,
    LLAMA_3,
    MISTRAL,
    PHI_3,
    QWEN_2_5,
    QWEN_3,
    TAGGED,
)


@dataclasses.dataclass
class Family:
    """A template, its special tokens, and the drawing of one dialogue of two turns."""

    template: str | None
    special: list[str]
    stop: list[str]
    drawings: list[str]
    header: str
    stop_text: str
    system: bool = True
    name: str = "some/model"
    bos: str = "<s>"
    eos: str = "</s>"


DIALOGUE = [
    {"role": "user", "content": "Hi there."},
    {"role": "assistant", "content": "Hello you."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Good bye."},
]
IM = ["<|im_start|>", "<|im_end|>"]
CHATML_DRAWING = (
    "<|im_start|>user\nHi there.<|im_end|>\n<|im_start|>assistant\n⟦Hello you.<|im_end|>⟧\n"
    "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n⟦Good bye.<|im_end|>⟧"
)
VICUNA_OPENING = (
    "<s>A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
FAMILIES = {
    "Llama-2": Family(
        LLAMA_2,
        [],
        ["</s>"],
        ["<s>[INST] Hi there. [/INST]⟦ Hello you. </s>⟧<s>[INST] And now? [/INST]⟦ Good bye. </s>⟧"],
        "<s>[INST]",
        "[/INST]",
    ),
    "Llama-3": Family(
        LLAMA_3,
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        ["<|end_of_text|>", "<|eot_id|>"],
        [
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi there.<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello you.<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Good bye.<|eot_id|>⟧"
        ],
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
    ),
    "Qwen2.5": Family(
        QWEN_2_5,
        IM,
        ["<|im_end|>", "<|endoftext|>"],
        ["<|im_start|>system\nYou are Qwen.<|im_end|>\n" + CHATML_DRAWING],
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant",
        eos="<|endoftext|>",
    ),
    # The template drops an earlier turn's think block: each answer is learnt in the context it really had.
    "Qwen3": Family(
        QWEN_3,
        IM,
        ["<|im_end|>", "<|endoftext|>"],
        [
            "<|im_start|>user\nHi there.<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Hello you.<|im_end|>⟧",
            "<|im_start|>user\nHi there.<|im_end|>\n<|im_start|>assistant\nHello you.<|im_end|>\n"
            "<|im_start|>user\nAnd now?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Good bye.<|im_end|>⟧",
        ],
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant",
        eos="<|endoftext|>",
    ),
    "Mistral": Family(
        MISTRAL,
        [],
        ["</s>"],
        ["<s>[INST] Hi there. [/INST]⟦Hello you.</s>⟧[INST] And now? [/INST]⟦Good bye.</s>⟧"],
        "<s>[INST]",
        "[/INST]",
        system=False,
    ),
    "Gemma": Family(
        GEMMA,
        ["<start_of_turn>", "<end_of_turn>"],
        ["<eos>", "<end_of_turn>"],
        [
            "<bos><start_of_turn>user\nHi there.<end_of_turn>\n<start_of_turn>model\n⟦Hello you.<end_of_turn>⟧\n"
            "<start_of_turn>user\nAnd now?<end_of_turn>\n<start_of_turn>model\n⟦Good bye.<end_of_turn>⟧"
        ],
        "<bos><start_of_turn>user\n",
        "<end_of_turn>\n<start_of_turn>model",
        system=False,
        bos="<bos>",
        eos="<eos>",
    ),
    # The template closes a dialogue with its eos, which an unfinished one does not have: the answer ends before it.
    "Phi-3": Family(
        PHI_3,
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        ["<|end|>", "<|endoftext|>"],
        [
            "<|user|>\nHi there.<|end|>\n<|assistant|>\n⟦Hello you.<|end|>⟧\n"
            "<|user|>\nAnd now?<|end|>\n<|assistant|>\n⟦Good bye.<|end|>⟧"
        ],
        "<|user|>\n",
        "<|end|>\n<|assistant|>",
        eos="<|endoftext|>",
    ),
    # Published without a template: the one that coral knows is found by the model's name.
    "Vicuna": Family(
        None,
        [],
        ["</s>"],
        [
            VICUNA_OPENING + "USER: Hi there. ASSISTANT:⟦ Hello you.</s>⟧USER: And now? ASSISTANT:⟦ Good bye.</s>⟧",
        ],
        VICUNA_OPENING + "USER:",
        "ASSISTANT:",
        name="lmsys/vicuna-7b-v1.5",
    ),
    "ChatML": Family(
        CHATML, IM, ["<|im_end|>"], [CHATML_DRAWING], "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant"
    ),
    "ChatML with generation tags": Family(
        TAGGED,
        IM,
        ["<|im_end|>"],
        [CHATML_DRAWING + "\n"],
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant",
    ),
}


WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama-3 and Qwen cut text; newlines stay one token whatever follows."""


def make_tokenizer(family: Family) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE with some merges, so that tokens can straddle a careless boundary."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = [family.bos, family.eos, *family.special]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["user assistant Hello you. Good bye. Hi there.\n\n", " Hello", "\n\nHello"] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=family.template,
        name_or_path=family.name,
    )


def draw(tokenizer: transformers.PreTrainedTokenizerFast, encoded: Encoded) -> str:
    """The text, with ⟦ ⟧ around the tokens of the answers."""
    text, inside, run = "", False, []
    for token, answer in [*zip(encoded.ids, encoded.answer, strict=True), (None, False)]:
        if answer != inside or token is None:
            text += tokenizer.decode(run) + ("⟦" if answer else "⟧" if inside else "")
            inside, run = answer, []
        run += [token]
    return text


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def stops(tokenizer: transformers.PreTrainedTokenizerFast, family: Family) -> list[int]:
    return tokenizer.convert_tokens_to_ids(family.stop)


def test_the_mask_is_the_drawing(family: Family) -> None:
    tokenizer = make_tokenizer(family)
    pieces = encode(tokenizer, DIALOGUE, stops(tokenizer, family))
    assert [draw(tokenizer, piece) for piece in pieces] == family.drawings


def test_the_prompt_is_what_precedes_the_first_answer(family: Family) -> None:
    tokenizer = make_tokenizer(family)
    prompt = tokenizer.decode(prompt_ids(tokenizer, DIALOGUE[:1]))
    assert family.drawings[0].split("⟦")[0].removesuffix("<think>\n\n</think>\n\n") == prompt


def test_whether_earlier_answers_stay_as_they_were_written(family: Family) -> None:
    """Llama-2 and Vicuna put a space before an answer that the words do not have; Qwen3 drops the reasoning."""
    tokenizer = make_tokenizer(family)
    changing = family.template == QWEN_3 or "⟦ " in family.drawings[0]
    assert keeps_turns(tokenizer, stops(tokenizer, family)) is not changing


def test_what_surrounds_a_users_words(family: Family) -> None:
    tokenizer = make_tokenizer(family)
    turn = user_turn(tokenizer)
    assert tokenizer.decode(turn.header) == family.header
    assert turn.stop_text == family.stop_text
    special = family.stop_text.startswith("<")
    assert [family.stop_text.startswith(tokenizer.decode([stop])) for stop in turn.stop_ids] == [True] * special


def test_a_system_message_is_shown_where_the_template_takes_one(family: Family) -> None:
    tokenizer = make_tokenizer(family)
    messages = [{"role": "system", "content": "Be brief."}, *DIALOGUE]
    assert takes_system(tokenizer, answered=True) == takes_system(tokenizer, answered=False) == family.system
    if not family.system:
        return
    pieces = encode(tokenizer, messages, stops(tokenizer, family))
    assert "Be brief." in draw(tokenizer, pieces[0]).split("⟦")[0]
    spans = [piece.split("⟧")[0] for text in family.drawings for piece in text.split("⟦")[1:]]
    drawn = [part.split("⟧")[0] for piece in pieces for part in draw(tokenizer, piece).split("⟦")[1:]]
    assert drawn == spans


GENERATION_BODY = "{%- generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"


@pytest.mark.parametrize(
    "body",
    [
        "{%- generation %}{{ message['content'] + '<|im_end|>\\n' }}{% endgeneration %}",
        "{%+ generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\\n' }}",
    ],
)
def test_generation_tags_that_enclose_too_much_or_too_little(body: str) -> None:
    """Both are published so: a newline that the target never writes, and an end that it does."""
    assert GENERATION_BODY in TAGGED
    tokenizer = changed(TAGGED.replace(GENERATION_BODY, body))
    (piece,) = encode(tokenizer, DIALOGUE, stops(tokenizer, FAMILIES["ChatML"]))
    assert draw(tokenizer, piece) == CHATML_DRAWING + "\n"


def test_generation_tags_around_the_header_and_an_empty_think_block() -> None:
    """SmolLM3's template does so."""
    header = "{{ '<|im_start|>assistant\\n' }}"
    empty = "<think>\\n\\n</think>\\n\\n"
    template = TAGGED.replace(header + "{%- generation %}", "{% generation %}" + header + "{{ '" + empty + "' }}")
    template = template.replace(
        "{{ '<|im_start|>assistant\\n' }}{% endif %}",
        header
        + "{% if enable_thinking is defined and not enable_thinking %}{{ '"
        + empty
        + "' }}{% endif %}{% endif %}",
    )
    tokenizer = changed(template)
    (piece,) = encode(tokenizer, DIALOGUE, stops(tokenizer, FAMILIES["ChatML"]))
    assert draw(tokenizer, piece) == CHATML_DRAWING.replace("⟦", "<think>\n\n</think>\n\n⟦") + "\n"


def test_reasoning_that_was_given_is_learnt() -> None:
    family = FAMILIES["Qwen3"]
    tokenizer = make_tokenizer(family)
    messages = [DIALOGUE[0], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello you."}]
    (piece,) = encode(tokenizer, messages, stops(tokenizer, family))
    assert draw(tokenizer, piece) == (
        "<|im_start|>user\nHi there.<|im_end|>\n<|im_start|>assistant\n⟦<think>\nHm.\n</think>\n\nHello you.<|im_end|>⟧"
    )


def test_join_keeps_one_sequence_while_prompts_agree() -> None:
    """Turn 2's prompt begins with all of turn 1; turn 3's does not."""
    turns = [Turn([1, 2], [3, 4]), Turn([1, 2, 3, 4, 5], [6]), Turn([1, 2, 3, 9], [7, 7])]
    assert join(turns) == [
        Encoded([1, 2, 3, 4, 5, 6], [False, False, True, True, False, True]),
        Encoded([1, 2, 3, 9, 7, 7], [False, False, False, False, True, True]),
    ]


def changed(template: str | None, name: str = "odd/model") -> transformers.PreTrainedTokenizerFast:
    return make_tokenizer(dataclasses.replace(FAMILIES["ChatML"], template=template, name=name))


def test_a_generation_prompt_that_disagrees_is_an_error_that_names_the_template() -> None:
    tokenizer = changed(CHATML.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>bot\\n' }}"))
    with pytest.raises(DataError, match=r"template of 'odd/model' has no generation tags.*Set data.regenerate=greedy"):
        encode(tokenizer, DIALOGUE, [])


def test_a_token_across_the_boundary_is_an_error() -> None:
    """The generation prompt ends in a newline, the answer begins with one, and the tokenizer has a token for both."""
    tokenizer = changed(CHATML)
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    messages = [DIALOGUE[0], {"role": "assistant", "content": "\nHello"}]
    with pytest.raises(DataError, match="does not begin with its generation prompt"):
        encode(tokenizer, messages, [])


def test_an_all_zero_mask_is_an_error() -> None:
    tokenizer = changed(TAGGED.replace("message['role'] == 'assistant'", "message['role'] == 'bot'"))
    with pytest.raises(DataError, match=r"template of 'odd/model' marks no token .* nothing to learn from"):
        encode(tokenizer, DIALOGUE, [])
    with pytest.raises(DataError, match="marks no token"):
        encode(changed(CHATML), DIALOGUE[:1], [])


def test_a_tokenizer_without_a_template_is_an_error() -> None:
    with pytest.raises(DataError, match=r"tokenizer of 'odd/model' has no chat template.*target\.chat_template to"):
        prompt_ids(changed(None), DIALOGUE[:1])


def test_several_templates_without_a_default_are_an_error() -> None:
    with pytest.raises(DataError, match=r"tokenizer of 'odd/model': .*Set target\.chat_template"):
        prompt_ids(changed({"tool_use": CHATML, "rag": CHATML}), DIALOGUE[:1])


def test_a_dialogue_that_the_template_refuses_is_reported_in_its_words() -> None:
    tokenizer = make_tokenizer(FAMILIES["Gemma"])
    with pytest.raises(DataError, match="refuses a dialogue: Conversation roles must alternate"):
        prompt_ids(tokenizer, [DIALOGUE[0], DIALOGUE[0]])


def test_a_template_with_nothing_before_the_users_words_cannot_open_a_users_turn() -> None:
    with pytest.raises(DataError, match="puts nothing before a user's words"):
        user_turn(changed("{{ messages[0]['content'] }} said"))


def test_a_template_that_hides_the_users_words_cannot_open_a_users_turn() -> None:
    with pytest.raises(DataError, match="leaves out the words of messages of the role user"):
        user_turn(changed("{% if add_generation_prompt %}go{% endif %}"))
