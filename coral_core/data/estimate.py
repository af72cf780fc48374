"""What a run would take, before it is begun: counted from the prompts, timed on a few steps of the target.

Axes: B batch, T position.
"""

import dataclasses
import math
import time

import torch

from coral_core.data.answer import Sampling, write
from coral_core.data.job import Job
from coral_core.data.plan import make_plan
from coral_core.data.sources import SELF, shares
from coral_core.data.stage import bytes_at_most, check_job, check_room, existing_parent, tokens_at_most
from coral_core.progress import Progress, silent
from coral_core.target.capture import tap
from coral_core.target.template import prompt_ids

PROBE_STEPS = 16


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Upper bounds: answers that end early take less."""

    dialogues: int
    tokens: int
    written_tokens: int
    """Tokens that the target writes: answers, and its own prompts."""
    size_bytes: int
    elapsed_s: float
    """Without what a server takes."""


def estimate(job: Job, progress: Progress = silent) -> Estimate:
    """Count, time a few steps, write nothing. Raises what `prepare` would raise before its first answer."""
    check_job(job)
    spec = job.recipe.data
    named = shares(spec.prompts)
    written_weight = sum(share.weight for share in named if share.name == SELF)
    dialogues = math.ceil(spec.max_samples * written_weight / sum(share.weight for share in named))
    tokens, prompt_tokens = tokens_at_most(job, dialogues), dialogues * spec.max_new_tokens
    answer_tokens = prompt_tokens
    if dialogues < spec.max_samples:
        others = ",".join(f"{share.name}={share.weight}" for share in named if share.name != SELF)
        prompts = others if written_weight else spec.prompts
        rest = dataclasses.replace(
            spec, prompts=prompts, max_samples=spec.max_samples - dialogues, holdout=0 if dialogues else spec.holdout
        )
        work = existing_parent(job.folder)
        plan = make_plan(job.target, rest, seed=job.recipe.seed, work=work, progress=progress)
        dialogues += len(plan.dialogues)
        tokens += sum(plan.bounds)
        turns = 0 if spec.regenerate == "none" else sum(len(dialogue.users) for dialogue in plan.dialogues)
        answer_tokens += turns * spec.max_new_tokens
    check_room(job, tokens)
    write_s, tap_s = _seconds_per_token(job)
    answered = 0 if spec.endpoint else answer_tokens  # here: their features come with them
    elapsed_s = (prompt_tokens + answered) * write_s + (tokens - answered) * tap_s
    return Estimate(dialogues, tokens, prompt_tokens + answer_tokens, bytes_at_most(job, tokens), elapsed_s)


def _seconds_per_token(job: Job) -> tuple[float, float]:
    """Seconds to write one token and to read one, in a full batch; each is timed after a first, untimed go."""
    target, size = job.target.tapping(job.taps), job.recipe.data.batch_size
    prompt = prompt_ids(job.target.tokenizer, [{"role": "user", "content": "."}])
    sampling = Sampling(batch_size=size, keep=target.dtype)
    ids_BT = torch.tensor([(prompt * PROBE_STEPS)[:PROBE_STEPS]] * size)
    write_s = tap_s = 0.0
    for steps in (2, PROBE_STEPS):
        begun_s = time.monotonic()
        write(target, [prompt] * size, [steps] * size, lambda ids: False, sampling)
        write_s = (time.monotonic() - begun_s) / (steps * size)
        begun_s = time.monotonic()
        tap(target, ids_BT, torch.ones_like(ids_BT, dtype=torch.bool)).feature_BTD.cpu()
        tap_s = (time.monotonic() - begun_s) / ids_BT.numel()
    return write_s, tap_s
