"""What a prepare-data run is to make, and how it compares with what stands in its folder already."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

from coral_core import embedded
from coral_core.artifacts import MANIFEST, Manifest, file_sha256, fingerprint
from coral_core.data.sources import SELF, find_file, shares
from coral_core.errors import ArtifactError, DataError
from coral_core.recipe.schema import REMOVED, Recipe
from coral_core.store.shard import FP8, shard_name
from coral_core.store.store import Store
from coral_core.target.load import tap_layers
from coral_core.target.target import Target
from coral_core.target.template import Encoded

COMMAND = "coral prepare-data"
INDIFFERENT = ("batch_size", "endpoint", "endpoint_requests")
"""Keys of `data` that say how it is made, not what: a server may move, or give way to the target itself."""
TAPPED = ("features", "feature_dtype")
"""Keys of `data` that say what is kept of the target's states: the words do not depend on them."""
COUNTED = ("max_samples", "holdout")
"""Keys of `data` that say how many dialogues there are: a shard that both have is the same."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be made, and where."""

    recipe: Recipe
    target: Target
    folder: Path
    endpoint_key: str = ""
    """Sent to `data.endpoint`, where that asks for one."""

    @property
    def model_name(self) -> str:
        """What a server knows the target by."""
        return embedded.model_source(self.recipe.target.model)

    @property
    def sections(self) -> dict[str, Any]:
        """The part of the recipe that this stage reads."""
        mapping = dataclasses.asdict(self.recipe)
        return {name: mapping[name] for name in ("seed", "target", "data")}

    @functools.cached_property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of what is read; prompt files may be large, and are read once for them.

        `target.dtype: auto` goes on with data of any dtype, from whatever machine.
        """
        inputs = {"target": self.target.fingerprint, "target_dtype": dtype_name(self.target.dtype)}
        if self.recipe.target.dtype == "auto":
            with contextlib.suppress(ArtifactError, KeyError):
                inputs["target_dtype"] = Manifest.read(self.folder, "data", COMMAND).inputs["target_dtype"]
        named = [share.name for share in shares(self.recipe.data.prompts) if share.name != SELF]
        sums = [file_sha256(path) for path in map(find_file, named) if path]
        inputs |= {"taps": " ".join(map(str, self.taps))} if self.taps else {}
        return inputs | ({"prompts": fingerprint(sums)} if sums else {})

    @property
    def taps(self) -> tuple[int, ...]:
        """The layers whose inputs the drafter will read. Raises TargetError when the target has too few."""
        return () if self.recipe.train.shape == "eagle2" else tap_layers(self.target.model.config)

    @property
    def online(self) -> bool:
        """Whether only tokens are kept."""
        return self.recipe.data.features == "online"

    @property
    def width(self) -> int:
        """Values of one token's feature on disk."""
        return 0 if self.online else self.target.lent.embed_VD.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the features on disk."""
        if self.online:
            return torch.bfloat16
        named = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "fp8": FP8}
        return named[self.recipe.data.feature_dtype]

    def fingerprint(self, inputs: dict[str, str]) -> str:
        """Of what determines the content: not the batch size, which may be lowered to go on, nor where it is made."""
        return fingerprint({"recipe": _determining(self.sections), "inputs": inputs})


@dataclasses.dataclass(frozen=True)
class Words:
    """The dialogues of a store as they were answered: they can be tapped again."""

    store: Store
    damaged: frozenset[str]

    def pieces(self, number: int) -> list[Encoded] | None:
        """Those of a shard; None when it is damaged."""
        if shard_name(number) in self.damaged:
            return None
        samples = [self.store[index] for index in self.store.shard_indices(number)]
        return [Encoded(sample.ids_T.tolist(), sample.answer_T.tolist()) for sample in samples]


@dataclasses.dataclass(frozen=True)
class Standing:
    """What stands in the folder already."""

    store: Store | None
    """The finished store, when it is this job's and whole."""
    changed: tuple[str, ...] = ()
    """How the store that stands differs from this job's."""
    damaged: tuple[str, ...] = ()
    """Damaged files of a store that is this job's otherwise."""
    words: bool = False
    """Whether only what was tapped differs: the answers are kept."""
    count: bool = False
    """Whether only the number of dialogues differs: the shards that both have are kept."""


