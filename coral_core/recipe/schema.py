"""The recipe: one frozen value that describes a whole run, checked once when it is made.

Sections are read by one stage each, so that a stage's fingerprint depends on what it reads and on nothing else.
Numerical code never sees these classes: builders translate them into plain arguments.
"""

import dataclasses
import math
from typing import Literal

from coral_core.errors import RecipeError


def _require(ok: bool, path: str, value: object, rule: str) -> None:
    if not ok:
        raise RecipeError(f"{path} is {value!r}; it must be {rule}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """The frozen language model that is to be made faster."""

    model: str = "pico"
    """`pico` (embedded), a Hub id, a folder, or a GGUF file: its path, or OWNER/NAME/FILE.gguf on the Hub."""
    revision: str = "main"
    """Hub revision; ignored for a folder."""
    chat_template: str = ""
    """For a model without one, or in place of its own: `chatml`, `llama-2`, `vicuna`, `plain` (no turns: the text is
    continued), or a file of Jinja; empty: the tokenizer's own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights' dtype; `auto` is bfloat16 on a GPU and, from 50 million weights on, on a CPU that is faster in it or has
    no memory for float32; float32 otherwise."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless said here."""
    graphs: bool = False
    """Record the forwards of decoding as CUDA graphs and replay them. Not yet run on a GPU, so off unless said here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Dialogues, answered by the target, and the features tapped from it."""

    prompts: str = "self"
    """`self` (the target writes its own prompts), a JSONL / JSON / Parquet / text file, or a Hub dataset id; or several
    of them with weights: `chats.jsonl=3, owner/name=1, self=1`."""
    max_samples: int = 800
    """Dialogues to keep, held-out ones included."""
    max_length: int = 512
    """Tokens of one dialogue, prompt and answers; longer ones are cut."""
    max_new_tokens: int = 128
    """Tokens of one regenerated answer, and of one self-written prompt."""
    regenerate: Literal["greedy", "sample", "none"] = "greedy"
    """How the target answers the prompts anew, `sample` at temperature 1; `none` keeps the answers in the file."""
    endpoint: str = ""
    """Address of an OpenAI-compatible server of the target, such as http://host:8000/v1, that answers in its place, or
    several with commas; empty: the target answers here."""
    batch_size: int = 32
    """Dialogues generated, or tapped, at once."""
    holdout: int = 48
    """Dialogues never trained on: tau is measured on their prompts."""
    features: Literal["stored", "online"] = "stored"
    """stored: the features are kept on disk; online: only tokens are, and training asks the target for the features."""
    feature_dtype: Literal["bfloat16", "float16", "float32", "fp8"] = "bfloat16"
    """Dtype of the features on disk; `fp8` (e4m3 with a scale per token) is half of bfloat16's bytes."""

    def __post_init__(self) -> None:
        _require(self.max_samples >= 1, "data.max_samples", self.max_samples, "at least 1")
        _require(self.max_length >= 8, "data.max_length", self.max_length, "at least 8 tokens")
        _require(
            0 <= self.holdout < self.max_samples,
            "data.holdout",
            self.holdout,
            f"at least 0 and below data.max_samples ({self.max_samples})",
        )
        urls = [url.strip() for url in self.endpoint.split(",")] if self.endpoint else []
        ok = all(url.startswith(("http://", "https://")) for url in urls)
        _require(ok, "data.endpoint", self.endpoint, "an address such as http://host:8000/v1, or several with commas")
        for key in ("max_new_tokens", "batch_size"):
            _require(getattr(self, key) >= 1, f"data.{key}", getattr(self, key), "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """The drafter's training. `preset` sets the method's keys; a key written in the recipe wins over it."""

    preset: Literal["quick", "drawn", "coral", "hass", "eagle2", "eagle3", "coral3", "coral3.1"] = "coral3.1"
    """eagle2: one unroll step; hass: three, with the top-K loss; coral: hass with alignment across steps (CSRA);
    quick: coral with passes that grow; drawn: quick with one pass an update; eagle3: its shape, seven steps, gradients
    through them, the words' loss alone; coral3: eagle3 with CSRA; coral3.1: coral3 on the shape of EAGLE-3.1, three
    passes that grow."""
    shape: Literal["eagle2", "eagle3", "eagle3.1"] = "eagle3.1"
    """What the drafter reads of the target. eagle2: its last hidden state; eagle3: the inputs of three layers;
    eagle3.1: these under norms of their own, and the drafter's normed output is fed back. vLLM and SGLang load all
    three, llama.cpp eagle3."""
    steps: int = 600
    """Optimizer steps."""
    batch_size: int = 8
    """Dialogues per forward pass and process."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW, after warm-up; it then falls to a tenth along a cosine."""
    warmup_steps: int = 20
    """Optimizer steps of linear warm-up."""
    feature_noise: float = 0.0
    """Width of the uniform noise on the input features, scaled by 512 / T as EAGLE does; 0 turns it off."""
    unroll_steps: int = 3
    """Training passes n: pass F sees what the F-th drafted token sees when decoding."""
    unroll_drawn: bool = False
    """Whether each optimizer step draws its number of passes, and the losses are those of the last one alone: an update
    then costs little more than with one pass. Otherwise all passes have their losses in every update."""
    unroll_growth: float = 0.75
    """Share of the steps over which the passes grow from 1 to `unroll_steps`, in equal parts; 0: all from the first."""
    through_steps: bool = True
    """Whether gradients run through the fed-back outputs of earlier steps (EAGLE-3), or these are constants (HASS)."""
    step_decay: float = 0.8
    """The losses on words of a step weigh this much of the step's before it: 0.8 in EAGLE-3."""
    regression_weight: float = 0.0
    """Weight of the smooth-L1 distance between drafted and true features."""
    distill_weight: float = 1.0
    """Weight of the cross-entropy against the target's whole distribution."""
    topk_weight: float = 0.0
    """Weight of HASS's loss on the target's ten most likely tokens. HASS's own 1.0 is for a second stage, after 40
    epochs without (`init_from`); from the first step on it costs 4 % of tau, all that the unroll gains (LOG.md)."""
    candidates: int = 6144
    """Rows of the LM head that the losses over the vocabulary read for each batch: frequent tokens, those of the batch,
    and some drawn from the rest, which stand for it; 0, or as many as there are: all rows, exactly."""
    csra_weight: float = 0.1
    """Weight of cross-step representation alignment (InfoNCE over the unroll steps' outputs)."""
    csra_temperature: float = 0.2
    """Temperature of the alignment's cosine similarities."""
    precision: Literal["no", "bf16", "fp16", "auto"] = "no"
    """accelerate's mixed precision; `auto` is bf16 where this machine is faster in it, else no. Master weights stay in
    float32."""
    checkpoint_every: int = 100
    """Optimizer steps between resumable checkpoints."""
    eval_every: int = 0
    """Optimizer steps between measurements of real tokens per round on the held-out prompts, with the target loaded;
    the best drafter so far is the one published. 0: never, and the last is published."""
    init_from: str = ""
    """Folder of a drafter to start from, as in HASS's second stage; empty: random weights."""
    tracker: Literal[
        "none", "tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"
    ] = "none"
    """Where numbers go besides log.jsonl: a tracker that accelerate knows, whose package is to be installed."""

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulate", "unroll_steps", "checkpoint_every"):
            _require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "at least 1")
        _require(0 <= self.unroll_growth < 1, "train.unroll_growth", self.unroll_growth, "from 0 to below 1")
        for key in ("learning_rate", "csra_temperature", "step_decay"):
            _require(getattr(self, key) > 0, f"train.{key}", getattr(self, key), "above 0")
        for key in ("warmup_steps", "feature_noise", "eval_every", "candidates"):
            _require(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "at least 0")
        for key in ("regression_weight", "distill_weight", "topk_weight", "csra_weight"):
            _require(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """Which rows of the LM head the drafter multiplies."""

    kind: Literal["grouped", "full", "static"] = "grouped"
    """grouped: a router picks groups of rows; full: every row; static: the most frequent tokens (FR-Spec)."""
    groups: int = 0
    """Groups of equal size; 0: the number that `coral group-head` predicts to be fastest here."""
    active: int = 0
    """Groups multiplied per level; 0: likewise. For `static`, the share active / groups of the vocabulary is kept."""
    router_steps: int = 2400
    """Optimizer steps of the router's training."""

    def __post_init__(self) -> None:
        _require(self.groups >= 0, "head.groups", self.groups, "at least 1, or 0 to have it chosen")
        rule = f"from 1 to head.groups ({self.groups})" if self.groups else "0 while head.groups is"
        _require(0 <= self.active <= self.groups, "head.active", self.active, f"{rule}, or 0 to have it chosen")
        _require(self.router_steps >= 1, "head.router_steps", self.router_steps, "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeSpec:
    """How answers are generated: the tree, the distribution, the limit."""

    tree: Literal["auto", "fixed"] = "auto"
    """auto: each round drafts the tree that pays on this device, or none, by what its parts cost (measured once, kept
    in the run's tree.json), and on a processor a copy of the text may take its place; the draft_ keys are its bounds.
    fixed: every tree is the drafter's, as large as they say."""
    draft_depth: int = 8
    """Levels of the draft tree."""
    draft_nodes: int = 60
    """Drafted nodes verified per round, the root not counted."""
    draft_topk: int = 8
    """Nodes expanded per level, and children each proposes."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus: smallest set of tokens whose probability reaches this; 1 turns it off."""
    top_k: int = 0
    """Most likely tokens kept; 0 turns it off."""
    min_p: float = 0.0
    """Tokens less likely than this share of the most likely one are left out; 0 turns it off."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of prompt and answer so far become less likely, at temperature 0 too; 1 turns it off."""
    max_new_tokens: int = 128
    """Tokens of an answer, at most."""
    exact: bool = True
    """On a CPU, rows of a forward whose bits do not depend on what else is read with them: an answer in 16 bits is then
    the same with and without a drafter. false: as fast as the kernels go, equal up to rounding ties."""

    def __post_init__(self) -> None:
        for key in ("draft_depth", "draft_nodes", "draft_topk", "max_new_tokens"):
            _require(getattr(self, key) >= 1, f"decode.{key}", getattr(self, key), "at least 1")
        finite = 0 <= self.temperature < math.inf
        _require(finite, "decode.temperature", self.temperature, "a finite number, at least 0")
        _require(0 < self.top_p <= 1, "decode.top_p", self.top_p, "above 0 and at most 1")
        _require(self.top_k >= 0, "decode.top_k", self.top_k, "at least 0")
        _require(0 <= self.min_p <= 1, "decode.min_p", self.min_p, "from 0 to 1")
        _require(self.repetition_penalty > 0, "decode.repetition_penalty", self.repetition_penalty, "above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, whole. Every command takes it; with none given, it is the embedded pico's."""

    name: str = "pico"
    """The run's folder is runs/NAME."""
    seed: int = 0
    """Seed of sampling, shuffling and initial weights."""
    target: TargetSpec = TargetSpec()
    data: DataSpec = DataSpec()
    train: TrainSpec = TrainSpec()
    head: HeadSpec = HeadSpec()
    decode: DecodeSpec = DecodeSpec()

    def __post_init__(self) -> None:
        plain = self.name.replace("-", "").replace("_", "").replace(".", "").isalnum() and self.name[0] != "."
        _require(bool(self.name) and plain, "name", self.name, "letters, digits, '-', '_' and '.' (it names a folder)")


_EAGLE3: dict[str, int | float | str] = {
    "shape": "eagle3",
    "unroll_steps": 7,
    "feature_noise": 0.0,
    "through_steps": True,
    "step_decay": 0.8,
    "regression_weight": 0.0,
    "distill_weight": 1.0,
    "topk_weight": 0.0,
}
_WHOLE = {"candidates": 0, "unroll_growth": 0.0, "unroll_drawn": False}
_CORAL = {"unroll_steps": 3, "topk_weight": 0.1, "csra_weight": 0.1}
_GROWING3 = {"csra_weight": 0.1, "candidates": 6144, "unroll_growth": 0.75, "unroll_drawn": False}
PRESETS: dict[str, dict[str, int | float | str]] = {
    "drawn": {**_CORAL, "candidates": 6144, "unroll_growth": 0.75, "unroll_drawn": True},
    "quick": {**_CORAL, "candidates": 6144, "unroll_growth": 0.75, "unroll_drawn": False},
    "coral": {**_CORAL, **_WHOLE},
    "hass": {"unroll_steps": 3, "topk_weight": 0.1, "csra_weight": 0.0, **_WHOLE},
    "eagle2": {"unroll_steps": 1, "topk_weight": 0.0, "csra_weight": 0.0, **_WHOLE},
    "eagle3": {**_EAGLE3, "csra_weight": 0.0, **_WHOLE},
    "coral3": {**_EAGLE3, **_GROWING3},
    "coral3.1": {**_EAGLE3, **_GROWING3, "shape": "eagle3.1", "unroll_steps": 3},
}
"""The keys that each preset sets. With UNSET, a preset means what it has meant since it was there."""

UNSET: dict[str, int | float | str] = {
    "shape": "eagle2",
    "feature_noise": 0.2,
    "through_steps": False,
    "step_decay": 1.0,
    "regression_weight": 1.0,
    "distill_weight": 0.1,
}
"""The values of keys that a preset does not set, where the recipe does not say them."""

ADDED: dict[str, dict[str, int | float | str]] = {
    "train": {**_WHOLE, "shape": "eagle2", "through_steps": False, "step_decay": 1.0},
    "decode": {"exact": True},
}
"""Keys by section that were added since runs were first made, at the value with which a recipe means what it meant
without them. A fingerprint leaves them out there, so that what was made before is still known as finished."""

REMOVED: dict[str, dict[str, int | float | str | bool]] = {
    "data": {"temperature": 1.0, "shard_tokens": 65536},
    "train": {
        "clip_norm": 0.5,
        "topk": 10,
        "csra_negatives": 256,
        "csra_include_target": False,
        "csra_gradient": "both",
        "csra_mask_same_token": False,
    },
    "head": {"router_learning_rate": 1e-3, "clustering": "cooccurrence"},
}
"""Keys by section that there were once, at the value that coral now always takes: a recipe of before may still say it,
and a fingerprint still holds it, so that what was made before is known as finished."""

FORGOTTEN = {"data.endpoint_requests", "data.shard_tokens", "decode.draft_confidence"}
"""Keys that there were once, which decided how fast something was done and not what: any value is read over. pico's
own recipe said draft_confidence, and so does recipe.yaml in every run that was made with it."""
