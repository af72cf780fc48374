"""Whether a row of the target has the same bits in a step and with other rows, on real models; and what that costs.

    python -m benchmarks.exact --model FOLDER [--model FOLDER] [--dtype bfloat16] [--answers 40] [--tokens 256]

Each answer is written plainly, one token a step: half of them greedily, half at temperature 1. Then it is read again as
a decoder with a drafter reads it: in chains and trees that hold a part of the answer among wrong siblings, which the
engine verifies, judges and keeps the right rows of. Every logit of every right row is compared with the step's, bit for
bit, and every token that the engine emits. No drafter is needed: how many tokens a round accepts is drawn. The chat
reads its second and third prompt behind the rows of the answer before. Four answers at a time are written again side by
side. Rows are kept in benchmarks/results/exact.jsonl as they come; a run goes on with those of the same commit and the
same target, and tells of no others.
Axes: B batch of one, T position, D hidden, M tree row, V vocabulary, X any axes.
"""

import argparse
import dataclasses
import json
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.batch import decode_all
from benchmarks.record import RESULTS, record
from benchmarks.rows import Row, append, read
from coral_core.artifacts import fingerprint, git_commit
from coral_core.decoding import tree
from coral_core.decoding.cache import SlotCache
from coral_core.decoding.engine import Eager, Engine
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.seat import Memory
from coral_core.decoding.step import prefill
from coral_core.decoding.table import Request
from coral_core.target.target import Target

TREES = {"chain": (4, 4), "tree": (4, 12), "60-node tree": (6, 60)}
"""Levels and nodes of a round's draft."""
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
TURNS = 3
"""Answers of a chat."""
BATCH = 4
"""Answers that are written side by side. Those of one temperature, the next ones of the other."""
TIMED_ROWS, TIMED = (1, 13), 75
"""Rows of the forwards that are timed, and how often."""

Answer = tuple[list[int], list[torch.Tensor]]
"""Its tokens, and the logits [V] that each was picked from."""


def fresh(target: Target, capacity: int) -> SlotCache:
    """A cache for one answer."""
    return SlotCache(target.model.config.get_text_config().num_hidden_layers, capacity)


def written(target: Target, prompt: list[int], tokens: int, sampler: Sampler) -> Answer:
    """An answer in steps, and the logits [V] that each token was picked from."""
    cache = fresh(target, len(prompt) + tokens)
    logits = [target.lent.logits(prefill(target, torch.tensor(prompt), cache)[-1:])]
    ids = list(prompt)
    for _ in range(tokens - 1):
        ids.append(int(sampler.pick(logits[-1], len(ids))))
        logits.append(target.lent.logits(prefill(target, torch.tensor(ids), cache)[-1:]))
    ids.append(int(sampler.pick(logits[-1], len(ids))))
    return ids[len(prompt) :], [logits_1V[0] for logits_1V in logits]


