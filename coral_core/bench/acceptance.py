"""Tokens per round and nothing else, for a drafter that is still in training.

Axes: C candidate token.
"""

import copy
import statistics
from collections.abc import Callable, Iterable, Iterator

import torch

from coral_core.bench.race import run_lane
from coral_core.decoding.engine import Engine
from coral_core.decoding.sampling import Sampler
from coral_core.drafter.model import Drafter
from coral_core.head.heads import FullHead, StaticHead
from coral_core.progress import Progress
from coral_core.recipe.schema import Recipe
from coral_core.run import sampler, tree_shape
from coral_core.target.target import Target


def acceptance(
    recipe: Recipe, target: Target, prompts: list[list[int]], progress: Progress
) -> Callable[[Drafter], float]:
    """A function that decodes the prompts with a drafter, the full head and the recipe's tree: its tokens_per_round.

    The micro mean over all rounds, as `coral eval` reports it.
    """

    def measure(drafter: Drafter) -> float:
        drafter = drafter.to(target.device, target.dtype)
        engine = Engine(target, drafter, FullHead(target.lent), tree_shape(recipe.decode))
        return tokens_per_round(recipe, engine, prompts, progress)

    return measure


def tokens_per_round(recipe: Recipe, engine: Engine, prompts: list[list[int]], progress: Progress) -> float:
    """What an engine reaches on the prompts, with the recipe's sampler and length."""
    rounds: list[int] = []
    decoded = emitted_by_prompt(engine, prompts, sampler(recipe), recipe.decode.max_new_tokens)
    for number, emitted in enumerate(decoded, start=1):
        rounds += emitted
        numbers = {"tokens_per_round": statistics.fmean(rounds)} if rounds else {}
        progress("acceptance", number, len(prompts), numbers)
    return statistics.fmean(rounds) if rounds else 1.0


def emitted_by_prompt(
    engine: Engine, prompts: Iterable[list[int]], picks: Sampler, max_new_tokens: int
) -> Iterator[list[int]]:
    """Tokens of each draft round, prompt after prompt, by real decoding."""
    for prompt in prompts:
        yield run_lane(engine.decode(prompt, picks, max_new_tokens)).emitted


def static_head_cost(
    recipe: Recipe,
    target: Target,
    drafter: Drafter,
    token_C: torch.Tensor,
    prompts: list[list[int]],
    progress: Progress,
) -> tuple[float, float]:
    """tokens_per_round when drafting from the whole vocabulary, and from the tokens of a static head alone."""
    # `to` changes a module in place: the caller's weights would be rounded to the target's dtype.
    drafter, shape = copy.deepcopy(drafter).to(target.device, target.dtype), tree_shape(recipe.decode)
    heads = (FullHead(target.lent), StaticHead(target.lent, token_C))
    whole, static = (
        tokens_per_round(recipe, Engine(target, drafter, head, shape), prompts, progress) for head in heads
    )
    return whole, static
