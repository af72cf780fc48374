"""Measuring the costs of a round on the device at hand, once: what was measured is kept in the run, by fingerprint.

    RUN/tree.json    {fingerprint: {"of": what was measured, and where, "costs": …}, …}

What is timed is the engine's own code, behind some context, part after part in turn, so that a machine that slows down
slows all of them. On a CPU the clock is the thread's own processor time, which stands still while another process has
the core. Threads that wait for each other still use it: where times of one part differ too much, in two attempts,
typical costs are taken instead. The costs are kept, so that the next evaluation has the same trees. They are measured
again once a plain step takes a third of what it took then.
Axes: T position, D hidden, V vocabulary, M tree row.
"""

import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from coral_core.artifacts import fingerprint, versions, write_text
from coral_core.decoding import tree
from coral_core.decoding.drafting import Drafting
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.policy.costs import Costs, rising
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.rounds import Clock
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.seat import Memory
from coral_core.decoding.step import prefill

FILE = "tree.json"
FORM = 5
"""Of what is measured; another one is measured anew."""
KEPT = 16
"""Measurements that a run's file holds, at most; the oldest go first."""
TYPICAL_VERIFY = {1: 1.0, 2: 1.07, 8: 1.2, 16: 1.45, 32: 1.95, 64: 3.2}
"""SmolLM2-135M's on a processor, in bfloat16; pico's in float32 are lower (64: 1.97)."""
OVERHEAD = 0.03
"""What a level takes beside its products, in plain steps."""
MOST_NOISE = 1.25
"""The machine is too noisy if median/minimum time exceeds this, for the median part."""
ATTEMPTS = 2
BUSY = 3.0
"""How much slower a plain step was when the costs were measured, for them to be measured again."""
CONTEXT = 128
"""Committed rows behind which everything is timed."""
ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Rows of a target forward."""
WIDTHS = (1, 2, 4, 8)
"""Nodes expanded per level."""
LEVELS = 4
"""Levels that are timed together."""
ROUND, WHOLE_ROUNDS = TreeShape(depth=3, nodes=7, topk=2), 16
"""The tree of the rounds that are timed whole, and how many there are, the prefill included.

