"""The rule behind every promise of equal answers: a row has the same bits whatever is read with it, and however.

Each case reads the tokens of one path in another way and compares the outputs of every part of the model, in the order
in which they are computed, bit for bit with one step per token. The first part that differs is named.
"""

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from benchmarks.batch import decode_all
from coral_core.decoding import tree
from coral_core.decoding.cache import SlotCache
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.step import prefill
from coral_core.decoding.table import Request, Table
from coral_core.kernels import exact
from coral_core.kernels.layers import PackedLinear
from coral_core.target.load import wrap
from coral_core.target.target import Target
from tests.decoding.test_lossless import ids_of, some_prompt
from tests.tiny import OracleHead, PlainHead, tiny_drafter, tiny_target

FAMILIES = ["llama", "qwen2", "qwen3", "mistral-sliding", "gemma", "gemma3-mixed", "phi3", "gpt-neox", "gpt2"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK = 8
"""Positions of a block in these tests, so that short paths have several."""
LLAMA = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
GEMMA = {"hidden_size": 640, "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 1}
WIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2": ("LlamaConfig", LLAMA),
    "Gemma 3": ("LlamaConfig", {**GEMMA, "head_dim": 256}),
    "one key head": ("LlamaConfig", {**GEMMA, "hidden_size": 200, "num_attention_heads": 5, "head_dim": 40}),
    "GPT-2": ("GPT2Config", {"n_embd": 768, "n_head": 12}),
    "not packed": ("LlamaConfig", LLAMA),
}
"""Widths of real models, for which several threads share a product."""
FEW = {"vocab_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 160, "initializer_range": 0.1}
Outputs = list[tuple[str, torch.Tensor]]
"""What each part of a model gave, with the part's name, in the order of the computation."""


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "BLOCK", BLOCK)


def target_in(family: str, dtype: torch.dtype) -> Target:
    """Its context is left whole: a random model's rotary factors need not be tried again."""
    model = copy.deepcopy(tiny_target(family).model).to(dtype)
    return dataclasses.replace(wrap(model, None), stop_ids=frozenset())


def fresh(target: Target) -> SlotCache:
    return SlotCache(target.model.config.num_hidden_layers, 120)


def outputs(target: Target, read: Callable[[], torch.Tensor]) -> Outputs:
    """What the parts give, first row by row, then the logits, in one pass."""
    found: Outputs = []

    def note(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor) and first.dim() == 3:
                found.append((name, first.clone()))

        return hook

    parts = [part.register_forward_hook(note(name)) for name, part in target.model.base_model.named_modules() if name]
    feature_BTD = read()
    for part in parts:
        part.remove()
    return [*found, ("logits", target.lent.logits(feature_BTD))]


def step(target: Target, cache: SlotCache, tokens: list[int]) -> torch.Tensor:
    """One more row, or several that follow each other."""
    past, new = cache.length, len(tokens)
    position_BT = torch.arange(past, past + new)[None]
    return target.forward(
        torch.tensor([tokens]), position_BT=position_BT, mask=target.causal_mask(past, new), cache=cache
    )


def steps(target: Target, path: list[int]) -> list[Outputs]:
    """A path, one row at a time."""
    cache = fresh(target)
    return [outputs(target, lambda token=token: step(target, cache, [token])) for token in path]  # type: ignore[misc]


def compare(one: Outputs, row_of_one: tuple[int, int], other: Outputs, row_of_other: tuple[int, int], of: str) -> None:
    """Every part's output for a row (answer, row), bit for bit; the first that differs is named."""
    rotary = "rotary_emb"
    assert [name for name, _ in one] == [name for name, _ in other]
    for (name, first_BTD), (_, second_BTD) in zip(one, other, strict=True):
        if rotary in name and first_BTD.shape[0] < row_of_one[0] + 1:
            continue
        a_D, b_D = first_BTD[row_of_one], second_BTD[row_of_other]
        differ = int((a_D != b_D).sum())
        assert differ == 0, f"{of}: the first output that differs is that of {name}, in {differ} of {a_D.numel()}"


def a_tree(path: list[int], siblings: int, seed: int) -> tree.Draft:
    """A tree whose first tokens of each level are wrong, level by level, and which holds the path all the same."""
    draw = random.Random(seed)
    token, parent, above = [path[0]], [0], 0
    for right in path[1:]:
        level = [token for token in draw.choices(range(3, 90), k=draw.randrange(siblings + 1)) if token != right]
        place = draw.randrange(len(level) + 1)
        level.insert(place, right)
        first = len(token)
        token += level
        parent += [above] * len(level)
        above = first + place
    parent_M = torch.tensor(parent)
    sees_MM = tree.ancestry(parent_M, len(path))
    depth_M = sees_MM.sum(1) - 1
    return tree.Draft(torch.tensor(token), parent_M, depth_M, sees_MM, torch.zeros(len(token)), len(path) - 1)


def right_rows(draft: tree.Draft, path: list[int]) -> list[int]:
    """The rows of a path."""
    rows = [0]
    for token in path[1:]:
        found_M = (draft.parent_M == rows[-1]) & (draft.token_M == token)
        found_M[0] = False
        rows.append(int(found_M.nonzero()))
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_row_has_the_same_bits_in_steps_chains_trees_and_prompts(family: str, dtype: torch.dtype) -> None:
    read_in_every_way(target_in(family, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [8], indirect=True)
@pytest.mark.parametrize("wide", WIDE)
@torch.no_grad()
def test_a_row_has_the_same_bits_where_threads_share_the_products(wide: str, threads: None, dtype: torch.dtype) -> None:
    target = wide_target(wide, dtype)
    if wide == "not packed":
        for part in target.model.modules():
            if isinstance(part, PackedLinear):
                part.__class__ = torch.nn.Linear
    read_in_every_way(target)


def wide_target(wide: str, dtype: torch.dtype) -> Target:
    name, shape = WIDE[wide]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**shape, **FEW), dtype=dtype)
    return dataclasses.replace(wrap(model, None), stop_ids=frozenset())


