"""The whole of prepare-data: prompts, answers, features, shards, and one store at the end of it.

What is finished is kept by shard; each shard's words depend on the seed and its number alone. So a run that was
interrupted and goes on publishes the same shards as one that was not.
"""

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch

from coral_core.artifacts import COMPATIBILITY, Manifest, file_sha256, partial, refuse_unfinished, stage, write_text
from coral_core.data.ahead import Ahead
from coral_core.data.answer import derive_seed
from coral_core.data.endpoint import Endpoint
from coral_core.data.job import COMMAND, Job, check_recipe, dtype_name, standing_of_other_count, standing_words
from coral_core.data.meter import Meter
from coral_core.data.plan import PLAN, PROMPTS, Fit, Plan, make_plan
from coral_core.data.prompts import Dialogue
from coral_core.data.shards import answer, held_dtype, tap_all, words_only
from coral_core.data.sources import SELF
from coral_core.errors import ArtifactError, DataError
from coral_core.processes import processes
from coral_core.progress import Progress, silent
from coral_core.recipe.schema import DataSpec
from coral_core.store.shard import ShardFacts, row_bytes, shard_name, write_shard
from coral_core.store.store import Store, seal
from coral_core.target import compatibility
from coral_core.target.load import drafter_shape
from coral_core.target.template import Encoded, prompt_ids


def prepare(job: Job, progress: Progress = silent) -> Store:
    """Make the store, going on from what an interrupted run had finished, and publish it whole.

    Under several processes each calls this and makes its own shards; the main one plans and publishes. Raises DataError
    for prompts that cannot be used, and ArtifactError when the disk lacks room.
    """
    check_job(job)
    state = processes()
    inputs = job.inputs
    name = job.fingerprint(inputs)
    if state.is_main_process:
        refuse_unfinished(job.folder, name, COMMAND)
    with stage(job.folder, name) if state.is_main_process else contextlib.nullcontext(partial(job.folder)) as work:
        if state.is_main_process:
            _plan(job, name, work, progress)
        state.wait_for_everyone()
        plan = Plan.load(work)
        assert plan is not None, "the main process has saved it"
        mine = range(state.process_index, len(plan.shards), state.num_processes)
        _make_shards(job, plan, mine, work, progress if state.is_main_process else silent)
        state.wait_for_everyone()
        if state.is_main_process:
            shards = [_noted(work, number) for number in range(len(plan.shards))]
            manifest = Manifest(kind="data", fingerprint=name, inputs=inputs, recipe=job.sections, facts={})
            _seal(job, plan, shards, work, manifest)
    state.wait_for_everyone()
    return Store.open(job.folder, COMMAND)


def _plan(job: Job, name: str, work: Path, progress: Progress) -> None:
    """Have the plan in the work folder, and beside it what was finished before."""
    for source in (work, job.folder):
        _salvage(job, source, work, name)
    if (work / PLAN).exists():
        return
    spec = job.recipe.data
    if spec.prompts == SELF:
        check_room(job, tokens_at_most(job, spec.max_samples))
    stood = _of_other_count(job)
    now = stood[1].now if stood else None
    plan = make_plan(job.target, spec, seed=job.recipe.seed, work=work, now=now, progress=progress)
    if stood:
        _take_over(*stood, plan, len(plan.dialogues) - spec.holdout, work)
    plan.save(work)


def check_job(job: Job) -> None:
    """Raises DataError for a recipe that this target, or its own keys together, cannot serve; TargetError for a target
    whose layers cannot be tapped."""
    check_recipe(job.recipe)
    spec = job.recipe.data
    if spec.max_length > job.target.max_positions:
        raise DataError(
            f"data.max_length is {spec.max_length}, and the target has {job.target.max_positions} positions. "
            f"Set data.max_length to {job.target.max_positions} at most"
        )
    if job.taps:
        with torch.no_grad():
            job.target.tapping(job.taps).forward(torch.zeros(1, 1, dtype=torch.long, device=job.target.device))
    if spec.endpoint:
        Endpoint(spec.endpoint, job.model_name, job.endpoint_key, time.sleep).check()


def bytes_at_most(job: Job, tokens: int) -> int:
    """Room that so many tokens take on disk, and the lent weights with them."""
    lent = job.target.lent
    weights = [lent.embed_VD] if lent.head_VD is lent.embed_VD else [lent.embed_VD, lent.head_VD]
    return tokens * row_bytes(job.width, job.dtype, len(job.taps)) + sum(weight.nbytes for weight in weights)


