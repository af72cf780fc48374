"""One training of benchmarks/methods.py and the tokens per round of its drafter; what all rows share."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import replay
from benchmarks.methods_table import Row, is_comparison
from coral_core.artifacts import fingerprint, write_text
from coral_core.bench.acceptance import emitted_by_prompt
from coral_core.bench.metrics import accepted_by_depth
from coral_core.decoding.engine import Engine
from coral_core.drafter.load import load_drafter
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError
from coral_core.head.heads import FullHead
from coral_core.recipe.loader import dump_yaml
from coral_core.recipe.schema import PRESETS, UNSET, Recipe, TrainSpec
from coral_core.run import sampler, tree_shape
from coral_core.store.store import Store
from coral_core.target.capture import tap
from coral_core.target.load import load_target
from coral_core.target.target import Target
from coral_core.training.stage import open_data, train_drafter

AS_PUBLISHED: dict[str, Any] = {key: value for key, value in UNSET.items() if key != "feature_noise"}
"""What the three methods take for these keys, whatever the recipe says."""
PASSES = ("unroll_growth", "unroll_drawn")
WEIGHTS = ("step_decay", "regression_weight", "distill_weight", "topk_weight", "csra_weight")
FORM = ("shape", "through_steps", "unroll_steps", "feature_noise", *PASSES, *WEIGHTS)
"""The keys that CORAL takes from the recipe where time is equal."""
PAPERS_TREE: dict[str, Any] = {
    "tree": "fixed",
    "draft_depth": 6,
    "draft_nodes": 60,
    "draft_topk": 10,
}
"""EAGLE-2's, on which HASS and CORAL are compared too. A CPU's small trees rarely reach the depths that the unroll
trains: on pico's (10 nodes, cut at a confidence of 0.05), seed 0, HASS was 1.006 times EAGLE-2."""
CHECKED = 10
"""Prompts on which a replay is compared with real decoding, in the rows that are compared."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One training: a preset, the keys that differ from it, and a seed."""

    part: str
    preset: str
    seed: int
    steps: int
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """As the table calls it: a comparison's rows by their method alone."""
        if is_comparison(self.part):
            return self.preset
        return " ".join([self.preset, *(f"{key}={value}" for key, value in self.changes)])