The median of 15 rounds, each over the plain step beside it: 1.35 to 1.54 plain steps in eight trials (SmolLM2-135M, two
quiet cores), where the least of five rounds over the least of five steps had 1.25 to 1.60. On a busier machine that one
had some 0.4 too much once, and a quarter of all rounds were plain steps then."""
FED = 3
"""Rows that a round feeds the drafter."""
REPEATS, BUDGET_S = (4, 25), 4.0
"""Each part is timed this often at least and at most, and no more once so many seconds have gone."""


def tuned(engine: Engine, run: Path, of: Mapping[str, Any]) -> Engine:
    """The engine with the costs of its rounds: those kept in the run, or measured now and kept there.

    `of` names target, drafter and head. A folder that is not there is not made, and one that cannot be written to
    keeps nothing: then they are measured every time.
    """
    known = {**of, **_here(engine), "form": FORM}
    name, kept = fingerprint(known), _read(run / FILE)
    with suppress(KeyError, TypeError, ValueError):
        costs = Costs.from_json(kept[name]["costs"])
        if costs.step_s < BUSY * step_s(engine):
            return dataclasses.replace(engine, costs=costs)
    costs = measure_costs(engine)
    kept.pop(name, None)
    kept[name] = {"of": known, "costs": dataclasses.asdict(costs)}
    if run.is_dir():
        with suppress(OSError):
            write_text(run / FILE, json.dumps(dict(list(kept.items())[-KEPT:]), indent=1) + "\n")
    return dataclasses.replace(engine, costs=costs)


def _here(engine: Engine) -> dict[str, Any]:
    device = engine.target.device
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "dtype": str(engine.target.dtype).removeprefix("torch."),
        "exact": engine.target.exact,
        "versions": versions(),
    } | ({"graphs": True} if engine.target.graphs else {})


def _read(path: Path) -> dict[str, Any]:
    """What is kept; nothing where there is no file, or a damaged one: it can be measured again."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def device_name(device: torch.device) -> str:
    """What a reader calls the machine: the GPU, or the processor, its cores and what PyTorch computes with on it.

    Processors of one name differ: in bfloat16, an AMD EPYC with AVX2 alone checks 16 rows in 3.1 plain steps, and one
    with AVX-512 and bfloat16 in 1.5.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if names:
            return f"{names[0].strip()} x {len(names)}, {instructions()}"
    return f"{platform.processor() or platform.machine()}, {instructions()}"


def instructions() -> str:
    """As PyTorch calls them: AVX2, AVX512, …; and what else makes products faster, where it tells."""
    found = torch.backends.cpu.get_cpu_capability()
    more = {"_is_avx512_bf16_supported": " with bfloat16", "_is_amx_tile_supported": " and AMX"}
    has = [text for name, text in more.items() if getattr(torch.cpu, name, bool)()]
    return found + "".join(has if found == "AVX512" else [])


@torch.no_grad()
def measure_costs(engine: Engine) -> Costs:
    """Time every part, at its quickest: whatever else a machine does only adds to it. Takes seconds.

    Where the machine is too busy to tell, only the plain step is; the rest is read off the models' sizes.
    """
    for _ in range(ATTEMPTS):
        costs, quiet = _measured(engine)
        if quiet:
            return _whole(engine, costs) if engine.target.device.type == "cpu" else costs
    return typical(engine, costs.step_s)


def typical(engine: Engine, step_s: float) -> Costs:
    """Costs by the weights that a level reads and those that a plain step reads: of experts, those of one token.

    SmolLM2-135M with the full head: a level 0.27, measured 0.13 to 0.17. Costs that are too low lose time: with
    pico's for SmolLM2 a drafter that is rarely right made answers a fifth slower than plain ones.
    """
    target, lent, head = engine.target, engine.target.lent, engine.target.lent.head_VD
    share = _experts_share(target.model.config.get_text_config())
    weights = [item for item in target.body.named_parameters() if item[1].data_ptr() != lent.embed_VD.data_ptr()]
    read = head.numel() + sum(weight.numel() * (share if ".experts." in name else 1) for name, weight in weights)
    assert engine.drafter is not None, "costs are those of drafts"
    drafted = sum(weight.numel() for weight in engine.drafter.parameters()) + head.numel()
    level = round(OVERHEAD + drafted / read, 4)
    return Costs(step_s=step_s, verify=TYPICAL_VERIFY, level={1: level, 8: level}, base=round(level + OVERHEAD, 4))


def _experts_share(config: Any) -> float:
    """Of a mixture's experts, the share that reads one token; 1 where the config names no such numbers."""
    used = getattr(config, "num_experts_per_tok", None)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((number for name in names if (number := getattr(config, name, None))), None)
    return used / experts if isinstance(used, int) and isinstance(experts, int) else 1.0


def _measured(engine: Engine) -> tuple[Costs, bool]:
    """Costs, and whether the machine was quiet enough to believe them."""
    parts = dict(_Bench(engine, CONTEXT).parts())
    spent: dict[tuple[str, int], list[float]] = {part: [] for part in parts}
    _time_each(parts, spent, engine.target.device)  # what is made at the first call is no cost of a round
    for seconds in spent.values():
        seconds.clear()
    begun = time.perf_counter()
    for turn in range(REPEATS[1]):
        if turn >= REPEATS[0] and time.perf_counter() - begun > BUDGET_S:
            break
        _time_each(parts, spent, engine.target.device)
    least = {part: min(seconds) for part, seconds in spent.items()}
    noise = statistics.median(statistics.median(spent[part]) / least[part] for part in parts)
    return _costs(least), noise <= MOST_NOISE


