"""The router's training: the second stage, with the drafter frozen.

It learns on the drafter's own outputs of all unroll steps, which is what it reads when decoding, to predict how much
of what the drafter finds likely with the full head lies in each group:

    y_g ∝ Σ_{v in g} q(v)^½,   L = −Σ_g y_g log p_router(g)

CORAL's labels are the target's probabilities. What reading fewer rows loses is what the full head would have drafted,
and q is a function of what the router reads: on kinds of text that it never saw, an eighth of the rows kept 97.6 % of
what the drafter gets right, and 96.7 with the target's labels (LOG.md). The root is there since a tree proposes the
drafter's second and third token too: on SmolLM2-135M an eighth of the rows kept 99.4 % of what the drafter gets right
on held-out dialogues, 99.2 with q itself (512 groups, 1,200 steps).
Axes: B batch, T position, S unroll step, N row that carries a loss (of one step, or of all), D hidden, R place in a
list of the most likely tokens or groups, C candidate token, G group, V vocabulary.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator

import torch

from coral_core.drafter.model import Drafter
from coral_core.head.groups import Groups
from coral_core.head.heads import Router
from coral_core.kernels.precision import bfloat16_is_faster
from coral_core.lent import Lent
from coral_core.progress import Progress, silent
from coral_core.recipe.schema import HeadSpec
from coral_core.store.batches import Batch, batch_of, batches
from coral_core.store.store import Store
from coral_core.training.unroll import loss_rows, unroll

LEARNING_RATE = 1e-3
"""Peak rate of AdamW for the router."""

DIALOGUES = 8
"""Dialogues per forward pass of the drafter."""
BUFFER_BYTES = 1 << 30
"""Rows are computed once and kept, up to this; the vocabulary-sized probabilities are what costs, not the router."""
HELD_OUT = 48
"""Dialogues that settings are judged by, at most. With seven passes over 151,936 rows, eight dialogues take 25 s of a
processor core."""
ROWS = 1024
"""Rows of one router step."""
CHUNK = 2048
"""Rows whose vocabulary-sized probabilities exist at once."""
CANDIDATES = 96
"""Tokens that bfloat16 names for the TOP most likely ones: its logits are off by up to 2^-8 of themselves."""
TOP = 64
"""Of the tokens after each feature, so many are kept: the labels of any grouping come from them."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the router's rows come from: a frozen drafter, its head, and the unroll steps to look at."""

    drafter: Drafter
    lent: Lent
    steps: int

    @functools.cached_property
    def quick(self) -> Lent:
        """The head in bfloat16, where this device is faster in it: it finds candidates for the most likely tokens."""
        device = self.lent.head_VD.device
        return self.lent.to(device, torch.bfloat16) if device.type != "cpu" or bfloat16_is_faster() else self.lent


@dataclasses.dataclass(frozen=True)
class Rows:
    """What groups and routers are learnt from."""

    hidden_SND: torch.Tensor
    """The drafter's outputs."""
    feature_ND: torch.Tensor
    """The target's features, which they imitate."""
    prob_NR: torch.Tensor
    """The target's probabilities of its TOP most likely tokens, best first, summing to 1."""
    token_NR: torch.Tensor
    """These tokens."""
    own_prob_SNR: torch.Tensor
    """Likewise the drafter's, with the full head."""
    own_token_SNR: torch.Tensor


def collect(source: Source, samples: Iterable[Batch]) -> Iterator[Rows]:
    """One `Rows` per batch: the loss rows of every unroll step."""
    for batch in samples:
        wanted_BT = loss_rows(batch)
        outputs = unroll(source.drafter, source.lent, batch, source.steps, wanted_BT=wanted_BT)
        feature_ND = batch.feature_BTD[:, 1:][wanted_BT]
        hidden_SND = torch.stack([out_BTD[wanted_BT] for out_BTD in outputs])
        own = [_most_likely(source, hidden_ND) for hidden_ND in hidden_SND]
        own_prob_SNR, own_token_SNR = (torch.stack(part) for part in zip(*own, strict=True))
        yield Rows(hidden_SND, feature_ND, *_most_likely(source, feature_ND), own_prob_SNR, own_token_SNR)


