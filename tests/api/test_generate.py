"""`model.generate(..., custom_generate=...)`: the same ids, calls, draws and events as without it."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from coral_core.api.generate import Speculate
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.sampling import Sampler
from coral_core.embedded import FOLDER as PICO
from coral_core.errors import DataError, TargetError
from tests.decoding.test_lossless import some_prompt
from tests.tiny import PlainHead, tiny_drafter, tiny_target

NEW = 24


class Notes(BaseStreamer, LogitsProcessor, StoppingCriteria):
    """Writes down every call it gets, as streamer, processor and criterion at once; stops at `stop`."""

    def __init__(self, stop: int = -1) -> None:
        self.calls: list[tuple[str, list[int]]] = []
        self.stop = stop

    def put(self, value: torch.Tensor) -> None:
        self.calls.append(("put", value.flatten().tolist()))

    def end(self) -> None:
        self.calls.append(("end", []))

    def __call__(self, input_ids: torch.Tensor, scores: Any) -> torch.Tensor:
        if isinstance(scores, torch.Tensor):
            self.calls.append(("process", input_ids[0].tolist()))
            return scores - 0.5 * len(self.calls) * (torch.arange(scores.shape[-1]) % 7 == 0)  # depends on the call
        self.calls.append(("judge", input_ids[0].tolist()))
        return torch.tensor([input_ids[0, -1].item() == self.stop])


@functools.cache
def speculate(family: str = "llama") -> Speculate:
    """A wide tree over a small vocabulary: a random drafter's guesses are then accepted often."""
    target = tiny_target(family)
    shape = TreeShape(depth=3, nodes=60, topk=30)
    return Speculate(Engine(target, tiny_drafter(target), PlainHead(target), shape))


def both(prompt: list[int], family: str = "llama", notes: bool = False, stop: int = -1, **kwargs: Any) -> list[Any]:
    """What `generate` gives without and with coral: (result, notes, state of torch's generator)."""
    coral, results = speculate(family), []
    for own in ({}, {"custom_generate": coral}):
        torch.manual_seed(5)
        written = Notes(stop)
        lists = {
            "streamer": written,
            "logits_processor": LogitsProcessorList([written]),
            "stopping_criteria": StoppingCriteriaList([written]),
        }
        ids = torch.tensor([prompt])
        kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False} | kwargs
        result = coral.engine.target.model.generate(ids, **kwargs, **own, **(lists if notes else {}))
        results.append((result, written.calls, torch.get_rng_state()))
    return results


def assert_same(results: list[Any]) -> torch.Tensor:
    (ids, calls, state), (our_ids, our_calls, our_state) = results
    assert our_ids.tolist() == ids.tolist()
    assert our_calls == calls
    assert torch.equal(our_state, state)
    return ids[0]


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma2-mixed", "gpt2", "cohere"])
def test_greedy_ids_are_those_of_generate(family: str) -> None:
    for seed in range(4):
        assert_same(both(some_prompt(seed, 5), family))


def test_it_takes_fewer_passes_than_tokens() -> None:
    """Else all of this would be plain decoding in disguise."""
    passes: list[int] = []
    model = speculate().engine.target.model
    hook = model.base_model.register_forward_hook(lambda *_: passes.append(1))
    prompt = torch.tensor([some_prompt(1, 5)])
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=60,
        eos_token_id=None,
        custom_generate=speculate(),
    )
    hook.remove()
    assert ids.shape[1] == 65
    assert len(passes) < 55


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 1.3, "top_k": 9, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_draws_are_those_of_generate_at_the_same_torch_seed(settings: dict[str, Any]) -> None:
    for seed in range(3):
        assert_same(both(some_prompt(seed, 6), do_sample=True, **settings))


@pytest.mark.parametrize("sampled", [False, True])
def test_processors_criteria_and_streamer_are_called_as_by_generate(sampled: bool) -> None:
    """In the same order and with the same ids, even a processor that counts its calls."""
    ids = assert_same(both(some_prompt(2, 6), notes=True, do_sample=sampled, eos_token_id=None))
    assert len(ids) == 6 + NEW