def check_room(job: Job, tokens: int) -> None:
    """Raises ArtifactError when the disk lacks room for so many tokens."""
    needed, free = bytes_at_most(job, tokens), shutil.disk_usage(existing_parent(job.folder)).free
    if needed > free:
        raise ArtifactError(
            f"{job.folder} takes up to {needed / 1e6:,.1f} MB for {tokens:,} tokens, and its disk has "
            f"{free / 1e6:,.1f} MB free. Lower data.max_samples or data.max_length, or choose another disk with --runs"
        )


def existing_parent(folder: Path) -> Path:
    """The nearest folder above that exists: it is on the same disk."""
    return next(parent for parent in folder.absolute().parents if parent.exists())


def tokens_at_most(job: Job, dialogues: int) -> int:
    """Tokens of so many self-written dialogues, before one is written."""
    spec = job.recipe.data
    frame = len(prompt_ids(job.target.tokenizer, [{"role": "user", "content": "."}]))
    return dialogues * min(spec.max_length, frame + 2 * spec.max_new_tokens)


def _make_shards(job: Job, plan: Plan, mine: range, work: Path, progress: Progress) -> None:
    """Every shard whose number is in `mine`; those finished before stay when their bytes are still those written."""
    missing = [number for number in mine if not _finished(work, number)]
    check_room(job, mine.step * sum(plan.shard_tokens(number) for number in missing))
    total = sum(len(plan.shards[number]) for number in mine)
    done = total - sum(len(plan.shards[number]) for number in missing)
    words, spec = standing_words(job), job.recipe.data
    reads = words is not None or spec.endpoint or spec.regenerate == "none"  # features do not come with the answers
    answers = Meter(progress, "answers", total, done)
    features = Meter(progress if reads else silent, "features", total, done)
    held_from = len(plan.dialogues) - spec.holdout

    def write(number: int, pieces: list[Encoded], held: int, refused: int, names: Sequence[str] = ()) -> None:
        if job.online:
            samples = [words_only(piece) for piece in pieces]
        else:
            target = job.target.tapping(job.taps)
            samples = tap_all(target, pieces, spec.batch_size, held_dtype(target, job.dtype), features)
        facts = write_shard(work, number, samples, job.dtype, holdout_samples=held, names=names)
        cut = sum(_is_cut(piece, spec, job.target.stop_ids) for piece in pieces)
        _finish(work, dataclasses.replace(facts, cut_samples=cut, refused_dialogues=refused))
        features.advance(len(plan.shards[number]), 0)

    for number in list(missing):
        if words is not None and (kept := words.pieces(number)) is not None:
            answers.advance(len(plan.shards[number]), 0)
            stood = words.store.shard_facts(number)
            write(number, kept, stood.holdout_samples, stood.refused_dialogues)
            missing.remove(number)
    for number, dialogues, refused in _answered(job, plan, missing, answers):
        rows = list(zip(plan.shards[number], dialogues, strict=True))
        held = sum(len(several) for row, several in rows if row >= held_from)
        names = [plan.place(row) for row, several in rows for _ in several]
        write(number, [piece for several in dialogues for piece in several], held, refused, names)
    answers.finish()
    features.finish()


def _is_cut(piece: Encoded, spec: DataSpec, stop_ids: Collection[int]) -> bool:
    """Whether the last answer goes on behind the piece. Given answers may end without a token of their own."""
    return len(piece.ids) >= spec.max_length if spec.regenerate == "none" else piece.ids[-1] not in stop_ids


def _answered(job: Job, plan: Plan, numbers: list[int], meter: Meter) -> Iterator[tuple[int, list[list[Encoded]], int]]:
    """Those shards' numbers, each with the pieces of its dialogues, from the server or from the target here; and how
    many of these end before a turn that was refused."""
    fit, seed = Fit(job.target, job.recipe.data, plan.now), job.recipe.seed

    def dialogues_of(number: int) -> list[Dialogue]:
        return [plan.dialogues[row] for row in plan.shards[number]]

    shards = ((number, dialogues_of(number), derive_seed(seed, "answers", number)) for number in numbers)
    if job.recipe.data.endpoint:
        for number, pieces in Ahead(fit, job.model_name, job.endpoint_key).shards(shards, meter):
            yield number, pieces, fit.refused(dialogues_of(number))
        return
    target = job.target.tapping(job.taps)
    keep = None if job.online else held_dtype(target, job.dtype)
    for number, dialogues, shard_seed in shards:
        yield number, answer(target, dialogues, fit, shard_seed, meter, keep), fit.refused(dialogues)


