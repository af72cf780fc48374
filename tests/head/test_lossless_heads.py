"""Whatever a head drafts, the answer is the plain one: every kind, and a router that is wrong on purpose."""

import pytest
import torch

from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.sampling import Sampler
from coral_core.drafter.blocks import Attend, CosSin
from coral_core.drafter.model import Drafter
from coral_core.grouping.clustering import by_kmeans
from coral_core.head.groups import Groups
from coral_core.head.heads import FullHead, GroupedHead, Head, Router, StaticHead
from coral_core.target.target import Target
from tests.tiny import StandIn, tiny_drafter, tiny_target

GROUPS = 12


class Informed(StandIn):
    """A drafter of features that are right: it runs the target on the answer, so that some heads get tokens accepted.

    Stands where the drafter does; what it is shown is ignored but for the position.
    """

    def __init__(self, target: Target, drafter: Drafter, ids: list[int]) -> None:
        self.drafter = drafter
        self.feature_TD = target.forward(torch.tensor([ids]))[0]

    def __call__(
        self, embed_BTD: torch.Tensor, feature_BTD: torch.Tensor, cos_sin: CosSin, attend: Attend
    ) -> torch.Tensor:
        position_BT = cos_sin[0][:, 0, :, 0].expand(embed_BTD.shape[:2])
        self.drafter(embed_BTD, feature_BTD, self.drafter.rope(position_BT, embed_BTD.dtype), attend)  # feeds its cache
        return self.feature_TD[(position_BT + 1).clamp_max(len(self.feature_TD) - 1)]


def routed(target: Target, groups: Groups, wrong: bool) -> GroupedHead:
    """A router that ranks groups by their best logit, or the other way round."""
    router = Router(target.lent.head_VD.shape[1], GROUPS)
    mean_GD = torch.stack(
        [target.lent.head_VD[groups.token_GR[g][groups.token_GR[g] >= 0]].mean(0) for g in range(GROUPS)]
    )
    router.w2.weight.data = -mean_GD if wrong else mean_GD
    router.w2.bias.data.zero_()
    return GroupedHead(target.lent, groups, router, 4)


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=0.8, seed=5)], ids=["greedy", "T=0.8"])
def test_every_head_decodes_the_plain_answer(sampler: Sampler) -> None:
    target = tiny_target("llama")
    groups = by_kmeans(target.lent.head_VD, GROUPS, count_V=torch.ones(len(target.lent.head_VD)))
    heads: dict[str, Head] = {
        "full": FullHead(target.lent),
        "static": StaticHead(target.lent, torch.arange(20, 60)),
        "routed": routed(target, groups, wrong=False),
        "wrong": routed(target, groups, wrong=True),
    }
    accepted = dict.fromkeys(heads, 0)
    for prompt in ([5], [7, 30, 41, 8, 90, 12], [33, 64, 21]):
        answer = [token for event in plain(target, prompt, sampler, 24) for token in event.new_ids]
        for name, head in heads.items():
            drafter = Informed(target, tiny_drafter(target), prompt + answer)
            engine = Engine(target, drafter, head, TreeShape(depth=4, nodes=12, topk=4))  # type: ignore[arg-type]
            events = list(engine.decode(prompt, sampler, 24))
            assert [token for event in events for token in event.new_ids] == answer, name
            accepted[name] += sum(event.accepted_drafts for event in events)
    assert accepted["full"] >= accepted["routed"] > accepted["wrong"]