def _most_likely(source: Source, hidden_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(prob_NR, token_NR), best first, of the TOP most likely tokens, to whose sum the probabilities are normalised.

    In float32. Where the head is quicker in bfloat16, that names some more candidates, and they are scored again.
    """
    lent, quick, found = source.lent, source.quick, []
    vocabulary = lent.head_VD.shape[0]
    for part_ND in hidden_ND.split(CHUNK if quick is lent else CHUNK // 8):
        logit_NV = quick.logits(part_ND.to(quick.head_VD.dtype))
        if quick is lent:
            logit_NR, token_NR = logit_NV.topk(min(TOP, vocabulary))
        else:
            token_NC = logit_NV.topk(min(CANDIDATES, vocabulary), sorted=False).indices
            raw_NC = torch.einsum("nd,ncd->nc", part_ND, lent.head_VD[token_NC])
            bias = 0.0 if lent.head_bias_V is None else lent.head_bias_V[token_NC]
            logit_NR, best_NR = lent.transform(raw_NC + bias).topk(min(TOP, vocabulary))
            token_NR = token_NC.gather(-1, best_NR)
        found.append((logit_NR.float().softmax(-1), token_NR))
    prob_NR, token_NR = (torch.cat(part) for part in zip(*found, strict=True))
    return prob_NR, token_NR


@torch.no_grad()
def gather(source: Source, store: Store, *, seed: int, progress: Progress = silent) -> Rows:
    """Training rows: one epoch, or as many as BUFFER_BYTES hold."""
    total = -(-len(store.train_indices) // DIALOGUES)
    samples = itertools.islice(batches(store, batch_size=DIALOGUES, seed=seed), total)
    kept: list[Rows] = []
    size_bytes = 0
    for done, rows in enumerate(collect(source, samples), start=1):
        kept.append(rows)
        size_bytes += sum(tensor.nbytes for tensor in vars(rows).values())
        full = size_bytes >= BUFFER_BYTES
        progress("router data", done, done if full else min(total, -(-done * BUFFER_BYTES // size_bytes)), {})
        if full:
            break
    return _concat(kept)


@torch.no_grad()
def held_out_rows(source: Source, store: Store, *, progress: Progress = silent) -> Rows:
    """Rows of the first HELD_OUT dialogues that nothing was trained on."""
    indices = list(store.holdout_indices)[:HELD_OUT]
    firsts = range(0, len(indices), DIALOGUES)
    samples = (batch_of(store, indices[first : first + DIALOGUES]) for first in firsts)
    kept: list[Rows] = []
    for done, rows in enumerate(collect(source, samples), start=1):
        kept.append(rows)
        progress("held-out rows", done, len(firsts), {})
    return _concat(kept)


def _concat(parts: list[Rows]) -> Rows:
    """All rows; N is the last axis but one of every field."""
    names = [field.name for field in dataclasses.fields(Rows)]
    return Rows(**{name: torch.cat([getattr(part, name) for part in parts], dim=-2) for name in names})


def group_labels(rows: Rows, groups: Groups) -> torch.Tensor:
    """The labels [N,G]: of the roots of the drafter's probabilities, each group's share."""
    root_NR, token_NR = rows.own_prob_SNR.flatten(0, 1).sqrt(), rows.own_token_SNR.flatten(0, 1)
    share_NR = root_NR / root_NR.sum(-1, keepdim=True)
    group_NR = groups.group_V.to(token_NR.device)[token_NR]
    return share_NR.new_zeros(len(group_NR), groups.count).scatter_add_(1, group_NR, share_NR)


def first_router(groups: Groups, lent: Lent, *, inner: bool = False) -> Router:
    """A router that scores a group by the mean logit of its rows, to be trained.

    From random weights it learns the texts that it is shown as well, and others less: on kinds of text that it never
    saw, an eighth of the rows kept 95.7 % of what the drafter gets right, so 97.6 (LOG.md).
    """
    router = Router(lent.head_VD.shape[1], groups.count, inner=inner).to(lent.head_VD.device)
    group_V = groups.group_V.to(lent.head_VD.device)
    sum_GD = torch.zeros_like(router.w2.weight).index_add_(0, group_V, lent.head_VD.float())
    router.w2.weight.data = lent.logit_scale * sum_GD / group_V.bincount(minlength=groups.count)[:, None]
    for silent_at_first in (router.w2.bias, *(router.w1.parameters() if router.w1 else ())):
        silent_at_first.data.zero_()
    return router


def train_router(
    router: Router, rows: Rows, groups: Groups, spec: HeadSpec, *, seed: int, progress: Progress = silent
) -> Router:
    """The router, trained for frozen drafter outputs. AdamW, cosine to zero, soft-label cross-entropy."""
    label_NG, hidden_ND = group_labels(rows, groups), rows.hidden_SND.flatten(0, 1)
    device = hidden_ND.device
    optimizer = torch.optim.AdamW(router.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, spec.router_steps)
    draw = torch.Generator().manual_seed(seed)
    for step in range(1, spec.router_steps + 1):
        some_N = torch.randint(len(hidden_ND), (ROWS,), generator=draw).to(device)
        loss = -(label_NG[some_N] * router(hidden_ND[some_N]).log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == spec.router_steps:
            progress(f"router of {groups.count} groups", step, spec.router_steps, {"loss": loss.item()})
    return router.requires_grad_(False).eval()


def drafted(rows: Rows, topk: int) -> torch.Tensor:
    """[S,N] whether the drafter, with the full head, has the target's argmax among its `topk` best (TOP at most)."""
    return (rows.own_token_SNR[..., :topk] == rows.token_NR[:, :1]).any(-1)


@torch.no_grad()
def recall(router: Router, rows: Rows, groups: Groups, active: int, drafted_SN: torch.Tensor) -> dict[str, float]:
    """How often the `active` best groups hold the target's argmax, its ten best tokens, and its probability mass.

    `kept` is the argmax's share among the rows where the full head drafts it: what reading fewer rows loses.
    """
    best_SNR = router(rows.hidden_SND).topk(active).indices
    inside_SNG = torch.zeros(*best_SNR.shape[:2], groups.count, dtype=torch.bool, device=best_SNR.device)
    inside_SNG.scatter_(2, best_SNR, True)
    group_NR = groups.group_V.to(rows.token_NR.device)[rows.token_NR]
    inside_SNR = inside_SNG.gather(2, group_NR.expand(len(best_SNR), -1, -1)).float()
    argmax_SN = inside_SNR[:, :, 0]
    return {
        "argmax": float(argmax_SN.mean()),
        "top10": float(inside_SNR[:, :, :10].mean()),
        "mass": float((rows.prob_NR * inside_SNR).sum(-1).mean()),
        "kept": float(argmax_SN[drafted_SN].mean()) if drafted_SN.any() else 1.0,
    }
