"""The group-head stage: from data and drafter to the published head, runs/NAME/head.

Axes: S unroll step, N row, D hidden, V vocabulary.
"""

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any, Protocol

import torch

from coral_core.artifacts import Manifest, Standing, stage, standing
from coral_core.drafter.load import load_drafter
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError
from coral_core.grouping.clustering import (
    balanced,
    cooccurrence_rows,
    frequency_order,
    token_contexts,
)
from coral_core.grouping.cost import RoundCost, predict, time_calls, time_heads
from coral_core.grouping.router import (
    Rows,
    Source,
    drafted,
    first_router,
    gather,
    held_out_rows,
    recall,
    train_router,
)
from coral_core.head.groups import Groups, check_groups
from coral_core.head.heads import FullHead, GroupedHead, Router
from coral_core.head.load import FILE, save_head
from coral_core.lent import Lent
from coral_core.processes import processes
from coral_core.progress import Progress, silent
from coral_core.recipe.loader import changes, section_fingerprint, to_mapping
from coral_core.recipe.schema import HeadSpec, Recipe
from coral_core.store.store import Store, Tap
from coral_core.training.stage import open_data

SECTIONS = ("seed", "head")
"""What of a recipe decides the head, besides drafter and data."""
GROUPS = (64, 128, 256)
"""Numbers of groups that are tried where the recipe leaves it open."""
SHARES = (4, 8, 16, 32)
"""One group in so many is active, where the recipe leaves it open."""
CONTEXT_TOKENS = 10
"""Of the target's most likely tokens, so many count as occurring together."""


class Probe(Protocol):
    """Measures rounds with the target: passed in, since decoding is another room."""

    @property
    def lent(self) -> Lent:
        """The target's head, on the device and in the dtype of decoding."""
        ...

    def measure(self, drafter: Drafter) -> RoundCost:
        """One mean round with the full head."""
        ...


def group_head(
    recipe: Recipe,
    run: Path,
    progress: Progress = silent,
    probe: Probe | None = None,
    tap: Tap | None = None,
) -> tuple[Manifest, bool]:
    """Cluster the vocabulary, train the router, publish runs/NAME/head; (its manifest, whether there was work to do).

    Where the recipe leaves groups or active open (0), every setting is tried, and the one that is predicted to be
    fastest from `probe`'s round is published. `tap` is asked for features where the store holds none. Raises
    ArtifactError when data or drafter are missing, damaged, or made for something else.
    """
    store, final = open_data(recipe, run, tap), run / "head"
    fingerprint, inputs = _identity(recipe, run, store)
    if finished := head_standing(recipe, run).manifest:
        return finished, False
    drafter = load_drafter(run / "drafter").float()
    _refuse_unusable(drafter, store, run / "drafter")
    with stage(final, fingerprint) as work:
        trial = Trial.of(recipe, store, drafter, progress)
        settings, best = try_settings(trial, probe)
        save_head(work, best.groups, best.router, frequency_order(trial.count_V))
        facts = _facts(recipe, trial, settings, best)
        sections = {name: to_mapping(recipe)[name] for name in SECTIONS}
        manifest = Manifest(kind="head", fingerprint=fingerprint, inputs=inputs, recipe=sections, facts=facts)
        manifest = manifest.sealed(work, FILE)
        manifest.write(work)
    return manifest, True


def _refuse_stranger(trained: Manifest, store: Store, folder: Path) -> None:
    """An imported drafter knows no data, only its target."""
    remedy = "Run: coral prepare-data, with the drafter's own target"
    trained.refuse_stranger(folder, remedy, target=store.manifest.inputs["target"])
    if "data" in trained.inputs:
        trained.refuse_stranger(folder, "Run: coral train", data=store.manifest.fingerprint)


def _refuse_unusable(drafter: Drafter, store: Store, folder: Path) -> None:
    """Raises ArtifactError for a drafter with an LM head of its own, or that reads other layers than the data hold."""
    if rows := drafter.config.draft_vocab_size:
        raise ArtifactError(
            f"the drafter in {folder} has an LM head of its own, of {rows} rows (draft_vocab_size): there is nothing "
            "to group. Run: coral eval"
        )
    if drafter.config.taps and drafter.config.taps != store.taps:
        raise ArtifactError(
            f"the drafter in {folder} reads the inputs of layers {drafter.config.taps}, and the data in {store.folder} "
            f"hold {store.taps or 'none'}. {_remedy(store)}"
        )


def _remedy(store: Store) -> str:
    """For data that hold the wrong layers: where they hold some, coral stores no others of this target."""
    if not store.taps:
        return "Run: coral prepare-data train.shape=eagle3"
    return "No data can be made for it. Run: coral eval head.kind=full"


def head_standing(recipe: Recipe, run: Path) -> Standing:
    """What stands in runs/NAME/head already. Raises as `group_head` does."""
    _, inputs = _identity(recipe, run, open_data(recipe, run))
    sections = {name: to_mapping(recipe)[name] for name in SECTIONS}
    return standing(run / "head", "head", lambda made: changes(made, sections, inputs))


def _identity(recipe: Recipe, run: Path, store: Store) -> tuple[str, dict[str, str]]:
    """The head's fingerprint and inputs. Raises ArtifactError when the drafter was trained on other data."""
    trained = Manifest.read(run / "drafter", "drafter", "coral train")
    _refuse_stranger(trained, store, run / "drafter")
    inputs = {"target": trained.inputs["target"], "data": store.manifest.fingerprint, "drafter": trained.fingerprint}
    return section_fingerprint(recipe, *SECTIONS, **inputs), inputs