def _whole(engine: Engine, costs: Costs) -> Costs:
    """The costs with what a drafted round takes outside of its parts: rounds of the engine beside the plain loop's."""
    target = dataclasses.replace(engine.target, stop_ids=frozenset())
    vocab, context = target.lent.embed_VD.shape[0], min(CONTEXT, target.max_positions // 2)
    prompt, new = [number * 7919 % vocab for number in range(1, context + 1)], WHOLE_ROUNDS * (ROUND.depth + 1) + 1
    drafted = dataclasses.replace(engine, target=target, shape=ROUND, costs=None)
    lanes = (drafted.decode(prompt, Sampler(), new), plain(target, prompt, Sampler(), new))
    ratios = []
    for turn in range(WHOLE_ROUNDS):
        spent = []
        for lane in lanes:
            begun = _now(target.device)
            if next(lane, None):
                spent.append(_now(target.device) - begun)
        if turn and len(spent) == len(lanes):  # the first is the prefill
            ratios.append(spent[0] / spent[1])
    if not ratios:
        return costs
    parts = costs.base + (ROUND.depth - 1) * costs.expanded(ROUND.topk)[-1] + costs.verified(ROUND.nodes)[-1]
    return dataclasses.replace(costs, base=round(costs.base + max(0.0, statistics.median(ratios) - parts), 4))


@torch.no_grad()
def step_s(engine: Engine) -> float:
    """Seconds of a plain step at its quickest, behind next to no context."""
    name, step = next(_Bench(engine, 8).parts())
    spent: dict[tuple[str, int], list[float]] = {name: []}
    for _ in range(REPEATS[0]):
        _time_each({name: step}, spent, engine.target.device)
    return min(spent[name])


def _time_each(
    parts: Mapping[tuple[str, int], Callable[[], None]],
    spent: Mapping[tuple[str, int], list[float]],
    device: torch.device,
) -> None:
    for part, run in parts.items():
        begun = _now(device)
        run()
        spent[part].append(_now(device) - begun)


def _now(device: torch.device) -> float:
    """Seconds, of the device or of this thread."""
    if device.type == "cpu":
        return time.thread_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def _costs(least: Mapping[tuple[str, int], float]) -> Costs:
    """Seconds of the parts into ratios: a level is what a deep draft takes more than a flat one."""
    step_s, flat = least["verify", 1], least["flat", 1]
    forward_s = rising([least["verify", rows] for rows in ROWS])
    verify = [seconds / forward_s[0] for seconds in forward_s]
    level = rising([max(0.0, least["deep", width] - flat) / LEVELS / step_s for width in WIDTHS])
    return Costs(
        step_s=round(step_s, 6),
        verify={rows: round(cost, 3) for rows, cost in zip(ROWS, verify, strict=True)},
        level={width: round(cost, 4) for width, cost in zip(WIDTHS, level, strict=True)},
        base=round(flat / step_s, 4),
    )


class _Bench:
    """Caches that hold some context, to which every part leaves them again."""

    def __init__(self, engine: Engine, context: int) -> None:
        self.engine, target = engine, engine.target
        self.context = min(context, target.max_positions // 2)
        vocab, self.device = target.lent.embed_VD.shape[0], target.device
        self.ids_T = torch.arange(1, self.context + ROWS[-1] + 1, device=self.device) * 7919 % vocab
        self.memory = Memory(target)
        self.cache, self.slots = self.memory.cache, self.memory.slots
        self.cache.reserve(self.context + ROWS[-1])
        self.feature_TD = prefill(target, self.ids_T[: self.context], self.cache)
        self.slots.reserve(self.context + FED + (1 + LEVELS) * WIDTHS[-1])
        self._drafting(1, 1).feed(self.ids_T[: self.context], self.feature_TD)

    def parts(self) -> Iterator[tuple[tuple[str, int], Callable[[], None]]]:
        """Each with its name and its number of rows."""
        for rows in ROWS:
            draft = self._bushy(rows)
            yield ("verify", rows), lambda draft=draft: self._verify(draft)  # type: ignore[misc]
        drafts = {("flat", 1): self._drafting(1, WIDTHS[-1])}
        drafts |= {("deep", width): self._drafting(1 + LEVELS, width) for width in WIDTHS}
        for part, drafting in drafts.items():
            yield part, lambda drafting=drafting: self._draft(drafting)  # type: ignore[misc]

    def _drafting(self, depth: int, width: int) -> Drafting:
        """Of as many nodes on every level, and one of them verified."""
        drafting = self.engine.drafting(TreeShape(depth=depth, nodes=1, topk=width), self.memory)
        assert drafting is not None, "costs are those of drafts"
        return drafting

    def _bushy(self, rows: int) -> tree.Draft:
        """A tree in which every node has two children."""
        parent_M = (torch.arange(rows, device=self.device) - 1).clamp_min(0) // 2
        depth_M = torch.arange(1, rows + 1, device=self.device).log2().floor().long()
        return tree.Draft(
            token_M=self.ids_T[self.context : self.context + rows],
            parent_M=parent_M,
            depth_M=depth_M,
            sees_MM=tree.ancestry(parent_M, rows.bit_length()),
            score_M=torch.zeros(rows, device=self.device),
            levels=rows.bit_length() - 1,
        )

    def _verify(self, draft: tree.Draft) -> None:
        _, logits_MV = self.engine.forwards.verify(self.engine.target, self.memory, draft)
        verdict = Sampler().judge(draft, logits_MV, self.context + 1)
        self.cache.keep(verdict.path_A, self.context)
        self.cache.truncate(self.context)

    def _draft(self, drafting: Drafting) -> None:
        committed = self.slots.length
        drafting.draft(self.ids_T[:FED], self.feature_TD[:FED], Sampler(), Clock())
        self.slots.truncate(committed)
