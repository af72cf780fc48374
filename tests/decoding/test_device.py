"""What decoding asks of a GPU, on a pretended one (pretend.py): nothing that it refuses, and one look a round."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import transformers

from benchmarks import decode_gpu
from benchmarks.batch import decode_all
from coral_core.api.generate import Speculate
from coral_core.decoding import recorded as recording
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.measure import measure_costs
from coral_core.decoding.policy.constant import ConstantTree
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.table import Request
from coral_core.head.groups import Groups
from coral_core.head.heads import FullHead, GroupedHead, Head, Router
from coral_core.kernels import blocks
from coral_core.target.target import Target
from tests.decoding import pretend
from tests.decoding.policy.test_adaptive import DEAR
from tests.decoding.test_memory import ids_of, words
from tests.tiny import VOCAB, tiny_drafter, tiny_target

SHAPE = TreeShape(depth=4, nodes=7, topk=3)
GREEDY, DRAWN = Sampler(), Sampler(temperature=1.0, top_p=0.9, top_k=40, min_p=0.01, seed=3)
PENALISED = Sampler(repetition_penalty=1.3)
SAMPLERS = pytest.mark.parametrize("sampler", [GREEDY, DRAWN, PENALISED], ids=["greedy", "drawn", "penalised"])


def on_host(family: str = "llama") -> Target:
    return dataclasses.replace(tiny_target(family), stop_ids=frozenset())


def on_device(family: str = "llama", *, recorded: bool = False) -> Engine:
    """To be called within the device."""
    target = dataclasses.replace(pretend.target_on_device(on_host(family)), graphs=recorded)
    return Engine(target, pretend.on_device(tiny_drafter(target)), FullHead(target.lent), SHAPE)


def watched(rounds: Iterator[Round], device: pretend.Device) -> tuple[list[int], list[dict[str, int]]]:
    """What is said, and what each round after the prompt's cost."""
    said, spent = [], []
    device.spent()
    for event in rounds:
        said += event.new_ids
        spent.append(device.spent())
    return said, spent[1:]


# Not gpt2: with no mask, transformers reads its prompt back to warn of padding (warn_if_padding_and_no_attention_mask).
@pytest.mark.parametrize(
    ("family", "sampler"),
    [
        *((name, GREEDY) for name in ("llama", "qwen3", "mistral-sliding", "gemma3-mixed", "gpt-neox", "cohere")),
        ("llama", DRAWN),
        ("llama", PENALISED),
    ],
)
def test_a_round_waits_for_the_device_once(family: str, sampler: Sampler) -> None:
    """For the tokens that it accepts; and the host sends nothing. The answer is the host's own."""
    prompt = words(1, 9)
    expected = ids_of(plain(on_host(family), prompt, sampler, 12))
    with pretend.Device() as device:
        engine = on_device(family)
        for rounds in (plain(engine.target, prompt, sampler, 12), engine.decode(prompt, sampler, 12)):
            said, spent = watched(rounds, device)
            assert said == expected
            assert {(look["reads"], look["sends"]) for look in spent} == {(1, 0)}


def best_of_chosen(
    hidden_ND: torch.Tensor,
    rows_VD: torch.Tensor,
    start_G: torch.Tensor,
    chosen_NR: torch.Tensor,
    bias_V: torch.Tensor | None = None,
) -> blocks.Best:
    """The kernel's answer from all products, without a look at which groups were chosen."""
    logits_NV = hidden_ND @ rows_VD.T if bias_V is None else hidden_ND @ rows_VD.T + bias_V
    row_V = torch.arange(rows_VD.shape[0], device=rows_VD.device)
    group_V = torch.searchsorted(start_G, row_V, right=True, out_int32=False) - 1
    active_V = (group_V[:, None] == chosen_NR[0]).any(dim=1)
    logprob_NV = logits_NV.masked_fill(~active_V, -torch.inf).log_softmax(-1)
    return blocks.Best(*logprob_NV.topk(blocks.BEST))