@dataclasses.dataclass(frozen=True)
class Trial:
    """What settings are tried on: the rows to learn from, and the rows to judge by."""

    recipe: Recipe
    drafter: Drafter
    lent: Lent
    count_V: torch.Tensor
    rows: Rows
    unseen: Rows
    drafted_SN: torch.Tensor
    """Where the full head drafts the target's token, of the unseen rows."""
    progress: Progress

    @classmethod
    def of(cls, recipe: Recipe, store: Store, drafter: Drafter, progress: Progress) -> "Trial":
        """Run the drafter over the store once."""
        device = processes().device
        lent = store.lent().to(device, torch.float32)
        vocabulary = lent.head_VD.shape[0]
        check_groups(recipe.head.groups, vocabulary)
        drafter = drafter.to(device)
        source = Source(drafter, lent, recipe.train.unroll_steps)
        count_V = store.answer_counts()
        rows = gather(source, store, seed=recipe.seed, progress=progress)
        unseen = held_out_rows(source, store, progress=progress) if store.holdout_indices else rows
        found_SN = drafted(unseen, recipe.decode.draft_topk)
        return cls(recipe, drafter, lent, count_V, rows, unseen, found_SN, progress)

    @functools.cached_property
    def unit_VD(self) -> torch.Tensor:
        """What is clustered, for any number of groups."""
        some = (tensor[:, :CONTEXT_TOKENS] for tensor in (self.rows.prob_NR, self.rows.token_NR))
        return cooccurrence_rows(self.lent.head_VD, token_contexts(len(self.count_V), self.rows.feature_ND, *some))

    def cluster(self, groups: int) -> Groups:
        """The vocabulary in so many groups."""
        return balanced(self.unit_VD, groups, count_V=self.count_V, seed=self.recipe.seed, progress=self.progress)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One number of groups and of active ones, and what was found of it."""

    groups: Groups
    router: Router
    active: int
    facts: dict[str, Any]


def try_settings(trial: Trial, probe: Probe | None) -> tuple[list[Setting], Setting]:
    """Every setting that the recipe leaves open, and the best: the fastest as predicted, else the recipe's own."""
    spec, progress, settings = trial.recipe.head, trial.progress, []
    cost = probe.measure(trial.drafter) if probe else None
    for total in open_groups(spec, len(trial.count_V)):
        groups = trial.cluster(total)
        router = first_router(groups, trial.lent)
        train_router(router, trial.rows, groups, spec, seed=trial.recipe.seed, progress=progress)
        for active in open_active(spec, total):
            found = recall(router, trial.unseen, groups, active, trial.drafted_SN)
            rows_read = groups.start_G[active]
            facts = {"groups": total, "active": active, "rows_read": rows_read, "recall": found}
            settings.append(Setting(groups, router, active, facts))
    _time(settings, trial, probe.lent if probe else trial.lent, cost)
    return settings, max(settings, key=lambda setting: setting.facts.get("tokens_per_s", setting.facts["rows_read"]))


def open_groups(spec: HeadSpec, vocabulary: int) -> list[int]:
    """Numbers of groups to try: the recipe's, else those that leave sixteen rows in a group."""
    return [spec.groups] if spec.groups else [count for count in GROUPS if count * 16 <= vocabulary] or [1]


def open_active(spec: HeadSpec, groups: int) -> list[int]:
    """Numbers of active groups to try, largest first."""
    return [spec.active] if spec.active else sorted({max(1, groups // share) for share in SHARES}, reverse=True)


def _time(settings: list[Setting], trial: Trial, lent: Lent, cost: RoundCost | None) -> None:
    """Add to each setting's facts what its head takes on this device, and what the cost model makes of it."""
    topk = trial.recipe.decode.draft_topk
    alone = cost or RoundCost(hit_rates=[], round_s=0, head_s=0, head_calls=1e9, level_rows=topk)
    hidden_ND = trial.unseen.hidden_SND.flatten(0, 1)[: alone.level_rows].to(lent.head_VD.device, lent.head_VD.dtype)
    (full_s,), head = time_heads([FullHead(lent)], hidden_ND, alone), None
    for number, setting in enumerate(settings):
        if head is None or setting.groups is not settings[number - 1].groups:
            head = GroupedHead(lent, setting.groups, copy.deepcopy(setting.router), setting.active)
        head.active = setting.active
        (call_s,) = time_heads([head], hidden_ND, alone)
        (router_s,) = time_calls([lambda head=head: head.router(hidden_ND)], hidden_ND.device)  # type: ignore[misc]
        setting.facts.update(full_head_ms=full_s * 1e3, head_ms=call_s * 1e3, router_ms=router_s * 1e3)
        if cost:
            kept = setting.facts["recall"]["kept"]
            setting.facts.update(
                dataclasses.asdict(predict(cost, full_call_s=full_s, call_s=call_s, kept=kept)),
                round=dataclasses.asdict(cost),
            )
        trial.progress("time heads", number + 1, len(settings), {})


def _facts(recipe: Recipe, trial: Trial, settings: list[Setting], best: Setting) -> dict[str, object]:
    round_cost = best.facts.get("round")
    for setting in settings:
        setting.facts.pop("round", None)
    return {
        **best.facts,
        "vocabulary": len(trial.count_V),
        "recall_rows": trial.unseen.hidden_SND.shape[:2].numel(),
        "timed_rows": recipe.decode.draft_topk,
        "round": round_cost,
        "settings": [setting.facts for setting in settings],
    }
