"""A target that repeats its answer gives the rounds that real decoding has."""

import itertools

import pytest
import torch

from benchmarks.replay import plain_answers, repeating
from coral_core.bench.race import run_lane
from coral_core.decoding.engine import Engine
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.sampling import Sampler
from coral_core.head.heads import Candidates
from tests.tiny import VOCAB, StandIn, tiny_drafter, tiny_target

SHAPE = TreeShape(depth=4, nodes=9, topk=3)


class SuccessorHead:
    """Proposes what followed a token in the answers; the drafted feature is the token's embedding. Often right."""

    recordable = False

    def __init__(self, target, answers):
        self.embed_VD = target.lent.embed_VD
        self.follows = {}
        for ids in answers:
            self.follows.update(itertools.pairwise(ids))

    def candidates(self, hidden_ND):
        logprob_NV = torch.full((len(hidden_ND), VOCAB), -9.0)
        for row, token in enumerate(torch.cdist(hidden_ND, self.embed_VD).argmin(-1).tolist()):
            logprob_NV[row, self.follows.get(token, token)] = -0.5
        return Candidates(logprob_NV, torch.arange(VOCAB))


class Echo(StandIn, torch.nn.Module):
    """A drafter whose feature is the embedding of the token it read."""

    def forward(self, embed_BTD, feature_BTD, turn, attend):
        attend(*[embed_BTD[:, None]] * 3)  # the cache holds a row per call, as any drafter's does
        return embed_BTD


def test_a_repeated_answer_gives_a_drafter_of_three_layers_what_it_reads():
    target, sampler, taps = tiny_target("llama", layers=4), Sampler(), (0, 2, 3)
    prompt, drafter = [1, 5, 9, 4], tiny_drafter(target, taps=taps)
    (answer,) = plain_answers(target, [prompt], sampler, 30)
    seen = []

    class Watched(SuccessorHead):
        def candidates(self, hidden_ND):
            seen[-1].append(hidden_ND)
            return super().candidates(hidden_ND)

    for model in (target, repeating(target, prompt, answer, taps)):
        seen.append([])
        engine = Engine(model, drafter, Watched(target, [answer]), TreeShape(depth=1, nodes=3, topk=3))
        assert run_lane(engine.decode(prompt, sampler, 30)).ids == answer
    for real_ND, repeated_ND in zip(*seen, strict=True):
        torch.testing.assert_close(repeated_ND, real_ND, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3-mixed"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 40])
def test_a_repeated_answer_has_the_rounds_of_real_decoding(family, temperature, max_new_tokens):
    target, sampler, longest = tiny_target(family), Sampler(temperature=temperature, seed=3), []
    prompts = [[1, 5, 9, 4], [1, 7], [1, 30, 31, 32, 33, 34]]
    answers = list(plain_answers(target, prompts, sampler, max_new_tokens))
    for drafter in (tiny_drafter(target), Echo()):
        head = SuccessorHead(target, answers)
        for prompt, answer in zip(prompts, answers, strict=True):
            real, repeated = (
                run_lane(Engine(model, drafter, head, SHAPE).decode(prompt, sampler, max_new_tokens))
                for model in (target, repeating(target, prompt, answer))
            )
            assert real.ids == repeated.ids == answer
            assert repeated.emitted == real.emitted
            longest.append(max(real.emitted, default=0))
    if max_new_tokens == 40:
        assert max(longest) >= 3, "drafts must be accepted for this to mean anything"
