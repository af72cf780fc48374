"""Published runs with random drafters of tiny targets."""

import dataclasses
from pathlib import Path

import torch

from coral_core.artifacts import Manifest
from coral_core.drafter.config import DrafterConfig
from coral_core.drafter.load import FILES, save_drafter
from coral_core.drafter.model import Drafter
from coral_core.export.run import Source, open_source
from coral_core.grouping.clustering import frequency_order
from coral_core.head.groups import Groups
from coral_core.head.heads import Router
from coral_core.head.load import save_head
from coral_core.recipe.schema import HeadSpec, Recipe
from coral_core.target.load import drafter_shape
from coral_core.target.target import Target
from tests.tiny import VOCAB

RECIPE = Recipe(name="tiny", head=HeadSpec(groups=8, active=2))


def random_drafter(target: Target, seed: int = 1, **changes: object) -> Drafter:
    """Of the target's shape; every weight random, the norm's and the bias's too."""
    torch.manual_seed(seed)
    shape = {**drafter_shape(target.model.config), **changes}
    drafter = Drafter(DrafterConfig(**shape)).requires_grad_(False).eval()
    for weight in drafter.parameters():
        weight.add_(torch.randn_like(weight) * 0.1)
    return drafter


def publish(run: Path, target: Target, drafter: Drafter, *, head: bool = False) -> Source:
    """RUN/drafter, and RUN/head if wanted, as the stages publish them."""
    (run / "drafter").mkdir(parents=True)
    save_drafter(drafter, run / "drafter")
    facts = {"parameters": 1000, "drafter_config": dataclasses.asdict(drafter.config)}
    facts["data"] = {"samples": 10, "tokens": 300, "answer_tokens": 200}
    inputs = {"target": target.fingerprint, "data": "d" * 16}
    manifest = Manifest(kind="drafter", fingerprint="e" * 16, inputs=inputs, recipe={"seed": 7}, facts=facts)
    manifest.sealed(run / "drafter", *FILES).write(run / "drafter")
    if head:
        (run / "head").mkdir()
        count_V = torch.arange(VOCAB).flip(0)
        groups = Groups.from_order(frequency_order(count_V), RECIPE.head.groups)
        save_head(
            run / "head", groups, Router(drafter.config.hidden_size, RECIPE.head.groups), count_V.argsort().flip(0)
        )
        Manifest(
            kind="head",
            fingerprint="a" * 16,
            inputs={"target": target.fingerprint, "drafter": manifest.fingerprint},
            recipe={"head": dataclasses.asdict(RECIPE.head)},
            facts={"groups": 8, "active": 2, "recall": {"argmax": 0.9}},
        ).sealed(run / "head").write(run / "head")
    return open_source(RECIPE, run, target)
