"""min-p and the repetition penalty: those of transformers, in its order, per node of the tree, losslessly."""

import dataclasses

import pytest
import torch
from transformers import GenerationConfig

from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.seat import History
from coral_core.decoding.tree import Draft, ancestry
from tests.decoding.test_lossless import ids_of, some_prompt
from tests.tiny import VOCAB, OracleHead, tiny_drafter, tiny_target

SAMPLERS = {
    "greedy,r=1.3": Sampler(repetition_penalty=1.3),
    "greedy,r=4": Sampler(repetition_penalty=4),
    "greedy,r=0.5": Sampler(repetition_penalty=0.5),
    "T=1,m=0.1": Sampler(temperature=1.0, min_p=0.1, seed=1),
    "T=0.8,p=0.9,k=30,m=0.05,r=1.5": Sampler(
        temperature=0.8, top_p=0.9, top_k=30, min_p=0.05, repetition_penalty=1.5, seed=2
    ),
}


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gpt2"])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_speculative_equals_plain(family: str, sampler: Sampler) -> None:
    """The oracle's long paths repeat tokens below the root, so that a penalty from the committed tokens alone shows."""
    target = dataclasses.replace(tiny_target(family), stop_ids=frozenset())
    accepted = 0
    for seed, length in ((0, 1), (1, 14)):
        prompt = some_prompt(seed, length)
        expected = ids_of(list(plain(target, prompt, sampler, 30)))
        head = OracleHead(expected, right=0.9)
        engine = Engine(target, tiny_drafter(target), head, TreeShape(depth=5, nodes=14, topk=3))
        rounds = [head.follow(event) for event in engine.decode(prompt, sampler, 30)]
        assert ids_of(rounds) == expected
        accepted += sum(event.accepted_drafts for event in rounds)
    assert accepted >= 12


@pytest.mark.parametrize("penalty", [1.3, 4.0, 0.5])
def test_a_penalised_greedy_answer_is_that_of_generate(penalty: float) -> None:
    target, prompt = tiny_target("llama"), some_prompt(4, 6)
    own = target.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 6).long(),
        max_new_tokens=30,
        do_sample=False,
        repetition_penalty=penalty,
    )
    ids = ids_of(list(plain(target, prompt, Sampler(repetition_penalty=penalty), 30)))
    assert ids == own[0, 6:].tolist()
    assert ids != ids_of(list(plain(target, prompt, Sampler(), 30))), "the penalty must matter here"


@pytest.mark.parametrize("sampler", [SAMPLERS["T=1,m=0.1"], SAMPLERS["T=0.8,p=0.9,k=30,m=0.05,r=1.5"]])
def test_the_distribution_is_the_one_generate_samples_from(sampler: Sampler) -> None:
    settings = {
        name: value for name, value in dataclasses.asdict(sampler).items() if name not in {"seed"} and value not in (0,)
    }
    config = GenerationConfig(do_sample=True, **settings)
    theirs = tiny_target("llama").model._get_logits_processor(generation_config=config, input_ids_seq_length=5)
    torch.manual_seed(0)
    logits_NV, past_NT = torch.randn(7, VOCAB) * 3, torch.randint(3, VOCAB, (7, 5))
    ours_NV = sampler.warp(logits_NV, past_NT)
    assert torch.equal(ours_NV, theirs(past_NT, logits_NV.clone()))
    assert ours_NV.isinf().any(), "min-p must cut here"


def test_a_nodes_past_is_the_answer_and_its_own_branch() -> None:
    """Root 7 with children 8 and 9, and 5 below 8, after the prompt 3 4 7."""
    parent_M = torch.tensor([0, 0, 0, 1])
    draft = Draft(
        token_M=torch.tensor([7, 8, 9, 5]),
        parent_M=parent_M,
        depth_M=torch.tensor([0, 1, 1, 2]),
        sees_MM=ancestry(parent_M, 2),
        score_M=torch.zeros(4),
        levels=2,
    )
    history = History(torch.tensor([3, 4]), capacity=6)
    history.extend(torch.tensor([7]))
    assert history.row().tolist() == [[3, 4, 7]]
    assert history.rows(draft).tolist() == [
        [3, 4, 7, 7, 7, 7, 7],
        [3, 4, 7, 7, 8, 7, 7],
        [3, 4, 7, 7, 7, 9, 7],
        [3, 4, 7, 7, 8, 7, 5],
    ]
