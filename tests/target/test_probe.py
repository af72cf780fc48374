"""What a target must do is seen when it is loaded, and what does not do it is refused in one line."""

import dataclasses
import functools
import random
from typing import Any

import pytest
import torch
import transformers

from coral_core.api.generate import Speculate
from coral_core.data.answer import Sampling, write
from coral_core.decoding.engine import plain
from coral_core.decoding.sampling import Sampler
from coral_core.errors import DataError, TargetError
from coral_core.target import probe
from coral_core.target.capture import tap
from coral_core.target.load import wrap
from coral_core.target.target import Target
from tests.tiny import SHAPE, VOCAB, tiny_engine

BORDER = 48


def model_of(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SHAPE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def longrope() -> Target:
    """A random Phi-3 whose rotary factors change for all rows at once when a forward reaches past BORDER."""
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [4.0, 5, 6, 7]}
    model = model_of("Phi3Config", original_max_position_embeddings=BORDER, rope_parameters=rope)
    return dataclasses.replace(wrap(model, None), stop_ids=frozenset())


def prompt_of(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCAB), k=length)


def said(rounds: Any) -> list[int]:
    return [token for event in rounds for token in event.new_ids]


def test_a_context_ends_where_its_rotary_factors_change() -> None:
    """Answers up to there are those of `generate`, which would read everything again beyond."""
    target = longrope()
    assert (target.max_positions, target.bounded) == (BORDER, True)
    engine = tiny_engine(target, depth=5, nodes=12, topk=3)
    for seed in range(12):
        prompt = prompt_of(seed, BORDER - 1 - seed)
        ids_BT = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids_BT), "max_length": BORDER}
        own = target.model.generate(ids_BT, do_sample=False, **options)[0, len(prompt) :].tolist()
        assert said(engine.decode(prompt, Sampler(), 40)) == said(plain(target, prompt, Sampler(), 40)) == own
        sampler = Sampler(temperature=1.0, seed=seed)
        assert said(engine.decode(prompt, sampler, 40)) == said(plain(target, prompt, sampler, 40))
        torch.manual_seed(seed)
        own = target.model.generate(ids_BT, do_sample=True, **options)
        torch.manual_seed(seed)
        assert torch.equal(
            target.model.generate(ids_BT, do_sample=True, custom_generate=Speculate(engine), **options), own
        )
    with pytest.raises(DataError, match="context holds 48, as far as its rotary factors stay the same; shorten"):
        said(plain(target, prompt_of(0, BORDER), Sampler(), 4))