def _finish(folder: Path, facts: ShardFacts) -> None:
    """Say, beside a shard, that it is finished and what its bytes are."""
    write_text(folder / f"{facts.file}.json", json.dumps(dataclasses.asdict(facts)) + "\n")


def _noted(folder: Path, number: int) -> ShardFacts:
    """What `_finish` said of a shard."""
    path = folder / f"{shard_name(number)}.json"
    return ShardFacts(**json.loads(path.read_text(encoding="utf-8")))


def _finished(folder: Path, number: int) -> bool:
    """Whether a shard is as `_finish` said."""
    try:
        return file_sha256(folder / shard_name(number)) == _noted(folder, number).sha256
    except (OSError, ValueError, TypeError):  # missing or damaged, the shard or what was noted of it
        return False


def _salvage(job: Job, source: Path, work: Path, name: str) -> None:
    """Take over what is undamaged of a store that is this very job's: then only what is damaged is made again.

    Of a store whose words are this job's, but not what was tapped, only the plan: its shards are tapped anew.
    """
    try:
        manifest = Manifest.read(source, "data", COMMAND)
    except ArtifactError:
        return
    words = standing_words(job) if source == job.folder else None
    if manifest.fingerprint != name and words is None:
        return
    if source != work and (work / PLAN).exists():  # what was taken over, or made anew, is there already
        return
    damaged = words.damaged if words else set(manifest.damaged(source))
    wanted = [ShardFacts(**facts) for facts in manifest.facts["shards"]] if manifest.fingerprint == name else []
    if not damaged.intersection((PROMPTS, PLAN)):
        for file in (PROMPTS, PLAN):
            _link(source / file, work / file)
        for facts in wanted:
            if facts.file not in damaged:
                _link(source / facts.file, work / facts.file)
                _finish(work, facts)


def _of_other_count(job: Job) -> tuple[Store, Plan] | None:
    """A store in the folder that differs in its number of dialogues alone, and its plan; None where that is damaged."""
    store = standing_of_other_count(job)
    if store is None or store.manifest.damaged(job.folder, PROMPTS, PLAN):
        return None
    plan = Plan.load(job.folder)
    return (store, plan) if plan else None


def _take_over(store: Store, stood: Plan, plan: Plan, held_from: int, work: Path) -> None:
    """Take over the shards that hold the same dialogues under the same number, and none that is to be held out.

    A file of prompts is drawn in one order whatever the number, so that these are all but a store's last ones.
    """
    for number, (rows, before) in enumerate(zip(plan.shards, stood.shards, strict=False)):
        facts = store.shard_facts(number)
        same = rows == before and all(plan.dialogues[row] == stood.dialogues[row] for row in rows)
        if same and rows.stop <= held_from and not store.manifest.damaged(store.folder, facts.file):
            _link(store.folder / facts.file, work / facts.file)
            _finish(work, dataclasses.replace(facts, holdout_samples=0))


def _link(source: Path, copy: Path) -> None:
    """A second name for the same bytes; a copy where the file system has no such thing."""
    if source == copy:
        return
    copy.unlink(missing_ok=True)
    try:
        copy.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, copy)


def _seal(job: Job, plan: Plan, shards: list[ShardFacts], work: Path, manifest: Manifest) -> None:
    """Write what makes the folder a store, and clear what only a resumed run needs."""
    count = len(plan.dialogues)
    held = [plan.dialogues[row] for row in range(count - job.recipe.data.holdout, count)]
    skipped = {f"{reason} (first: {where})": count for reason, (count, where) in plan.skipped.items()}
    if refused := sum(shard.refused_dialogues for shard in shards):
        skipped["later turns that the chat template or the target cannot take, of so many dialogues"] = refused
    facts = {
        "dialogues": count,
        "holdout_dialogues": len(held),
        "skipped": skipped,
        "unread": {f"{name} (first: {where})": count for name, (count, where) in plan.unread.items()},
        "sources": plan.sources,
        "dtype": dtype_name(job.dtype),
        "drafter_config": drafter_shape(job.target.model.config),
        COMPATIBILITY: compatibility.describe(job.target),
        **({"taps": list(job.taps)} if job.taps else {}),
    }
    seal(
        work,
        dataclasses.replace(manifest, facts=facts),
        shards,
        lent=job.target.lent.to("cpu"),
        holdout_prompts=[prompt_ids(job.target.tokenizer, dialogue.messages(()), plan.now) for dialogue in held],
        files=(PROMPTS, PLAN),
    )
    for pattern in ("self-*.json", "shard-*.safetensors.json", ".*.tmp"):
        for path in work.glob(pattern):
            path.unlink()