def read_in_every_way(target: Target) -> None:
    path = some_prompt(1, 30)
    alone = steps(target, path)

    cache = fresh(target)
    whole = outputs(target, lambda: step(target, cache, path))
    for row in range(len(path)):
        compare(alone[row], (0, 0), whole, (0, row), f"row {row} of a prompt")

    cache, first = fresh(target), 0
    for end in (1, 6, 7, 17, 30):
        chunk = outputs(target, lambda first=first, end=end: step(target, cache, path[first:end]))  # type: ignore[misc]
        for row in range(first, end):
            compare(alone[row], (0, 0), chunk, (0, row - first), f"row {row} of a prompt in chunks")
        first = end
        if end == 17:  # rows behind were read once, for another answer
            step(target, cache, some_prompt(9, 5))
            cache.truncate(17)

    for past in (1, 5, 14, 22):
        for siblings in (1, 5):
            behind_a_tree(target, path, past, siblings, alone)


def behind_a_tree(target: Target, path: list[int], past: int, siblings: int, alone: list[Outputs]) -> None:
    """Six rows of the path as part of a tree, and the row behind it, once the path is kept."""
    cache = fresh(target)
    step(target, cache, path[:past])
    draft = a_tree(path[past : past + 6], siblings, past)
    mask = tree.mask(target, past, draft.depth_M, draft.sees_MM)
    token_BM, position_BM = draft.token_M[None], past + draft.depth_M[None]
    seen = outputs(target, lambda: target.forward(token_BM, position_BT=position_BM, mask=mask, cache=cache))
    rows = right_rows(draft, path[past : past + 6])
    for level, row in enumerate(rows):
        of = f"row {row} of a tree of {draft.token_M.numel()} behind {past}"
        compare(alone[past + level], (0, 0), seen, (0, row), of)
    cache.keep(torch.tensor(rows), past)
    behind = outputs(target, lambda: step(target, cache, [path[past + 6]]))
    compare(alone[past + 6], (0, 0), behind, (0, 0), f"the row behind a tree behind {past}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_an_answer_has_the_same_bits_in_a_batch(dtype: torch.dtype) -> None:
    together_and_alone(target_in("llama", dtype))


@pytest.mark.parametrize("threads", [3], indirect=True)
@torch.no_grad()
def test_an_answer_has_the_same_bits_in_a_batch_that_has_a_product_for_each_thread(threads: None) -> None:
    together_and_alone(wide_target("one key head", torch.float32))


def together_and_alone(target: Target) -> None:
    """Trees behind paths of different lengths: one before the border of a block, one across it, one behind it."""
    paths = [some_prompt(seed, length) for seed, length in ((2, 9), (3, 13), (4, 24))]
    drafts = [a_tree(path[-6:], 4, seed) for seed, path in enumerate(paths)]
    cache = SlotCache(target.model.config.num_hidden_layers, 60)
    for seat, path in enumerate(paths):
        prefill(target, torch.tensor(path[:-6]), cache.seat(seat))
    forest = tree.pad(drafts)
    rows, past_B1 = forest.token_M.shape[1], torch.tensor([len(path) - 6 for path in paths])[:, None]
    end = int(past_B1.max()) + rows
    mask = tree.batch_mask(target, past_B1, forest.depth_M, forest.sees_MM, end)
    token_BM, position_BM = forest.token_M.clamp_min(0), past_B1 + forest.depth_M
    with cache.place(past_B1 + torch.arange(rows), end):
        together = outputs(target, lambda: target.forward(token_BM, position_BT=position_BM, mask=mask, cache=cache))
    for seat, (path, draft) in enumerate(zip(paths, drafts, strict=True)):
        alone = steps(target, path)
        for level, row in enumerate(right_rows(draft, path[-6:])):
            compare(alone[len(path) - 6 + level], (0, 0), together, (seat, row), f"row {row} of answer {seat}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafted_answers_are_plain_answers_in_16_bits(dtype: torch.dtype, temperature: float) -> None:
    """An oracle that is right four times in five makes long and short paths."""
    target, sampler = target_in("llama", dtype), Sampler(temperature=temperature, seed=1)
    prompt = some_prompt(5, 11)
    expected = ids_of(list(plain(target, prompt, sampler, 80)))
    for shape in (TreeShape(depth=4, nodes=4, topk=1), TreeShape(depth=4, nodes=12, topk=3)):
        head = OracleHead(expected, right=0.8)
        engine = Engine(target, tiny_drafter(target).to(dtype), head, shape)
        rounds = [head.follow(event) for event in engine.decode(prompt, sampler, 80)]
        assert ids_of(rounds) == expected
        assert sum(event.accepted_drafts for event in rounds) > 20


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_side_by_side_are_plain_answers_in_bfloat16(temperature: float) -> None:
    """A random drafter's tree of 60 nodes is right often enough."""
    target = target_in("llama", torch.bfloat16)
    engine = Engine(
        target, tiny_drafter(target).to(target.dtype), PlainHead(target), TreeShape(depth=3, nodes=60, topk=20)
    )
    assert Table(engine, 4).engine.target.exact
    asked = [Request(some_prompt(n, 1 + 5 * n), Sampler(temperature=temperature, seed=n), 24) for n in range(5)]
    said: list[list[int]] = [[] for _ in asked]
    accepted = 0
    for number, event in decode_all(engine, asked, 4):
        said[number] += event.new_ids
        accepted += event.accepted_drafts
    assert said == [ids_of(list(plain(target, one.prompt, one.sampler, one.max_new_tokens))) for one in asked]
    assert accepted > 10