def drafted(path: list[int], levels: int, nodes: int, draw: random.Random, vocabulary: int) -> tree.Draft:
    """A tree whose branch begins with `path`, root included, among random siblings."""
    token, parent, above = [path[0]], [0], 0
    for level in range(levels):
        siblings = max(1, nodes // levels)
        first, place = len(token), draw.randrange(siblings)
        token += [draw.randrange(vocabulary) for _ in range(siblings)]
        if level + 1 < len(path):
            token[first + place] = path[level + 1]
        parent += [above] * siblings
        above = first + place
    parent_M = torch.tensor(parent)
    sees_MM = tree.ancestry(parent_M, levels)
    return tree.Draft(torch.tensor(token), parent_M, sees_MM.sum(1) - 1, sees_MM, torch.zeros(len(token)), levels)


def right_rows(draft: tree.Draft, path: list[int]) -> list[int]:
    """The rows of `path`, root included."""
    rows, tokens, parents = [0], draft.token_M.tolist(), draft.parent_M.tolist()
    for token in path[1:]:
        rows.append(next(r for r in range(1, len(tokens)) if parents[r] == rows[-1] and tokens[r] == token))
    return rows


def differing(
    target: Target, prompt: list[int], answer: Answer, shape: tuple[int, int], sampler: Sampler, seed: int
) -> int:
    """How many of an answer's logits [V] and tokens are not those of the steps when it is read in drafts."""
    ids, logits = answer
    draw, (levels, nodes) = random.Random(seed), shape
    cache, differ, at = fresh(target, len(prompt) + len(ids) + nodes + levels), 0, 0
    first_1V = target.lent.logits(prefill(target, torch.tensor(prompt), cache)[-1:])
    differ += not torch.equal(first_1V[0], logits[0])
    while at + 1 < len(ids):
        path = ids[at : at + 1 + draw.randrange(levels + 1)][: len(ids) - 1 - at]
        draft, past = drafted(path, levels, nodes, draw, logits[0].numel()), cache.length
        _, logits_MV = Eager().verify(target, Memory(target, cache), draft)
        rows = right_rows(draft, path)
        differ += sum(not torch.equal(logits_MV[row], logits[at + 1 + n]) for n, row in enumerate(rows))
        verdict = sampler.judge(draft, logits_MV, past + 1)
        differ += verdict.new_ids[: len(path)] != ids[at + 1 : at + 1 + len(path)]
        cache.keep(torch.tensor(rows), past)  # a sibling that was drawn right may have gone further: not kept
        at += len(path)
    return differ


class KeptLogits:
    """The lent tensors, and a copy of all logits that they gave."""

    def __init__(self, lent: Any) -> None:
        self.lent: Any = lent
        self.rows: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lent, name)

    def logits(self, feature_XD: torch.Tensor) -> torch.Tensor:
        """Lent's own, kept."""
        logits_XV: torch.Tensor = self.lent.logits(feature_XD)
        self.rows += logits_XV.clone()
        return logits_XV


def in_a_batch(
    target: Target, prompts: list[list[int]], answers: list[Answer], samplers: list[Sampler], tokens: int
) -> list[int]:
    """Of each answer, how many logits [V] and tokens are not those of the steps when all are written side by side."""
    kept = KeptLogits(target.lent)
    lent: Any = kept
    engine = Engine(dataclasses.replace(target, lent=lent, stop_ids=frozenset(), idle=[]))
    requests = [Request(prompt, sampler, tokens) for prompt, sampler in zip(prompts, samplers, strict=True)]
    said: list[list[int]] = [[] for _ in answers]
    order = []
    for number, event in decode_all(engine, requests, len(requests)):
        order.append((number, len(said[number])))
        said[number] += event.new_ids
    assert len(order) == len(kept.rows)
    differ = [int(ids != own) for (ids, _), own in zip(answers, said, strict=True)]
    for (number, place), logits_V in zip(order, kept.rows, strict=True):
        differ[number] += not torch.equal(logits_V, answers[number][1][place])
    return differ


def chat_differs(target: Target, prompt: list[int], answer: Answer) -> int:
    """Of the logits after each part of an answer, how many differ where the part is read at once behind the others."""
    ids, logits = answer
    cache, whole, differ = fresh(target, len(prompt) + len(ids)), prompt + ids, 0
    prefill(target, torch.tensor(prompt), cache)
    for turn in range(1, TURNS):
        end = turn * len(ids) // TURNS
        feature_TD = prefill(target, torch.tensor(whole[: len(prompt) + end]), cache)
        differ += not torch.equal(target.lent.logits(feature_TD[-1:])[0], logits[end])
        cache.truncate(cache.length - 2)  # rows that two prompts share are kept, the last ones read again
    return differ


def costs(target: Target, prompt: list[int]) -> dict[str, float]:
    """Seconds of the forward that is not exact over those of the one that is, in turns, by rows.

    Seconds of processor time: neighbours on the machine do not lengthen them much.
    """
    found = {}
    for rows in TIMED_ROWS:
        seconds: dict[bool, list[float]] = {True: [], False: []}
        caches = {}
        for kind in seconds:
            one = dataclasses.replace(target, exact=kind, idle=[])
            caches[kind] = one, fresh(one, len(prompt) + 2 * rows)
            prefill(one, torch.tensor(prompt), caches[kind][1])
        path = prompt[:1]
        draft = drafted(path, 4, rows - 1, random.Random(0), 1000) if rows > 1 else tree.root_only(torch.tensor(path))
        for _ in range(TIMED):
            for kind, (one, cache) in caches.items():
                past, start = cache.length, time.process_time()
                mask = tree.mask(one, past, draft.depth_M, draft.sees_MM)
                position_BM = (past + draft.depth_M)[None]
                feature_BMD = one.forward(draft.token_M[None], position_BT=position_BM, mask=mask, cache=cache)
                one.lent.logits(feature_BMD[0])
                cache.truncate(past)
                seconds[kind].append(time.process_time() - start)
        found[str(rows)] = statistics.median(seconds[False]) / statistics.median(seconds[True])
    return found


