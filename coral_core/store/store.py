"""A store: the folder that prepare-data publishes and that training reads.

    manifest.json             what it holds and where it came from, with a checksum per file
    shard-NNNNN.safetensors   the samples; the held-out ones are the last
    holdout.json              token ids of the held-out prompts, up to where the target begins its first answer
    lent.safetensors          the target's embedding and head
    prompts.jsonl, plan.json  the dialogues as text, and the shard that each belongs to

Not for making features: this room never sees a target.
Axes: B batch, T position, D hidden, V vocabulary.
"""

import bisect
import collections
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from coral_core.artifacts import Manifest, file_sha256, write_text
from coral_core.errors import ArtifactError
from coral_core.lent import Lent
from coral_core.store.shard import Sample, Shard, ShardFacts
from coral_core.tensors import write_tensors

HOLDOUT = "holdout.json"
LENT = "lent.safetensors"
OPEN_SHARDS = 64
"""Shards kept open at once: a large store has more than a process may open files."""


def seal(
    folder: Path,
    manifest: Manifest,
    shards: Sequence[ShardFacts],
    *,
    lent: Lent,
    holdout_prompts: Sequence[list[int]],
    files: Sequence[str] = (),
) -> Manifest:
    """Turn a folder of finished shards into a store; held-out samples are the last of all.

    `manifest` brings the provenance and the facts that shards do not show; the counts are added here, and a checksum of
    each file, of the further `files` too.
    """
    save_lent(lent, folder / LENT)
    write_text(folder / HOLDOUT, json.dumps([list(prompt) for prompt in holdout_prompts]) + "\n")
    cut = [shard.cut_samples for shard in shards if shard.cut_samples is not None]
    facts = {
        "samples": sum(shard.samples for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "answer_tokens": sum(shard.answer_tokens for shard in shards),
        "holdout_samples": sum(shard.holdout_samples for shard in shards),
        "cut_samples": sum(cut) if len(cut) == len(shards) else None,
        "bytes": sum(shard.size_bytes for shard in shards) + (folder / LENT).stat().st_size,
        "hidden": lent.embed_VD.shape[1],
        "vocab": lent.head_VD.shape[0],
        **manifest.facts,
        "files": {name: file_sha256(folder / name) for name in (HOLDOUT, LENT, *files)},
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    sealed = dataclasses.replace(manifest, facts=facts)
    sealed.write(folder)
    return sealed


Tap = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
"""(ids_BT, valid_BT), padded on the right, to the target's features [B,T,D], and its taps [B,T,3D] if there are any."""


class Store:
    """Samples on disk, read by index. A file's checksum is compared when the file is first touched.

    Where `data.features` was online the samples' features are of no width, and batches take them from `tap`.
    """

    def __init__(self, folder: Path, manifest: Manifest, command: str, tap: Tap | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.tap = tap
        self._command = command
        self._facts = [ShardFacts(**facts) for facts in manifest.facts["shards"]]
        self._ends = list(itertools.accumulate(shard.samples for shard in self._facts))
        self._open: collections.OrderedDict[int, Shard] = collections.OrderedDict()
        self._checked: set[str] = set()

    @classmethod
    def open(cls, folder: Path, command: str = "coral prepare-data", tap: Tap | None = None) -> "Store":
        """Open a published store. Raises ArtifactError, naming file and `command`, when a part is absent."""
        manifest = Manifest.read(folder, "data", command)
        store = cls(folder, manifest, command, tap)
        for shard in store._facts:
            store._check_size(shard)
        return store

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`, held-out ones included. Raises ArtifactError when its shard is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard, place = self._place(index)
        return shard.sample(place)

    def _place(self, index: int) -> tuple[Shard, int]:
        """The shard that holds a sample, and its number there."""
        number = bisect.bisect_right(self._ends, index)
        return self._shard(number), index - (self._ends[number] - self._facts[number].samples)

    def shard_indices(self, number: int) -> range:
        """The samples of one shard."""
        return range(self._ends[number] - self._facts[number].samples, self._ends[number])

    def shard_facts(self, number: int) -> ShardFacts:
        """What the manifest says of one shard."""
        return self._facts[number]

    @property
    def taps(self) -> tuple[int, ...]:
        """The target's layers whose inputs it holds, or asks the target for; empty where there are none."""
        return tuple(self.manifest.facts.get("taps", ()))

    @property
    def train_indices(self) -> range:
        """Samples to learn from."""
        return range(len(self) - self.manifest.facts["holdout_samples"])

    @property
    def train_shards(self) -> list[range]:
        """The same, shard by shard."""
        last = len(self.train_indices)
        starts = [0, *self._ends]
        return [range(start, min(end, last)) for start, end in itertools.pairwise(starts) if start < last]

    @property
    def holdout_indices(self) -> range:
        """Samples never learnt from."""
        return range(len(self) - self.manifest.facts["holdout_samples"], len(self))

    @property
    def holdout_prompts(self) -> list[list[int]]:
        """Token ids of the held-out prompts, the template applied, the generation prompt included."""
        self._check_sum(HOLDOUT, self.manifest.facts["files"][HOLDOUT])
        prompts: list[list[int]] = json.loads((self.folder / HOLDOUT).read_text(encoding="utf-8"))
        return prompts

    def answer_counts(self) -> torch.Tensor:
        """How often each token [V] stands in the training dialogues' answers; reads every training sample's words."""
        count_V = torch.zeros(self.manifest.facts["vocab"], dtype=torch.int64)
        for index in self.train_indices:
            shard, place = self._place(index)
            ids_T, answer_T = shard.words(place)
            count_V += torch.bincount(ids_T[answer_T], minlength=len(count_V))
        return count_V

    def lent(self) -> Lent:
        """The target's embedding and head."""
        self._check_sum(LENT, self.manifest.facts["files"][LENT])
        return load_lent(self.folder / LENT)

    def _shard(self, number: int) -> Shard:
        if number not in self._open:
            facts = self._facts[number]
            self._check_sum(facts.file, facts.sha256)
            self._open[number] = Shard(self.folder / facts.file, self._command)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _check_size(self, shard: ShardFacts) -> None:
        path = self.folder / shard.file
        size = path.stat().st_size if path.exists() else -1
        if size != shard.size_bytes:
            state = "missing" if size < 0 else f"damaged ({size} bytes instead of {shard.size_bytes})"
            raise ArtifactError(f"{path} is {state}. Run: {self._command}")

    def _check_sum(self, name: str, sha256: str) -> None:
        if name in self._checked:
            return
        path = self.folder / name
        try:
            found = file_sha256(path)
        except OSError as error:
            raise ArtifactError(f"cannot read {path}: {error.strerror}. Run: {self._command}") from error
        if found != sha256:
            raise ArtifactError(f"{path} is damaged: its checksum is not the manifest's. Run: {self._command}")
        self._checked.add(name)


def save_lent(lent: Lent, path: Path) -> None:
    """Write one safetensors file; a tied head is stored once."""
    tensors = {"embed": lent.embed_VD.contiguous()}
    if lent.head_VD is not lent.embed_VD:
        tensors["head"] = lent.head_VD.contiguous()
    if lent.head_bias_V is not None:
        tensors["head_bias"] = lent.head_bias_V.contiguous()
    # One metadata value: safetensors writes several in random order, and the file's checksum would never repeat.
    scalars = {key: getattr(lent, key) for key in ("logit_scale", "logit_softcap")}
    write_tensors(tensors, path, {"scalars": json.dumps(scalars)})


def load_lent(path: Path) -> Lent:
    """Read what `save_lent` wrote."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        scalars = json.loads((file.metadata() or {}).get("scalars", "{}"))
    embed_VD = tensors["embed"]
    return Lent(embed_VD, tensors.get("head", embed_VD), tensors.get("head_bias"), **scalars)
