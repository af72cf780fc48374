"""The group-head stage: from data and drafter to the published head, runs/NAME/head.

Axes: N row, D hidden, V vocabulary.
"""

import statistics
import time
from pathlib import Path

import torch

from coral_core.artifacts import MANIFEST, Manifest, stage
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError
from coral_core.head.candidates import Head
from coral_core.head.clustering import by_frequency, by_id, by_kmeans, frequency_order
from coral_core.head.full import FullHead
from coral_core.head.grouped import GroupedHead
from coral_core.head.groups import Groups, check_groups
from coral_core.head.load import COMMAND, save_head
from coral_core.lent import Lent
from coral_core.progress import Progress, silent
from coral_core.recipe.loader import section_fingerprint, to_mapping
from coral_core.recipe.schema import HeadSpec, Recipe
from coral_core.store.store import Store
from coral_core.training.publish import open_data
from coral_core.training.router import Source, answer_counts, gather, held_out_rows, recall, train_router

SECTIONS = ("seed", "head")
"""What of a recipe decides the head, besides drafter and data."""
TIMED_ROWS = 4
"""Beam rows of the timing."""


def group_head(recipe: Recipe, run: Path, progress: Progress = silent) -> tuple[Manifest, bool]:
    """Cluster the vocabulary, train the router, publish runs/NAME/head; (its manifest, whether there was work to do).

    Raises ArtifactError when data or drafter are missing, damaged, or made for something else.
    """
    store = open_data(recipe, run)
    trained = Manifest.read(run / "drafter", "drafter", "coral train")
    _refuse_stranger(trained, store, run / "drafter")
    final = run / "head"
    inputs = {"target": trained.inputs["target"], "data": store.manifest.fingerprint, "drafter": trained.fingerprint}
    fingerprint = section_fingerprint(recipe, *SECTIONS, **inputs)
    if (final / MANIFEST).exists():
        manifest = Manifest.read(final, "head", COMMAND)
        if manifest.fingerprint == fingerprint:
            return manifest, False
    drafter = Drafter.load(run / "drafter").float()
    with stage(final, fingerprint) as work:
        facts = _build(recipe, store, drafter, work, progress)
        sections = {name: to_mapping(recipe)[name] for name in SECTIONS}
        manifest = Manifest(kind="head", fingerprint=fingerprint, inputs=inputs, recipe=sections, facts=facts)
        manifest.write(work)
    return manifest, True


def _refuse_stranger(trained: Manifest, store: Store, folder: Path) -> None:
    """An imported drafter knows no data, only its target."""
    if (made_for := trained.inputs["target"]) != (tapped := store.manifest.inputs["target"]):
        raise ArtifactError(
            f"the drafter in {folder} is for target {made_for}, and the data in {store.folder} are of target {tapped}. "
            "Run: coral prepare-data, with the drafter's own target"
        )
    if trained.inputs.get("data", store.manifest.fingerprint) != store.manifest.fingerprint:
        raise ArtifactError(f"the drafter in {folder} was trained on other data than {store.folder}. Run: coral train")


def _build(recipe: Recipe, store: Store, drafter: Drafter, work: Path, progress: Progress) -> dict[str, object]:
    spec, lent = recipe.head, store.lent().to("cpu", torch.float32)
    vocabulary, hidden = lent.head_VD.shape
    check_groups(spec.groups, vocabulary)
    count_V = answer_counts(store, vocabulary)
    groups = cluster(spec, lent, count_V, recipe.seed, progress)
    source = Source(drafter, lent, groups, recipe.train.unroll_steps)
    rows = gather(source, store, seed=recipe.seed, progress=progress)
    router = train_router(rows, hidden, groups, spec, seed=recipe.seed, progress=progress)
    save_head(work, groups, router, frequency_order(count_V))
    unseen = held_out_rows(source, store) if store.holdout_indices else rows
    grouped = GroupedHead(lent, groups, router, spec.active)
    full_s, grouped_s = time_heads([FullHead(lent), grouped], rows.hidden_ND[:TIMED_ROWS])
    return {
        **{key: getattr(spec, key) for key in ("groups", "active", "clustering")},
        "vocabulary": vocabulary,
        "rows_read": sum(groups.start_G[g + 1] - groups.start_G[g] for g in range(spec.active)),
        "recall": recall(router, unseen, spec.active),
        "recall_rows": len(unseen.hidden_ND),
        "full_head_ms": full_s * 1e3,
        "grouped_head_ms": grouped_s * 1e3,
        "timed_rows": TIMED_ROWS,
    }


def cluster(spec: HeadSpec, lent: Lent, count_V: torch.Tensor, seed: int, progress: Progress = silent) -> Groups:
    """The recipe's clustering of the vocabulary."""
    if spec.clustering == "id":
        return by_id(len(count_V), spec.groups)
    if spec.clustering == "frequency":
        return by_frequency(count_V, spec.groups)
    return by_kmeans(lent.head_VD, spec.groups, count_V=count_V, seed=seed, progress=progress)


@torch.no_grad()
def time_heads(heads: list[Head], hidden_ND: torch.Tensor, repeats: int = 40) -> list[float]:
    """Median seconds of one call of each head, taking turns on this machine."""
    spent: list[list[float]] = [[] for _ in heads]
    for turn in range(repeats + 5):
        for head, seconds in zip(heads, spent, strict=True):
            begun = time.perf_counter()
            head.candidates(hidden_ND).best(4)
            if turn >= 5:
                seconds.append(time.perf_counter() - begun)
    return [statistics.median(seconds) for seconds in spent]