def rows_of(model: str, dtype: str, answers: int, tokens: int, done: set[str]) -> Iterator[Row]:
    """Measure what is not done yet, a row for each answer and each way to read it.

    A row is of one commit, one target and so many answers side by side: another number of them is another row.
    """
    name = Path(model).parent.name if Path(model).name == "hf" else Path(model).name
    target = Target.from_pretrained(model, dtype=DTYPES[dtype], device="cpu")
    commit, shared = git_commit(), {"model": name, "dtype": dtype}
    made_by = {"target": target.fingerprint, "commit": commit}
    words = torch.randint(100, 5000, (answers, 64), generator=torch.Generator().manual_seed(0)).tolist()
    for first in range(0, answers, BATCH):
        numbers = range(first, min(first + BATCH, answers))
        temperature = float(first // BATCH % 2)
        key = fingerprint([shared, made_by, len(numbers), first, temperature, tokens])
        if key in done:
            continue
        prompts = [words[number][: 16 + number % 48] for number in numbers]
        samplers = [Sampler(temperature=temperature, seed=number) for number in numbers]
        plain = [written(target, *each) for each in zip(prompts, [tokens] * len(prompts), samplers, strict=True)]
        together = in_a_batch(target, prompts, plain, samplers, tokens)
        rows = []
        for number, prompt, answer, sampler, differs in zip(numbers, prompts, plain, samplers, together, strict=True):
            differ = {way: differing(target, prompt, answer, at, sampler, number) for way, at in TREES.items()}
            differ |= {"chat": chat_differs(target, prompt, answer), f"batch of {len(prompts)}": differs}
            rows.append({"answer": number, "differing": differ})
        asked = {"first": first, "temperature": temperature, "tokens": tokens}
        yield {"key": key, **shared, **made_by, **asked, "answers": rows}
    key = fingerprint([shared, made_by, "cost"])
    if key not in done:
        yield {"key": key, **shared, **made_by, "exact_over_inexact_by_rows": costs(target, words[0] * 4)}


def newest(rows: Iterable[Row]) -> list[Row]:
    """Those of today's commit; where batches of several sizes begin at one answer, the one that was measured last."""
    commit = git_commit()
    own = (row for row in rows if row.get("commit") == commit)
    names = ("model", "dtype", "target", "temperature", "tokens", "first")
    return list({tuple(row.get(name) for name in names): row for row in own}.values())


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """How many answers have the bits of the plain ones, and what that costs."""
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        read_again = [answer for row in rows if row["dtype"] == dtype for answer in row.get("answers", ())]
        if read_again:
            equal = sum(not any(one["differing"].values()) for one in read_again)
            found |= {f"{dtype}_equal_share": equal / len(read_again), f"{dtype}_answers": len(read_again)}
    found["exact_over_inexact_tokens_per_s"] = {
        f"{row['model']} {row['dtype']}": row["exact_over_inexact_by_rows"]
        for row in rows
        if "exact_over_inexact_by_rows" in row
    }
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--dtype", action="append", choices=list(DTYPES.values()), help="both, without")
    parser.add_argument("--answers", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    kept = RESULTS / "exact.jsonl"
    for model in options.model:
        for dtype in (name for name in DTYPES if not options.dtype or DTYPES[name] in options.dtype):
            done = {row["key"] for row in read(kept)}
            for row in rows_of(model, dtype, options.answers, options.tokens, done):
                append(kept, row)
                print(json.dumps(row), flush=True)
    rows = newest(read(kept))
    record("exact", figures(rows), rows)


if __name__ == "__main__":
    main()
