"""Generation from Python, in one object: a target, its drafter, and text that streams.

target = Target.from_pretrained("my-org/my-model")
generator = Generator(target, Drafter.from_pretrained("my-org/my-drafter"))
for text in generator.stream("Hello!"): ...
"""

import copy
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from coral_core.api.stream import TextStream
from coral_core.artifacts import MANIFEST, Manifest
from coral_core.decoding.engine import Engine
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError
from coral_core.head.heads import Head
from coral_core.head.load import load_head
from coral_core.recipe.schema import DecodeSpec, HeadSpec
from coral_core.run import whole_head, wire
from coral_core.target.compatibility import refuse_other_target
from coral_core.target.target import Target
from coral_core.target.template import prompt_ids

Prompt = str | Sequence[dict[str, str]] | Sequence[int]
"""What a user says, a dialogue as `messages`, or token ids that are taken as they are."""
HEAD = "coral group-head"


class Generator:
    """Answers that equal the target's own, token for token, only sooner."""

    def __init__(self, target: Target, drafter: Drafter, tree: TreeShape | None = None) -> None:
        """With the grouped head in or beside the drafter's folder, where there is one, else with the full head.

        Without a `tree`, each round drafts what pays on this device, within a recipe's default bounds: what a round's
        parts cost is measured here, in some seconds. Raises ArtifactError when drafter or head were made for another
        target, RecipeError for a tree that is too large to be exact.
        """
        _refuse_stranger(target, drafter)
        head = _head(target, drafter)
        # `to` changes a module in place: a drafter that is saved later would be rounded to the target's dtype.
        drafter = copy.deepcopy(drafter).to(target.device, target.dtype)
        self.engine = Engine(target, drafter, head, tree) if tree else wire(target, drafter, head, DecodeSpec())

    def rounds(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
    ) -> Iterator[Round]:
        """The answer as the engine yields it: new ids, how many were drafted, seconds by phase.

        With a `seed`, the same call says the same again; without, a seed is drawn for each call.
        Raises DataError for a prompt that is empty, does not fit the context, or that the chat template refuses.
        """
        seed = secrets.randbits(32) if seed is None else seed
        sampler = Sampler(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        return self.engine.decode(self._ids(prompt), sampler, max_new_tokens)

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """The answer's text, piece by piece; `options` are those of `rounds`.

        After token ids it is what the text of all ids has beyond that of the prompt: a first space is kept.
        """
        text = None
        for event in self.rounds(prompt, **options):
            text = text or TextStream(self.engine.target.tokenizer, _before(prompt))  # ids that the round has taken
            if piece := text.feed(event.new_ids):
                yield piece
        if text and (piece := text.rest()):
            yield piece

    def generate(self, prompt: Prompt, **options: Any) -> str:
        """The whole answer's text; `options` are those of `rounds`."""
        return "".join(self.stream(prompt, **options))

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if prompt and isinstance(prompt[0], dict):
            return prompt_ids(self.engine.target.tokenizer, prompt)  # type: ignore[arg-type]  # a dialogue, as its first
        return list(prompt)  # type: ignore[arg-type]  # ids, as the first is no message


def _before(prompt: Prompt) -> Sequence[int]:
    """The ids that an answer goes on from: a prompt of ids; the answer in a dialogue begins a text of its own."""
    said = isinstance(prompt, str) or isinstance(prompt[0], dict)
    return [] if said else prompt  # type: ignore[return-value]  # ids, as the first is no message


def _refuse_stranger(target: Target, drafter: Drafter) -> None:
    if drafter.manifest and drafter.folder and "target" in drafter.manifest.inputs:
        refuse_other_target(drafter.manifest, drafter.folder, "Load its own", target)
    if misfit := drafter.config.misfit(tuple(target.lent.embed_VD.shape)):
        raise ArtifactError(f"the drafter {misfit}. Load its own")


def _head(target: Target, drafter: Drafter) -> Head:
    if drafter.folder is None or drafter.manifest is None:
        return whole_head(drafter, target.lent)
    folder, name = drafter.folder / "head", drafter.manifest.fingerprint
    if not (folder / MANIFEST).exists():
        folder = drafter.folder.parent / "head"  # where a run has it; it may be an older drafter's
        if not (folder / MANIFEST).exists() or Manifest.read(folder, "head", HEAD).inputs.get("drafter") != name:
            return whole_head(drafter, target.lent)
    made_by = Manifest.read(folder, "head", HEAD).recipe["head"]
    spec = HeadSpec(**{key: made_by[key] for key in ("kind", "groups", "active")})
    fits = {"target_fingerprint": drafter.manifest.inputs.get("target", ""), "drafter_fingerprint": name}
    return load_head(folder, spec, target.lent, **fits)
