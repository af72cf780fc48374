"""The export stage: from a run's drafter to runs/NAME/export/FORMAT.

Axes: C candidate: a token that is drafted from.
"""

import dataclasses
import io
import shutil
from pathlib import Path

import torch

from coral_core import embedded
from coral_core.artifacts import MANIFEST, Manifest, check_files, fingerprint, stage
from coral_core.drafter.config import DrafterConfig
from coral_core.drafter.load import FILES, load_drafter, save_drafter
from coral_core.drafter.model import Drafter
from coral_core.errors import CoralError
from coral_core.export import gguf_file
from coral_core.export.folder import write_folder
from coral_core.export.layouts import LAYOUTS
from coral_core.export.refusal import refuse, refuse_logits
from coral_core.export.wide import WIDE, layout_of, with_rows
from coral_core.head.heads import StaticHead
from coral_core.head.load import FILE, load_head
from coral_core.recipe.schema import HeadSpec, Recipe
from coral_core.target.compatibility import refuse_other_target
from coral_core.target.target import Target

HF = "hf"
"""Coral's own format: the drafter, and its grouped head whole, as Drafter.from_pretrained reads them."""
GGUF = "gguf"
"""One file for llama.cpp."""
FORMATS = (*WIDE, GGUF, HF)
DRAFTER_FILE = "drafter.gguf"
TOKEN_MAP = "token_map.pt"
LLAMA = (
    "llama-server -m {target} --model-draft {folder}/{file} --spec-type draft-eagle3 --spec-draft-n-max {depth} "
    "--spec-draft-p-min 0"
)


def engine_name(to: str) -> str:
    """What people call the reader of a format."""
    return "llama.cpp" if to == GGUF else WIDE[to].engine


@dataclasses.dataclass(frozen=True)
class Source:
    """A published drafter and where it lies."""

    folder: Path
    """The run, or the package's own pico."""
    manifest: Manifest
    drafter: Drafter
    head: Path | None
    """The folder of the head that was made for this drafter, if there is one."""


def open_source(recipe: Recipe, run: Path, target: Target | None) -> Source:
    """The run's drafter; what coral ships where the target is pico and the run has none.

    Raises ArtifactError when it is missing, damaged, or trained for another target that is no sibling of `target`.
    """
    folder = embedded.made_in(run, recipe.target.model)
    manifest = Manifest.read(folder / "drafter", "drafter", "coral train")
    if target is not None:
        refuse_other_target(manifest, folder / "drafter", "Set target.model to its own", target)
    return Source(folder, manifest, load_drafter(folder / "drafter"), _head_of(folder / "head", manifest))


def _head_of(folder: Path, drafter: Manifest) -> Path | None:
    if not (folder / MANIFEST).exists():
        return None
    made_for = Manifest.read(folder, "head", "coral group-head").inputs.get("drafter")
    return folder if made_for == drafter.fingerprint else None


def formats(drafter: Drafter) -> tuple[str, ...]:
    """The engines' formats that there are for a drafter of this shape."""
    return (*WIDE, GGUF) if drafter.config.taps else tuple(LAYOUTS)


def export_engine(to: str, source: Source, target: Target, run: Path, token_map: torch.Tensor | None = None) -> Path:
    """Publish RUN/export/TO, a folder that the engine loads as it is.

    `token_map` [C] are the ids that it drafts from: SGLang's token map, or an LM head of the drafter's own where that
    has EAGLE-3's shape. Raises TargetError or ArtifactError with the reason when the engine could not serve it; nothing
    is written then.
    """
    drafter = _with_map(source.drafter, target, token_map)
    if to != GGUF:
        layout = layout_of(to, drafter.config)
        refuse(layout, drafter, target)
    else:
        gguf_file.refuse(drafter)
        refuse_logits(engine_name(to), target.lent, scales=False)
    final = run / "export" / to
    inputs = {"target": target.fingerprint, "drafter": source.manifest.fingerprint}
    ids = None if token_map is None else sorted(token_map.tolist())
    name = fingerprint({"format": to, **inputs, "token_map": ids})
    with stage(final, name) as work:
        if to == GGUF:
            gguf_file.write_gguf(drafter, work / DRAFTER_FILE)
        else:
            write_folder(layout, drafter, target.lent, work, str(target.model.config._name_or_path))
        if ids is not None and not drafter.config.taps:
            # SGLang reads nothing else: a pickled list of plain integers, loaded there with weights_only.
            content = io.BytesIO()  # written by Python, whose error says when the disk is full
            torch.save(ids, content)
            (work / TOKEN_MAP).write_bytes(content.getvalue())
        facts = {"format": to, "token_map": len(ids) if ids else None}
        Manifest(kind="export", fingerprint=name, inputs=inputs, recipe={}, facts=facts).sealed(work).write(work)
    return final