def test_a_criterion_of_the_users_ends_the_answer_in_the_middle_of_a_round() -> None:
    stops = set()
    for seed in range(6):
        prompt = some_prompt(seed, 6)
        whole = both(prompt, notes=True, eos_token_id=None)[0][0][0].tolist()
        stop = whole[6 + 3 * seed]
        ids = assert_same(both(prompt, notes=True, eos_token_id=None, stop=stop))
        stops.add(len(ids))
    assert len(stops) > 2


def test_the_generation_config_decides_where_an_answer_ends() -> None:
    prompt = some_prompt(3, 6)
    assert len(assert_same(both(prompt))) == 7, "the first token is the model's stop token"
    assert len(assert_same(both(prompt, eos_token_id=None))) == 6 + NEW
    assert len(assert_same(both(prompt, min_new_tokens=7))) >= 6 + 7
    assert len(assert_same(both(prompt, eos_token_id=None, max_new_tokens=1))) == 7


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_ends_with_the_context_however_far_a_draft_reaches(seed: int) -> None:
    coral = speculate()
    target = coral.engine.target
    prompt = some_prompt(seed, target.max_positions - 7)
    ids = target.model.generate(
        torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, custom_generate=coral
    )
    endless = dataclasses.replace(target, stop_ids=frozenset())
    assert ids[0, len(prompt) :].tolist() == [
        token for event in plain(endless, prompt, Sampler(), NEW) for token in event.new_ids
    ]
    assert ids.shape[1] == target.max_positions


def test_a_padded_prompt() -> None:
    """The padding is not decoded; a repetition penalty leaves it out."""
    prompt = some_prompt(4, 6)
    padded = {"attention_mask": torch.tensor([[0, 0, 0] + [1] * 6])}
    assert_same(both([0, 0, 0, *prompt], **padded, repetition_penalty=1.5))


def test_scores_and_logits_on_request() -> None:
    request = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    (theirs, *_), (ours, *_) = both(some_prompt(1, 6), repetition_penalty=1.3, **request)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(ours[name]), torch.stack(theirs[name]), rtol=0, atol=1e-4)


def test_what_coral_cannot_do_is_refused_by_name() -> None:
    coral, prompt = speculate(), torch.tensor([some_prompt(1, 4)])
    model = coral.engine.target.model
    generate = functools.partial(model.generate, max_new_tokens=4, do_sample=False, custom_generate=coral)
    with pytest.raises(DataError, match="2 rows or beams at once"):
        generate(prompt.expand(2, -1))
    with pytest.raises(DataError, match="leave it out and give the whole prompt"):
        generate(prompt, past_key_values=transformers.DynamicCache(config=model.config))
    with pytest.raises(DataError, match="output_attentions"):
        generate(prompt, return_dict_in_generate=True, output_hidden_states=True)
    with pytest.raises(DataError, match="pixel_values: coral decodes text alone"):
        coral(model, prompt, [], [], transformers.GenerationConfig(max_length=9), pixel_values=torch.ones(1))
    other = dataclasses.replace(tiny_target("llama"), model=tiny_target("qwen2").model)
    stranger = Speculate(dataclasses.replace(coral.engine, target=other))
    with pytest.raises(TargetError, match="made for another model"):
        model.generate(prompt, custom_generate=stranger)


def test_as_a_user_types_it() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(PICO / "target", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(PICO / "target")
    inputs = tokenizer("Book a table", return_tensors="pt")
    coral = Speculate.from_run(model, tokenizer)
    plain, ours = (
        model.generate(**inputs, max_new_tokens=20, do_sample=False, **own) for own in ({}, {"custom_generate": coral})
    )
    assert ours.tolist() == plain.tolist()


def test_the_runs_recipe_says_whether_forwards_are_exact(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "name: mine\ntarget: {model: pico}\ndecode: {exact: false, draft_nodes: 100, tree: fixed}\n"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(PICO / "target", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(PICO / "target")
    assert not Speculate.from_run(model, tokenizer, tmp_path).engine.target.exact