def check_recipe(recipe: Recipe) -> None:
    """Raises DataError for what is wrong whatever the target: to be asked before one is loaded, which may take long."""
    if recipe.data.endpoint and recipe.data.regenerate == "none":
        raise DataError(
            "data.endpoint is set, but data.regenerate is none: nothing is answered. Set data.regenerate=greedy"
        )
    for share in shares(recipe.data.prompts):
        if share.name != SELF:
            find_file(share.name)
        elif recipe.data.regenerate == "none":
            raise DataError(
                "data.regenerate is none, but self-written prompts have no answers. Set data.regenerate=greedy"
            )


def standing(job: Job) -> Standing:
    """Compare what stands in the folder with the job; reads every byte of a store that is the job's own."""
    if not job.folder.exists():
        return Standing(None)
    try:
        manifest = Manifest.read(job.folder, "data", COMMAND)
    except ArtifactError:
        return Standing(None, damaged=(MANIFEST,))
    inputs = dict(job.inputs)
    if not job.taps and "taps" in manifest.inputs:  # more than is asked for
        inputs["taps"] = manifest.inputs["taps"]
    if manifest.fingerprint != job.fingerprint(inputs):
        changes = tuple(_changes(manifest, job, inputs))
        return Standing(None, changed=changes, words=_same_words(manifest, job), count=_same_but_count(manifest, job))
    damaged = manifest.damaged(job.folder)
    return Standing(None if damaged else Store.open(job.folder, COMMAND), damaged=tuple(damaged))


def standing_words(job: Job) -> Words | None:
    """The store in the folder, when its dialogues are this job's and other things of them were kept."""
    try:
        manifest = Manifest.read(job.folder, "data", COMMAND)
    except ArtifactError:
        return None
    if not _same_words(manifest, job):
        return None
    return Words(Store(job.folder, manifest, COMMAND), frozenset(manifest.damaged(job.folder)))


def standing_of_other_count(job: Job) -> Store | None:
    """The store in the folder, when it is this job's but for the number of dialogues."""
    try:
        manifest = Manifest.read(job.folder, "data", COMMAND)
    except ArtifactError:
        return None
    return Store(job.folder, manifest, COMMAND) if _same_but_count(manifest, job) else None


def _same_words(manifest: Manifest, job: Job) -> bool:
    """Whether both come from the same prompts, target and seed, answered alike."""
    inputs = [{key: value for key, value in given.items() if key != "taps"} for given in (manifest.inputs, job.inputs)]
    return inputs[0] == inputs[1] and _without(manifest.recipe, TAPPED) == _without(job.sections, TAPPED)


def _same_but_count(manifest: Manifest, job: Job) -> bool:
    """Whether one has more dialogues than the other, or holds out more, and nothing else differs."""
    if manifest.inputs != job.inputs or _determining(manifest.recipe) == _determining(job.sections):
        return False
    return _without(manifest.recipe, COUNTED) == _without(job.sections, COUNTED)


def _without(sections: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """What determines the content, without some keys of `data`."""
    found = _determining(sections)
    return found["seed"], {key: value for key, value in found["data"].items() if key not in keys}


def _changes(manifest: Manifest, job: Job, inputs: dict[str, str]) -> list[str]:
    """How the job differs from what a manifest describes: "data.max_samples was 800, is 400"."""
    old, new = (_flat(_determining(sections)) for sections in (manifest.recipe, job.sections))
    found = [f"{key} was {old.get(key)}, is {new.get(key)}" for key in new if old.get(key) != new[key]]
    words = {
        "target": "the target's weights or chat template changed",
        "target_dtype": f"the target's dtype was {manifest.inputs.get('target_dtype')}, is {inputs['target_dtype']}",
        "prompts": "the prompt file's content changed",
        "taps": f"the layers tapped were {manifest.inputs.get('taps', 'none')}, are {inputs.get('taps', 'none')}",
    }
    named = [key for key in words if manifest.inputs.get(key) != inputs.get(key)]
    return found + [words[key] for key in named if not (key == "prompts" and found)]


def _determining(sections: dict[str, Any]) -> dict[str, Any]:
    """The keys that determine the content. The target is known by its fingerprint, wherever it was loaded from."""
    data = {key: value for key, value in (REMOVED["data"] | sections["data"]).items() if key not in INDIFFERENT}
    return {"seed": sections["seed"], "data": data}


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16, not torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