def _with_map(drafter: Drafter, target: Target, token_map: torch.Tensor | None) -> Drafter:
    """With rows of its own for these tokens, where its shape has such. Raises CoralError when it has some already."""
    if token_map is None or not drafter.config.taps:
        return drafter
    if rows := drafter.config.draft_vocab_size:
        raise CoralError(f"the drafter has an LM head of its own already, of {rows} rows. Leave out --map-size")
    return with_rows(drafter, target.lent, token_map)


def frequent_tokens(source: Source, recipe: Recipe, target: Target, size: int | None) -> torch.Tensor:
    """Ids [C] of the most frequent tokens of the target's answers; no size said, as many as the grouped head reads.

    Measured on pico at a quarter of the vocabulary: this list reaches tau 3.56, the union of the groups that the router
    likes best 2.81, the full head 3.48. A group holds what is alike, not what is frequent. Raises ArtifactError.
    """
    assert source.head is not None
    vocabulary = target.lent.head_VD.shape[0]
    if size is not None and size > vocabulary:
        raise CoralError(f"--map-size {size} is more than the vocabulary's {vocabulary} tokens; give less")
    share = recipe.head if size is None else HeadSpec(groups=vocabulary, active=size)
    head = load_head(
        source.head,
        dataclasses.replace(share, kind="static"),
        target.lent,
        target_fingerprint=source.manifest.inputs["target"],
        drafter_fingerprint=source.manifest.fingerprint,
    )
    assert isinstance(head, StaticHead)
    return head.token_C.cpu()


def export_hf(source: Source, run: Path) -> Path:
    """Publish RUN/export/hf: what `Drafter.from_pretrained`, `coral import` and the Hub take."""
    final = run / "export" / HF
    head = Manifest.read(source.head, "head", "coral group-head").fingerprint if source.head else None
    if source.head:
        check_files(source.head, [FILE], "coral group-head")
    with stage(final, fingerprint({"format": HF, "drafter": source.manifest.fingerprint, "head": head})) as work:
        save_drafter(source.drafter, work)
        source.manifest.sealed(work, *FILES).write(work)
        if source.head is not None:
            shutil.rmtree(work / "head", ignore_errors=True)
            shutil.copytree(source.head, work / "head")
    return final


def serve_command(to: str, recipe: Recipe, config: DrafterConfig, places: tuple[str, str], *, with_map: bool) -> str:
    """The engine's own command, with the recipe's tree in its words; `places` are target and folder as it finds them.

    SGLang and EAGLE count the root among the nodes, EAGLE counts levels from 0, vLLM and llama.cpp draft a chain.
    """
    decode, (target, folder) = recipe.decode, places
    if to == GGUF:
        return LLAMA.format(
            target=target if target.endswith(".gguf") else "TARGET.gguf",
            folder=folder,
            file=DRAFTER_FILE,
            depth=decode.draft_depth,
        )
    text = layout_of(to, config).serve.format(
        target=target,
        folder=folder,
        depth=decode.draft_depth - (to == "eagle"),
        topk=decode.draft_topk,
        nodes=decode.draft_nodes + 1,
    )
    return f"{text} --speculative-token-map {folder}/{TOKEN_MAP}" if with_map else text
