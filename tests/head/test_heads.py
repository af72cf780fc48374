"""The heads against the full one: equal when everything is active, equal on the rows they read when not."""

from pathlib import Path

import pytest
import torch

from coral_core.artifacts import Manifest
from coral_core.errors import ArtifactError
from coral_core.grouping.clustering import by_kmeans
from coral_core.head.groups import Groups
from coral_core.head.heads import Candidates, FullHead, GroupedHead, Router, StaticHead
from coral_core.head.load import load_head, save_head
from coral_core.kernels.blocks import Blocks
from coral_core.kernels.layers import packs
from coral_core.lent import Lent
from coral_core.recipe.schema import HeadSpec

V, D, G = 53, 16, 6


def a_lent(**scalars: float) -> Lent:
    torch.manual_seed(0)
    return Lent(torch.randn(V, D), torch.randn(V, D), torch.randn(V), **scalars)


def a_grouped(lent: Lent, active: int) -> GroupedHead:
    torch.manual_seed(1)
    return GroupedHead(lent, by_kmeans(lent.head_VD, G, count_V=torch.ones(V)), Router(D, G), active)


def by_token(candidates: Candidates, row: int) -> dict[int, float]:
    return dict(zip(candidates.token_C.tolist(), candidates.logit_NC[row].tolist(), strict=True))


@pytest.mark.parametrize("scalars", [{}, {"logit_scale": 0.3}, {"logit_softcap": 2.0}])
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_with_every_group_active_the_grouped_head_is_the_full_one(scalars: dict[str, float], rows: int) -> None:
    lent, hidden_ND = a_lent(**scalars), torch.randn(rows, D)
    logit_NR, token_NR = FullHead(lent).candidates(hidden_ND).best(V)
    ours_NR, same_NR = a_grouped(lent, G).candidates(hidden_ND).best(V)
    assert torch.equal(token_NR, same_NR)
    torch.testing.assert_close(ours_NR, logit_NR, rtol=0, atol=1e-5)
    torch.testing.assert_close(logit_NR.sort().values, lent.logits(hidden_ND).sort().values, rtol=0, atol=1e-5)


def test_groups_are_chosen_by_probability_and_not_by_logits() -> None:
    """Two rows: one is sure of group 0, the other torn between 1 and 2. By the sum of logits 2 would come first."""
    lent = Lent(torch.randn(V, 3), torch.randn(V, 3), None)
    router = Router(3, 3)
    router.w2.weight.data = torch.eye(3)
    router.w2.bias.data.zero_()
    head = GroupedHead(lent, Groups.from_order(torch.arange(V), 3), router, 2)
    token_C = head.candidates(torch.tensor([[20.0, 0.0, 15.0], [0.0, 8.0, 7.9]])).token_C
    groups = head.token_V.tensor_split(head.start_G[1:-1])
    assert token_C.sort().values.equal(torch.cat([groups[0], groups[1]]).sort().values)


@pytest.mark.parametrize("active", [1, 2, 4])
def test_active_groups_are_the_full_head_restricted_to_their_rows(active: int) -> None:
    lent = a_lent()
    head, hidden_ND = a_grouped(lent, active), torch.randn(3, D)
    candidates = head.candidates(hidden_ND)
    expected_NC = lent.logits(hidden_ND)[:, candidates.token_C]
    torch.testing.assert_close(candidates.logit_NC, expected_NC, rtol=0, atol=1e-5)
    chosen = head.router(hidden_ND).softmax(-1).sum(0).topk(active).indices.tolist()
    groups = head.token_V.tensor_split(head.start_G[1:-1])
    assert candidates.token_C.sort().values.equal(torch.cat([groups[group] for group in chosen]).sort().values)
    assert candidates.token_C.numel() < V


def test_the_static_head_keeps_its_tokens_only() -> None:
    lent, hidden_ND = a_lent(), torch.randn(2, D)
    token_C = torch.tensor([7, 3, 50])
    candidates = StaticHead(lent, token_C).candidates(hidden_ND)
    assert candidates.token_C.tolist() == [7, 3, 50]
    torch.testing.assert_close(candidates.logit_NC, lent.logits(hidden_ND)[:, token_C], rtol=0, atol=1e-5)


def test_best_maps_places_to_tokens() -> None:
    logit_NC = torch.tensor([[-3.0, -1.0, -2.0], [-1.0, -2.0, -3.0]])
    assert Candidates(logit_NC, torch.tensor([9, 8, 7])).best(2)[1].tolist() == [[8, 7], [9, 8]]
    own_NC = torch.tensor([[9, 8, 7], [6, 5, 4]])
    assert Candidates(logit_NC, own_NC).best(2)[1].tolist() == [[8, 7], [6, 5]]


def a_folder(folder: Path, groups: Groups | None = None, hidden: int = D) -> Path:
    folder.mkdir(exist_ok=True)
    save_head(folder, groups or Groups.from_order(torch.arange(V), G), Router(hidden, G), torch.arange(V))
    facts = {"groups": G, "active": 3}
    Manifest(kind="head", fingerprint="h", inputs={"target": "t", "drafter": "d"}, recipe={}, facts=facts).write(folder)
    return folder