def identity(spec: TrainSpec) -> dict[str, Any]:
    """The spec's keys, without the one that was added since rows were first measured, at what it was then."""
    keys = dataclasses.asdict(spec)
    return keys if keys["unroll_drawn"] else {key: value for key, value in keys.items() if key != "unroll_drawn"}


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all rows share."""

    recipe: Recipe
    run: Path
    store: Store
    target: Target
    prompts: list[list[int]]
    repeating: list[Target]
    skipped: int = 0
    """Held-out prompts that come before these, and are left out."""
    noise: float | None = None
    """Of the features that the methods as published are trained on; None: the recipe's."""

    def spec(self, variant: Variant) -> TrainSpec:
        """The recipe's training with a preset's keys, then the variant's."""
        fixed = {"preset": variant.preset, "steps": variant.steps, "eval_every": 0}
        fixed["candidates"] = self.recipe.train.candidates
        method = {**AS_PUBLISHED, **PRESETS[variant.preset]}
        method |= {} if self.noise is None else {"feature_noise": self.noise}
        return dataclasses.replace(self.recipe.train, **{**method, **fixed, **dict(variant.changes)})

    def form(self, method: str) -> tuple[tuple[str, Any], ...]:
        """What a method takes from the recipe where time is equal: CORAL its whole form, HASS how its passes come."""
        keys = {"eagle2": (), "hass": PASSES, "coral": FORM}[method]
        return tuple((key, getattr(self.recipe.train, key)) for key in keys)

    def key(self, variant: Variant) -> str:
        """Everything that decides a row's numbers."""
        train_keys = identity(self.spec(variant))
        del train_keys["preset"]
        data, tree = self.store.manifest.fingerprint, dataclasses.asdict(self.recipe.decode)
        asked = [self.skipped, len(self.prompts)] if self.skipped else len(self.prompts)
        return fingerprint([data, self.target.fingerprint, tree, asked, variant.seed, train_keys])

    def measure(self, variant: Variant) -> Row:
        """Train, and count tokens and rounds on every prompt."""
        begun_s = time.perf_counter()
        spec = self.spec(variant)
        recipe, run = self.own_run(variant, spec)
        manifest, _ = train_drafter(recipe, run, progress_line(variant), tap=self.store.tap)
        last, drafter = manifest.facts["last"], load_drafter(run / "drafter")
        emitted = [
            self.decode(target, drafter, [prompt])[0]
            for target, prompt in zip(self.repeating, self.prompts, strict=True)
        ]
        row = {
            "part": variant.part,
            "name": variant.name,
            "seed": variant.seed,
            "steps": spec.steps,
            "train_s": last["elapsed_s"],
            "row_s": time.perf_counter() - begun_s,
            "run": run.name,
            "last": {key: value for key, value in last.items() if key.startswith(("loss", "accuracy", "cosine"))},
            "tokens": [sum(rounds) for rounds in emitted],
            "rounds": [len(rounds) for rounds in emitted],
            "accepted_by_depth": accepted_by_depth([tokens - 1 for rounds in emitted for tokens in rounds]),
        }
        if is_comparison(variant.part) and variant.seed == 0:
            decoded = self.decode(self.target, drafter, self.prompts[:CHECKED])
            row["decoded_alike"] = [sum(a == b for a, b in zip(decoded, emitted, strict=False)), len(decoded)]
        return row

    def own_run(self, variant: Variant, spec: TrainSpec) -> tuple[Recipe, Path]:
        """A run for one training, on the same data: its drafter stays there, for other benchmarks."""
        run = self.run / "methods" / self.key(variant)
        run.mkdir(parents=True, exist_ok=True)
        recipe = dataclasses.replace(self.recipe, name=run.name, seed=variant.seed, train=spec)
        write_text(run / "recipe.yaml", dump_yaml(recipe))
        if not (run / "data").exists():
            (run / "data").symlink_to((self.run / "data").resolve(), target_is_directory=True)
        return recipe, run

    def decode(self, target: Target, drafter: Drafter, prompts: list[list[int]]) -> list[list[int]]:
        """Tokens of each round, for each prompt, with the full head."""
        drafter = drafter.to(target.device, target.dtype)
        engine = Engine(target, drafter, FullHead(target.lent), tree_shape(self.recipe.decode))
        return list(emitted_by_prompt(engine, prompts, sampler(self.recipe), self.recipe.decode.max_new_tokens))


def progress_line(variant: Variant) -> Any:
    """A line on stderr now and then: this runs unattended."""

    def show(_stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        if total and done and done % max(1, total // 4) == 0:
            loss = f", loss {numbers['loss']:.3f}" if "loss" in numbers else ""
            print(f"  {variant.name}, seed {variant.seed}: step {done} of {total}{loss}", file=sys.stderr, flush=True)

    return show


def open_bench(recipe: Recipe, run: Path, prompts: int, skipped: int = 0, noise: float | None = None) -> Bench:
    """Data, target, and the target's own answers to so many held-out prompts after those that are skipped.

    The answers are kept for the next time.
    """
    target = load_target(recipe.target)
    store = open_data(recipe, run, lambda *batch: (tap(target, *batch).feature_BTD, None))
    if store.manifest.inputs["target"] != target.fingerprint:
        raise ArtifactError(f"{store.folder} was made with another target. Run: coral prepare-data")
    held = store.holdout_prompts
    wanted = skipped + prompts
    if len(held) < wanted:
        raise ArtifactError(
            f"{store.folder} holds {len(held)} held-out prompts of the {wanted} wanted. "
            f"Run coral prepare-data with data.holdout={wanted}, or lower --prompts"
        )
    chosen = held[skipped:wanted]
    folder = run / "methods"
    folder.mkdir(exist_ok=True)
    settings = [target.fingerprint, chosen, dataclasses.asdict(recipe.decode), recipe.seed]
    path = folder / f"answers-{fingerprint(settings)}.json"
    if not path.exists():
        print(f"{prompts} plain answers, once", file=sys.stderr, flush=True)
        made = list(replay.plain_answers(target, chosen, sampler(recipe), recipe.decode.max_new_tokens))
        write_text(path, json.dumps(made) + "\n")
    answers = zip(chosen, json.loads(path.read_text()), strict=True)
    repeating = [replay.repeating(target, prompt, answer, store.taps) for prompt, answer in answers]
    return Bench(recipe, run, store, target, chosen, repeating, skipped, noise)
