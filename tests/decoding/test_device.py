"""What decoding asks of a GPU, on a pretended one (pretend.py): nothing that it refuses, and one look a round."""

import dataclasses

import pytest

from coral_core.decoding.drafting import TreeShape
from coral_core.decoding.engine import Engine
from coral_core.decoding.plain import plain
from coral_core.decoding.sampling import Sampler
from coral_core.head.full import FullHead
from tests.decoding import pretend
from tests.decoding.test_memory import ids_of, words
from tests.tiny import tiny_drafter, tiny_target

SHAPE = TreeShape(depth=4, nodes=7, topk=3)


def engine_on_device(family: str) -> Engine:
    target = pretend.target_on_device(tiny_target(family))
    target = dataclasses.replace(target, stop_ids=frozenset())
    return Engine(target, pretend.on_device(tiny_drafter(tiny_target(family))), FullHead(target.lent), SHAPE)


# Not gpt2: with no mask, transformers reads its prompt back to warn of padding (warn_if_padding_and_no_attention_mask).
@pytest.mark.parametrize(
    ("family", "sampler"),
    [
        *(
            (family, Sampler())
            for family in ("llama", "qwen3", "mistral-sliding", "gemma3-mixed", "gpt-neox", "cohere")
        ),
        ("llama", Sampler(temperature=1.0, top_p=0.9, top_k=40, min_p=0.01, seed=3)),
        ("llama", Sampler(repetition_penalty=1.3)),
    ],
    ids=["llama", "qwen3", "mistral-sliding", "gemma3-mixed", "gpt-neox", "cohere", "llama T=1", "llama penalty"],
)
def test_a_round_waits_for_the_device_once(family: str, sampler: Sampler) -> None:
    """For the tokens that it accepts; and the host sends nothing. The answer is the host's own."""
    endless = dataclasses.replace(tiny_target(family), stop_ids=frozenset())
    prompt = words(1, 9)
    expected = ids_of(plain(endless, prompt, sampler, 12))
    with pretend.Device() as device:
        engine = engine_on_device(family)
        for rounds in (plain(engine.target, prompt, sampler, 12), engine.decode(prompt, sampler, 12)):
            said, looks = [], []
            device.spent()
            for event in rounds:
                said += event.new_ids
                looks.append(device.spent())
            assert said == expected
            assert {(look["reads"], look["sends"]) for look in looks[1:]} == {(1, 0)}