SPEC = HeadSpec(kind="grouped", groups=G, active=2)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    folder, lent = a_folder(tmp_path / "head"), a_lent()
    head = load_head(folder, SPEC, lent, target_fingerprint="t", drafter_fingerprint="d")
    assert isinstance(head, GroupedHead)
    assert head.active == 2
    spec = HeadSpec(kind="static", groups=G, active=2)
    static = load_head(folder, spec, lent, target_fingerprint="t", drafter_fingerprint="d")
    assert isinstance(static, StaticHead)
    assert static.token_C.tolist() == list(range(V * 2 // G))
    chosen = load_head(folder, HeadSpec(), lent, target_fingerprint="t", drafter_fingerprint="d")
    assert isinstance(chosen, GroupedHead)
    assert chosen.active == 3, "what the recipe leaves open is as group-head chose it"
    none = HeadSpec(kind="full")
    assert isinstance(
        load_head(tmp_path / "absent", none, lent, target_fingerprint="t", drafter_fingerprint="d"), FullHead
    )


def test_a_strangers_head_is_refused(tmp_path: Path) -> None:
    folder, lent = a_folder(tmp_path / "head"), a_lent()
    with pytest.raises(ArtifactError, match="was made for target t, and this target is other. Run: coral group-head"):
        load_head(folder, SPEC, lent, target_fingerprint="other", drafter_fingerprint="d")
    with pytest.raises(ArtifactError, match="was made for drafter d, and this drafter is other"):
        load_head(folder, SPEC, lent, target_fingerprint="t", drafter_fingerprint="other")
    spec = HeadSpec(groups=G + 1, active=2)
    with pytest.raises(ArtifactError, match=f"has head.groups={G}; this recipe says {G + 1}"):
        load_head(folder, spec, lent, target_fingerprint="t", drafter_fingerprint="d")
    with pytest.raises(ArtifactError, match="no head in .*absent. Run: coral group-head"):
        load_head(tmp_path / "absent", SPEC, lent, target_fingerprint="t", drafter_fingerprint="d")


def test_a_damaged_head_is_refused(tmp_path: Path) -> None:
    lent = a_lent()
    lost = Groups(Groups.from_order(torch.arange(V), G).token_GR.clamp_max(V - 2))
    with pytest.raises(ArtifactError, match=f"does not hold each of {V} tokens once"):
        load_head(a_folder(tmp_path / "a", lost), SPEC, lent, target_fingerprint="t", drafter_fingerprint="d")
    folder = a_folder(tmp_path / "b")
    (folder / "head.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(ArtifactError, match="cannot read the head"):
        load_head(folder, SPEC, lent, target_fingerprint="t", drafter_fingerprint="d")
    folder = a_folder(tmp_path / "c", hidden=D + 2)
    with pytest.raises(ArtifactError, match=f"a router from {D + 2} to {G} groups; {G} groups of a head {D} wide"):
        load_head(folder, SPEC, lent, target_fingerprint="t", drafter_fingerprint="d")


def test_a_router_of_the_papers_form_is_loaded_as_such(tmp_path: Path) -> None:
    folder, lent = a_folder(tmp_path / "head"), a_lent()
    save_head(folder, Groups.from_order(torch.arange(V), G), Router(D, G, inner=True), torch.arange(V))
    head = load_head(folder, SPEC, lent, target_fingerprint="t", drafter_fingerprint="d")
    assert isinstance(head, GroupedHead)
    assert head.router.w1 is not None


@pytest.mark.parametrize("tied, biased", [(True, False), (False, False), (False, True)])
def test_tied_untied_and_biased_heads_are_read_alike(tied: bool, biased: bool) -> None:
    torch.manual_seed(0)
    embed_VD = torch.randn(V, D)
    lent = Lent(embed_VD, embed_VD if tied else torch.randn(V, D), torch.randn(V) if biased else None)
    hidden_ND = torch.randn(3, D)
    logit_NR, token_NR = FullHead(lent).candidates(hidden_ND).best(V)
    ours_NR, same_NR = a_grouped(lent, G).candidates(hidden_ND).best(V)
    assert torch.equal(token_NR, same_NR)
    torch.testing.assert_close(ours_NR, logit_NR, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 10])
def test_packed_blocks_multiply_as_plain_ones(dtype: torch.dtype, atol: float, rows: int) -> None:
    """Blocks of 2,100 and 2,000 rows of 512 are large enough to be packed, where the processor can."""
    generator = torch.Generator().manual_seed(0)
    rows_VD = (torch.randn(6100, 512, generator=generator) / 512**0.5).to(dtype)
    hidden_ND = torch.randn(rows, 512, generator=generator).to(dtype)
    blocks = Blocks(rows_VD, [0, 2100, 4100, 6100])
    assert bool(blocks.packed) == packs(rows_VD)
    expected_NC = torch.cat((rows_VD[:2100], rows_VD[4100:])).float() @ hidden_ND.float().T
    torch.testing.assert_close(blocks.products(hidden_ND, [2, 0]).float(), expected_NC.T, rtol=atol, atol=atol)


def test_the_full_head_is_never_touched_in_drafting() -> None:
    """Once built, the grouped head answers the same with the lent rows gone."""
    lent, hidden_ND = a_lent(), torch.randn(2, D)
    head = a_grouped(lent, 2)
    before = head.candidates(hidden_ND).logit_NC
    lent.head_VD.fill_(torch.nan)
    assert torch.equal(head.candidates(hidden_ND).logit_NC, before)
