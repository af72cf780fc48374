"""A drafter of EAGLE-3's shape: what it reads of the target, that words stay the same, and that a draft is its own."""

import dataclasses

import pytest
import torch

from benchmarks.batch import decode_all
from coral_core.decoding.cache import SlotCache
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.step import prefill
from coral_core.decoding.table import Request
from coral_core.errors import TargetError
from coral_core.target.load import tap_layers
from coral_core.target.target import Target
from tests.decoding.test_lossless import SAMPLERS, ids_of, some_prompt
from tests.tiny import FAMILIES, OracleHead, PlainHead, tiny_drafter, tiny_target

LAYERS = 3
KINDS = {
    "EAGLE-3": {},
    "EAGLE-3.1": {"norm_output": True, "fc_norm": True},
    "norm before residual": {"norm_before_residual": True},
}


def deep_target(family: str = "llama", layers: int = LAYERS) -> Target:
    """It never stops."""
    return dataclasses.replace(tiny_target(family, layers=layers), stop_ids=frozenset())


def wide_drafter(target: Target, **changes: object):
    return tiny_drafter(target, taps=tap_layers(target.model.config), **changes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["greedy", "T=0.7,p=0.9"])
def test_speculative_equals_plain_in_every_family(family: str, name: str) -> None:
    target, sampler = deep_target(family), SAMPLERS[name]
    prompt = some_prompt(1, 14)
    expected = ids_of(list(plain(target, prompt, sampler, 20)))
    head = OracleHead(expected, right=0.8)
    engine = Engine(target, wide_drafter(target), head, TreeShape(depth=4, nodes=12, topk=3))
    rounds = [head.follow(event) for event in engine.decode(prompt, sampler, 20)]
    assert ids_of(rounds) == expected
    assert sum(event.accepted_drafts for event in rounds) >= 4


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_batch_says_what_each_prompt_alone_says(kind: dict[str, bool]) -> None:
    target = deep_target()
    engine = Engine(target, wide_drafter(target, **kind), PlainHead(target), TreeShape(depth=3, nodes=8, topk=3))
    prompts = [some_prompt(seed, length) for seed, length in ((0, 5), (1, 11), (2, 3))]
    alone = [list(engine.decode(prompt, Sampler(), 12)) for prompt in prompts]
    found: dict[int, list] = {number: [] for number in range(len(prompts))}
    for number, event in decode_all(engine, [Request(prompt, Sampler(), 12) for prompt in prompts], 2):
        found[number].append(event)
    assert [ids_of(rounds) for rounds in found.values()] == [ids_of(rounds) for rounds in alone]
    assert [[event.accepted_drafts for event in rounds] for rounds in found.values()] == [
        [event.accepted_drafts for event in rounds] for rounds in alone
    ]


@pytest.mark.parametrize("family", ["llama", "gemma3-mixed", "gpt2"])
def test_taps_are_the_inputs_of_the_layers_behind_any_cache(family: str) -> None:
    """Hooks on the layers themselves are the reference: an off-by-one layer would train, and accept nothing served."""
    target = deep_target(family, layers=8)
    taps = tap_layers(target.model.config)
    assert taps == (2, 4, 5)
    inputs: dict[int, torch.Tensor] = {}
    body = target.model.base_model
    layers = body.h if family == "gpt2" else body.layers

    def keep(layer: int):
        return lambda module, args, kwargs: inputs.__setitem__(layer, (args or list(kwargs.values()))[0][0])

    hooks = [layers[tap].register_forward_pre_hook(keep(tap), with_kwargs=True) for tap in taps]
    prompt_T = torch.tensor(some_prompt(3, 9))
    given_TI = prefill(target.tapping(taps), prompt_T, SlotCache(8, 9))
    for hook in hooks:
        hook.remove()
    wanted_TI = torch.cat([inputs[tap] for tap in taps], dim=-1)[: prompt_T.numel()]  # a forward fills rows up
    width = target.lent.embed_VD.shape[1]
    assert torch.equal(given_TI[:, : 3 * width], wanted_TI)
    assert torch.equal(given_TI[:, 3 * width :], prefill(target, prompt_T, SlotCache(8, 9)))


@pytest.mark.parametrize(
    ("layers", "taps"), [(3, (0, 1, 2)), (4, (1, 2, 3)), (6, (1, 3, 5)), (7, (2, 3, 4)), (30, (2, 15, 27))]
)
def test_three_different_layers_are_tapped(layers: int, taps: tuple[int, int, int]) -> None:
    config = dataclasses.replace(tiny_target()).model.config.__class__(num_hidden_layers=layers)
    assert tap_layers(config) == taps


def test_a_target_of_two_layers_and_a_drafter_of_a_deeper_target_are_refused() -> None:
    target = tiny_target()
    with pytest.raises(TargetError, match="2 layers, and an EAGLE-3 drafter reads three"):
        tap_layers(target.model.config)
    with pytest.raises(TargetError, match=r"input of layer 27 .* has 2: it was trained for another target"):
        Engine(target, tiny_drafter(target, taps=(2, 15, 27)), PlainHead(target), TreeShape(depth=2, nodes=2, topk=1))