def test_rows_do_not_depend_on_their_company_before_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, chunks, tapped features and written answers, with prompts that end just below the border."""
    target = longrope()
    prompts = [prompt_of(seed, length) for seed, length in enumerate((3, 20, BORDER - 2))]
    whole = [said(plain(target, prompt, Sampler(), BORDER - len(prompt))) for prompt in prompts]
    monkeypatch.setattr("coral_core.decoding.step.PREFILL_ROWS", 16)
    assert [said(plain(target, prompt, Sampler(), 60)) for prompt in prompts] == whole
    limits = [BORDER - len(prompt) for prompt in prompts]
    written = write(target, prompts, limits, lambda ids: False, Sampling(batch_size=2))
    assert [answer.ids for answer in written] == whole
    length = BORDER
    ids_BT = torch.tensor([prompt + [0] * (length - len(prompt)) for prompt in prompts])
    valid_BT = torch.tensor([[1] * len(prompt) + [0] * (length - len(prompt)) for prompt in prompts]).bool()
    feature_BTD = tap(target, ids_BT, valid_BT).feature_BTD
    for row, prompt in enumerate(prompts):
        alone_TD = target.forward(torch.tensor([prompt]))[0]
        torch.testing.assert_close(feature_BTD[row, : len(prompt)], alone_TD, rtol=0, atol=1e-5)


def test_dynamic_factors_never_change_within_the_context() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    target = wrap(model_of("LlamaConfig", rope_parameters=rope), None)
    assert (target.max_positions, target.bounded) == (SHAPE["max_position_embeddings"], False)
    prompt = prompt_of(0, 120)
    assert said(tiny_engine(target).decode(prompt, Sampler(), 99)) == said(plain(target, prompt, Sampler(), 99))


def test_an_ordinary_target_keeps_its_context() -> None:
    assert wrap(model_of("LlamaConfig"), None).max_positions == SHAPE["max_position_embeddings"]


def refused(model: Any, why: str) -> None:
    with pytest.raises(TargetError, match=why) as error:
        wrap(model, None)
    assert "\n" not in str(error.value) and "Choose another target.model" in str(error.value)


def test_a_model_without_a_cache_is_refused() -> None:
    refused(
        transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4)),
        "takes no cache|takes no position ids",
    )


def test_a_window_that_the_layers_do_not_apply_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long ones too, without a forward of as many rows as they have."""
    counts: list[int] = []
    ids = probe._ids
    monkeypatch.setattr(probe, "_ids", lambda target, count: counts.append(count) or ids(target, count))
    for window, small in ((7, 512), (40, 16)):
        monkeypatch.setattr(probe, "LONG_WINDOW", small)
        counts.clear()
        right = model_of("MistralConfig", sliding_window=window)
        assert wrap(right, None).window == right.config.sliding_window == window
        assert max(counts) <= small
        model = model_of("LlamaConfig")
        model.config.sliding_window = window  # as of Moshi's decoder: named in the config, used by no mask
        refused(model, f"names a window of {window} positions, which its own attention does not apply")


def test_layers_that_place_rows_by_the_length_of_the_cache_are_refused() -> None:
    """As Llama 4 scales its queries: siblings of a tree would be scaled as if they stood in a row."""
    model = model_of("LlamaConfig")
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def asking(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None:
            cache.get_seq_length(1)
        return forward(*args, **kwargs)

    attention.forward = asking
    refused(model, "place rows by the length of the cache")


def patched(monkeypatch: pytest.MonkeyPatch, model: Any, change: Any, *, noise: float = 0.0) -> None:
    """The model reads changed arguments; its features move by `noise`, otherwise for each number of rows."""
    forward = model.model.forward

    @functools.wraps(forward)
    def other(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **{**kwargs, **change(kwargs)})
        state_BTD = out.last_hidden_state
        some_D = torch.randn(state_BTD.shape[-1], generator=torch.Generator().manual_seed(state_BTD.shape[:2].numel()))
        length_BT1 = state_BTD.norm(dim=-1, keepdim=True) * noise
        out.last_hidden_state = state_BTD + (length_BT1 * some_D / some_D.norm()).to(state_BTD.dtype)
        return out

    monkeypatch.setattr(model.model, "forward", other)


def blind(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"attention_mask": torch.zeros(1, 1, 1, 1)}


def in_a_row(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Siblings of a tree at different positions."""
    position_BT = kwargs["position_ids"]
    return {
        "position_ids": position_BT if position_BT is None else position_BT[:, :1] + torch.arange(position_BT.shape[1])
    }


def test_rounding_alone_refuses_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU in bfloat16, where one row and three are multiplied by other kernels, and deep models amplify it."""
    target = dataclasses.replace(wrap(model_of("LlamaConfig").bfloat16(), None), exact=False)
    patched(monkeypatch, target.model, lambda kwargs: {}, noise=0.05)
    assert probe.probed(target).max_positions == target.max_positions
    monkeypatch.undo()
    for fault in (blind, in_a_row):
        patched(monkeypatch, target.model, fault, noise=0.05)
        with pytest.raises(TargetError, match="a row of a drafted tree is not what it is alone"):
            probe.probed(target)
        monkeypatch.undo()


def test_rows_that_see_their_siblings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("LlamaConfig")
    patched(monkeypatch, model, blind)
    refused(model, "a row of a drafted tree is not what it is alone")
