"""One seat, before and after: the tokens per second of two checkouts on the same prompts, in turns.

    python -m benchmarks.seat --old CHECKOUT      # such as a git worktree of an older commit

Each checkout decodes in a process of its own, and only one of them at a time. Both decode pico with its own drafter and
head, greedily, with a tree of fixed size; this one with exact forwards and without. Ratios are medians over prompts and
turns of the seconds of an answer, of equal length.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.record import record
from coral_core.embedded import FOLDER

ROOT = Path(__file__).parent.parent
WORKER = """
import dataclasses, json, sys, time
from coral_core import Drafter, Generator, Target
try:
    from coral_core.decoding.policy.plan import TreeShape
except ImportError:  # an older checkout
    from coral_core.decoding.drafting import TreeShape
shape = TreeShape(depth=6, nodes=16, topk=4)
target = Target.from_pretrained("pico", device="cpu", dtype="float32")
lanes = {"": Generator(target, Drafter.from_pretrained("pico"), shape)}
if hasattr(target, "exact"):
    lanes["not exact"] = Generator(dataclasses.replace(target, exact=False), Drafter.from_pretrained("pico"), shape)
print(json.dumps(list(lanes)), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    begun_s, ids = time.perf_counter(), []
    for event in lanes[asked["lane"]].rounds(asked["ids"], max_new_tokens=asked["tokens"]):
        ids += event.new_ids
    print(json.dumps({"seconds": time.perf_counter() - begun_s, "ids": ids}), flush=True)
"""


class Checkout:
    """A process that decodes with one checkout's code."""

    def __init__(self, root: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root.resolve())}
        command = [sys.executable, "-c", WORKER]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment, cwd=root, **pipes)
        self.lanes: list[str] = self._read()

    def __enter__(self) -> "Checkout":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # its input ends, and so does it

    def answer(self, lane: str, ids: list[int], tokens: int) -> dict[str, Any]:
        """The answer's `ids`, and the `seconds` that it took."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"lane": lane, "ids": ids, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = self._read()
        return found

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    prompts: list[list[int]] = json.loads((FOLDER / "holdout.json").read_text())[: options.prompts]
    with Checkout(options.old) as old, Checkout(ROOT) as new:
        rows = race({"old": old, "new": new}, prompts, options)
    record("seat", figures(rows), rows)
    print(json.dumps(figures(rows), indent=1))


def race(checkouts: dict[str, Checkout], prompts: list[list[int]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each prompt in each lane, in another order each time."""
    lanes = [(name, lane) for name, checkout in checkouts.items() for lane in checkout.lanes]
    for name, lane in lanes:
        checkouts[name].answer(lane, prompts[0], 16)
    rows = []
    for turn in range(options.turns):
        for number, ids in enumerate(prompts):
            order = lanes[(turn + number) % len(lanes) :] + lanes[: (turn + number) % len(lanes)]
            found = {lane: checkouts[lane[0]].answer(lane[1], ids, options.tokens) for lane in order}
            for (name, lane), answer in found.items():
                shared = {"prompt": number, "turn": turn, "lane": f"{name} {lane}".strip()}
                same = answer["ids"] == found[lanes[0]]["ids"]
                rows.append(shared | {"seconds": answer["seconds"], "tokens": len(answer["ids"]), "equal_to_old": same})
    return rows


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens per second of each lane, and over the old ones': the median of the pairs of equal answers."""
    by_lane: dict[str, dict[tuple[int, int], dict[str, Any]]] = {}
    for row in rows:
        by_lane.setdefault(row["lane"], {})[row["prompt"], row["turn"]] = row
    told: dict[str, Any] = {"tokens_per_s": {}}
    for lane, own in by_lane.items():
        total_s = sum(row["seconds"] for row in own.values())
        told["tokens_per_s"][lane] = sum(row["tokens"] for row in own.values()) / total_s
        if lane != "old":
            pairs = [by_lane["old"][at]["seconds"] / row["seconds"] for at, row in own.items() if row["equal_to_old"]]
            told[f"{lane} over old"] = statistics.median(pairs)
    return told


if __name__ == "__main__":
    main()