def heads(target: Target, monkeypatch: pytest.MonkeyPatch) -> list[Head]:
    monkeypatch.setattr(blocks, "fits", lambda lent, rows_VD: True)
    monkeypatch.setattr(blocks, "grouped_best", best_of_chosen)
    torch.manual_seed(5)
    router = pretend.on_device(Router(target.lent.head_VD.shape[1], 12))
    return [FullHead(target.lent), GroupedHead(target.lent, Groups.from_order(torch.arange(VOCAB), 12), router, 6)]


@SAMPLERS
def test_a_recorded_round_is_two_replays_and_a_few_launches(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft, the target; then the picks are read and the path is kept. It was 13 replays and 250 launches."""
    prompt = words(2, 9)
    expected = ids_of(plain(on_host(), prompt, sampler, 12))
    with pretend.Device() as device:
        monkeypatch.setattr(recording, "record", device.record)
        engine = on_device(recorded=True)
        judged = 25 if sampler.temperature or sampler.looks_back else 0  # processors, noise and the tokens so far
        for rounds, replays, launches in (
            (plain(engine.target, prompt, sampler, 12), 1, 12),
            *(
                (dataclasses.replace(engine, head=head).decode(prompt, sampler, 12), 2, 40)
                for head in heads(engine.target, monkeypatch)
            ),
        ):
            said, spent = watched(rounds, device)
            assert said == expected
            last = spent[-1]
            assert (last["reads"], last["sends"], last["graphs"]) == (1, 0, replays)
            assert last["launches"] <= launches + judged


def test_a_tree_that_is_chosen_by_its_cost_asks_the_device_nothing() -> None:
    prompt = words(3, 9)
    expected = ids_of(plain(on_host(), prompt, GREEDY, 40))
    with pretend.Device() as device:
        engine = dataclasses.replace(on_device(), costs=DEAR)
        assert isinstance(engine.plan(), ConstantTree)
        assert {event.kind for event in engine.decode(prompt, GREEDY, 40)} == {"prefill", "draft", "plain"}
        said, spent = watched(engine.decode(prompt, GREEDY, 40), device)
    assert said == expected
    assert {(look["reads"], look["sends"]) for look in spent} == {(1, 0)}


def test_costs_are_measured_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coral_core.decoding.measure.REPEATS", (1, 1))
    with pretend.Device() as device:
        monkeypatch.setattr(recording, "record", device.record)
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
        costs = measure_costs(on_device(recorded=True))
    assert costs.step_s > 0 and set(costs.level) and costs.verify[1] == 1.0


@SAMPLERS
def test_a_batch_says_what_it_says_on_the_host(sampler: Sampler) -> None:
    prompts = [words(seed, 4 + seed) for seed in range(3)]
    expected = [ids_of(plain(on_host(), prompt, sampler, 8)) for prompt in prompts]
    said: list[list[int]] = [[] for _ in prompts]
    with pretend.Device():
        for number, event in decode_all(on_device(), [Request(prompt, sampler, 8) for prompt in prompts], 2):
            said[number] += event.new_ids
    assert said == expected


def test_generate_of_transformers_runs_there() -> None:
    prompt_BT = torch.tensor([words(4, 7)])
    config = transformers.GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0, repetition_penalty=1.2)
    expected = on_host().model.generate(prompt_BT, generation_config=config)[0].tolist()
    with pretend.Device():
        engine = on_device()
        given = prompt_BT.to(pretend.DEVICE)
        said = engine.target.model.generate(given, generation_config=config, custom_generate=Speculate(engine))
        assert said[0].tolist() == expected


def test_the_gpu_part_of_the_benchmark_runs_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend.Device() as device:
        monkeypatch.setattr(recording, "record", device.record)
        rows = [
            row
            for recorded in (False, True)
            for row in decode_gpu.measure("tiny", pretend.DEVICE, torch.bfloat16, 1, recorded)
        ]
    assert {row["graphs"] for row in rows} == {False, True}
    with torch.device("meta"):
        assert torch.tensor([]).is_meta, "transformers loads by it; forgotten, the next test's frequencies are garbage"
    assert all(value > 0 for name, value in decode_gpu.figures(rows).items() if name.endswith("over_plain"))
