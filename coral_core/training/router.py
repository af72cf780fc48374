"""The router's training: the second stage, with the drafter frozen.

It learns on the drafter's own outputs of all unroll steps, which is what it reads when decoding, to predict how much
of the target's probability lies in each group:  y_g = Σ_{v in g} p(v),  L = −Σ_g y_g log p_router(g).
Axes: N row, D hidden, G group, V vocabulary.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import torch

from coral_core.drafter.model import Drafter
from coral_core.head.groups import Groups
from coral_core.head.router import Router
from coral_core.lent import Lent
from coral_core.progress import Progress, silent
from coral_core.recipe.schema import HeadSpec
from coral_core.store.batches import Batch, batches, collate
from coral_core.store.store import Store
from coral_core.training.unroll import loss_rows, unroll

DIALOGUES = 8
"""Dialogues per forward pass of the drafter."""
BUFFER_BYTES = 1 << 30
"""Rows are computed once and kept, up to this; the vocabulary-sized labels are what costs, not the router."""
ROWS = 1024
"""Rows of one router step."""
CHUNK = 2048
"""Rows whose vocabulary-sized probabilities exist at once."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the router's rows come from: a frozen drafter, its head, the groups, and the unroll steps to look at."""

    drafter: Drafter
    lent: Lent
    groups: Groups
    steps: int


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the router learns from."""

    hidden_ND: torch.Tensor
    """The drafter's outputs."""
    mass_NG: torch.Tensor
    """The target's probability of each group."""
    top_NK: torch.Tensor
    """Groups of the target's ten most likely tokens, the most likely first."""


def collect(source: Source, samples: Iterable[Batch]) -> Iterator[Rows]:
    """One `Rows` per batch: the loss rows of every unroll step."""
    group_V, lent, steps = source.groups.group_V, source.lent, source.steps
    for batch in samples:
        wanted_BR = loss_rows(batch)
        outputs = unroll(source.drafter, lent, batch, steps, wanted_BR=wanted_BR)
        feature_ND = batch.feature_BTD[:, 1:][wanted_BR]
        labels = [_label(lent, group_V, source.groups.count, part_ND) for part_ND in feature_ND.split(CHUNK)]
        mass_NG, top_NK = (torch.cat(part) for part in zip(*labels, strict=True))
        hidden_ND = torch.cat([out_BRD[wanted_BR] for out_BRD in outputs])
        yield Rows(hidden_ND, mass_NG.repeat(steps, 1), top_NK.repeat(steps, 1))


def _label(
    lent: Lent, group_V: torch.Tensor, groups: int, feature_ND: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    p_NV = lent.logits(feature_ND).float().softmax(-1)
    mass_NG = p_NV.new_zeros(len(p_NV), groups).index_add_(1, group_V, p_NV)
    return mass_NG, group_V[p_NV.topk(min(10, p_NV.shape[1])).indices]


@torch.no_grad()
def gather(source: Source, store: Store, *, seed: int, progress: Progress = silent) -> Rows:
    """Training rows: one epoch, or as many as BUFFER_BYTES hold."""
    total = -(-len(store.train_indices) // DIALOGUES)
    samples = itertools.islice(batches(store, batch_size=DIALOGUES, seed=seed), total)
    kept: list[Rows] = []
    size_bytes = 0
    for done, rows in enumerate(collect(source, samples), start=1):
        kept.append(rows)
        size_bytes += rows.hidden_ND.nbytes + rows.mass_NG.nbytes
        progress("router data", done, total, {})
        if size_bytes >= BUFFER_BYTES:
            progress("router data", total, total, {})
            break
    return _concat(kept)


@torch.no_grad()
def held_out_rows(source: Source, store: Store) -> Rows:
    """Rows of the dialogues that nothing was trained on."""
    indices = list(store.holdout_indices)
    firsts = range(0, len(indices), DIALOGUES)
    samples = (collate([store[index] for index in indices[first : first + DIALOGUES]]) for first in firsts)
    return _concat(list(collect(source, samples)))


def _concat(parts: list[Rows]) -> Rows:
    return Rows(
        *(torch.cat(tensors) for tensors in zip(*((p.hidden_ND, p.mass_NG, p.top_NK) for p in parts), strict=True))
    )


def train_router(
    rows: Rows, hidden: int, groups: Groups, spec: HeadSpec, *, seed: int, progress: Progress = silent
) -> Router:
    """A router for frozen drafter outputs. AdamW, cosine to zero, soft-label cross-entropy."""
    torch.manual_seed(seed)
    device = rows.hidden_ND.device
    router = Router(hidden, groups.count).to(device)
    optimizer = torch.optim.AdamW(router.parameters(), lr=spec.router_learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, spec.router_steps)
    draw = torch.Generator().manual_seed(seed)
    for step in range(1, spec.router_steps + 1):
        some_N = torch.randint(len(rows.hidden_ND), (ROWS,), generator=draw).to(device)
        loss = -(rows.mass_NG[some_N] * router(rows.hidden_ND[some_N]).log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == spec.router_steps:
            progress("router", step, spec.router_steps, {"loss": loss.item()})
    return router.requires_grad_(False).eval()


@torch.no_grad()
def recall(router: Router, rows: Rows, active: int) -> dict[str, float]:
    """How often the `active` best groups hold the target's argmax, its ten best tokens, and its probability mass."""
    best_NA = router(rows.hidden_ND).topk(active).indices
    inside_NG = torch.zeros_like(rows.mass_NG, dtype=torch.bool).scatter_(1, best_NA, True)
    return {
        "argmax": float(inside_NG.gather(1, rows.top_NK[:, :1]).float().mean()),
        "top10": float(inside_NG.gather(1, rows.top_NK).float().mean()),
        "mass": float((rows.mass_NG * inside_NG).sum(1).mean()),
    }


def answer_counts(store: Store, vocabulary: int) -> torch.Tensor:
    """How often each token [V] stands in the training dialogues' answers."""
    count_V = torch.zeros(vocabulary, dtype=torch.int64)
    for index in store.train_indices:
        sample = store[index]
        count_V += torch.bincount(sample.ids_T[sample.answer_T], minlength=vocabulary)
    return count_V
