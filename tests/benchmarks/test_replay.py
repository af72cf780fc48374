"""A replay of recorded answers finds the rounds that real decoding has."""

import itertools

import pytest
import torch

from benchmarks.replay import plain_answers, replay, with_features
from coral_core.bench.race import run_lane
from coral_core.decoding.drafting import TreeShape
from coral_core.decoding.engine import Engine
from coral_core.decoding.sampling import Sampler
from coral_core.head.candidates import Candidates
from tests.tiny import VOCAB, tiny_drafter, tiny_target


class KnowingHead:
    """Proposes a token's usual successor in the answers, by the drafted feature's nearest embedding: often right."""

    def __init__(self, target, answers):
        self.embed_VD = target.lent.embed_VD
        self.follows = {}
        for ids in answers:
            self.follows.update(itertools.pairwise(ids))

    def candidates(self, hidden_ND):
        nearest_N = torch.cdist(hidden_ND, self.embed_VD).argmin(-1)
        logprob_NV = torch.full((len(hidden_ND), VOCAB), -9.0)
        for row, token in enumerate(nearest_N.tolist()):
            logprob_NV[row, self.follows.get(token, token)] = -0.5
        return Candidates(logprob_NV, torch.arange(VOCAB))


class Echo(torch.nn.Module):
    """A drafter whose feature is the embedding of the token it read."""

    def forward(self, embed_BTD, feature_BTD, position_BT, attend):
        heads = embed_BTD[:, None]
        attend(heads, heads, heads)  # the cache holds a row per call, as any drafter's does
        return embed_BTD


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 40])
def test_a_replay_has_the_rounds_of_real_decoding(temperature, max_new_tokens):
    target, sampler = tiny_target(), Sampler(temperature=temperature, seed=3)
    prompts = [[1, 5, 9, 4], [1, 7], [1, 30, 31, 32, 33, 34]]
    answers = list(plain_answers(target, prompts, sampler, max_new_tokens))
    shape = TreeShape(depth=4, nodes=9, topk=3, confidence=0.01)
    rounds = []
    for drafter in (tiny_drafter(target), Echo()):
        engine = Engine(target, drafter, KnowingHead(target, answers), shape)
        for prompt, answer in zip(prompts, answers, strict=True):
            decoded = run_lane(engine.decode(prompt, sampler, max_new_tokens))
            assert decoded.ids == answer
            rounds.append(replay(engine, with_features(target, prompt, answer)))
            assert rounds[-1] == decoded.emitted
    if max_new_tokens == 40:
        assert max(max(emitted) for emitted in rounds) >= 3, "drafts must get accepted for this to mean anything"
