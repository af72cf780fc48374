"""Several prompts at once, each with its own tree and its own acceptance; waiting ones take the place of finished ones.

A module beside the engine for one prompt, and no slower path through it: prompts are read alone, by that engine's own
pieces; then every round drafts, verifies and accepts for all answers under way. What an answer says does not depend on
its company: in float32 it is the engine's own for that prompt.
Axes: B seat, M tree row, N tree rows of all seats, A path, T position, D hidden, V vocabulary, L token of the past.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator

import torch

from coral_core.decoding import masks, tree
from coral_core.decoding.batch.cache import BatchCache
from coral_core.decoding.batch.drafting import BatchDrafting
from coral_core.decoding.engine import Engine
from coral_core.decoding.history import History
from coral_core.decoding.policy.constant import fixed
from coral_core.decoding.rounds import Clock, Round, Stop, prefill, room
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.verify import on_path


@dataclasses.dataclass
class Seat:
    """One answer under way; its place in the list of seats is its place in both caches."""

    prompt: int
    """Number of the prompt."""
    stop: Stop
    history: History
    root: int
    """The last token, chosen and not yet forwarded."""
    rows: int
    """Committed rows of the target's cache and, once fed, of the drafter's."""
    hidden_1D: torch.Tensor
    """The drafted feature after the last fed row."""


@dataclasses.dataclass(frozen=True)
class BatchEngine:
    """An engine for up to `seats` prompts at once."""

    engine: Engine
    seats: int

    def decode(self, prompts: list[list[int]], sampler: Sampler, max_new_tokens: int) -> Iterator[tuple[int, Round]]:
        """Yield (number of the prompt, round) as rounds are done: of each prompt in order, of all interleaved.

        Joined per prompt, the ids are those of `Engine.decode`. A round's seconds are the batch's, shared out evenly.
        Raises DataError, before anything is decoded, for a prompt that is empty or does not fit the target's context.
        """
        assert self.seats >= 1
        longest = max((len(ids) + room(self.engine.target, ids, max_new_tokens) for ids in prompts), default=0)
        yield from _Batch(self.engine, min(self.seats, len(prompts)), longest, sampler).decode(prompts, max_new_tokens)


class _Batch:
    """One call of `BatchEngine.decode`."""

    def __init__(self, engine: Engine, seats: int, longest: int, sampler: Sampler) -> None:
        self.engine, self.target, self.sampler = engine, engine.target, sampler
        self.seats: list[Seat] = []
        self.most = seats
        costs = engine.costs
        self.shape = shape = fixed(engine.shape, costs, seats) if costs else engine.shape
        layers = self.target.model.config.get_text_config().num_hidden_layers
        self.cache = BatchCache(layers, seats, longest + shape.nodes + 1)
        self.drafting = BatchDrafting(engine.drafter, self.target.lent, engine.head, shape, seats, longest)
        self.clock = Clock()

    @torch.no_grad()
    def decode(self, prompts: list[list[int]], max_new_tokens: int) -> Iterator[tuple[int, Round]]:
        waiting = deque(enumerate(prompts))
        while waiting or self.seats:
            while waiting and len(self.seats) < self.most:
                number, prompt = waiting.popleft()
                stop = Stop(self.target.stop_ids, room(self.target, prompt, max_new_tokens))
                yield number, self._sit_down(number, prompt, stop)
            if self.seats:
                yield from self._round()

    def _sit_down(self, number: int, prompt: list[int], stop: Stop) -> Round:
        """Read a prompt into the first empty seat, which it keeps unless its first token is its last."""
        target, place = self.target, len(self.seats)
        prompt_T = torch.tensor(prompt, device=target.device)
        history = History(prompt_T, len(prompt) + stop.remaining + self.shape.nodes)
        feature_TD = prefill(target, prompt_T, self.cache.seat(place))
        root_1 = self.sampler.pick(target.logits(feature_TD[-1:]), len(prompt), history.row())
        new_ids = stop.cut(root_1.tolist())
        if not stop.done:
            history.extend(root_1)
            hidden_1D = self.drafting.alone(place).feed(torch.cat((prompt_T[1:], root_1)), feature_TD)
            self.seats.append(Seat(number, stop, history, new_ids[-1], len(prompt), hidden_1D))
        self.clock.lap("prefill")
        return Round(new_ids, "prefill", 0, self.clock.take())

    def _round(self) -> list[tuple[int, Round]]:
        """One draft, verification and acceptance for every seat."""
        seats, past = self.seats, [seat.rows for seat in self.seats]
        hidden_BD = torch.cat([seat.hidden_1D for seat in seats])
        drafts = self.drafting.grow([seat.root for seat in seats], hidden_BD, past, self.sampler)
        self.clock.lap("draft")
        forest = tree.pad(drafts)
        feature_BMD = self._forward(forest, past)
        picked_BM = self._pick(forest, drafts, feature_BMD, past)
        path_BM = on_path(forest, picked_BM)
        token_rows, path_rows = torch.stack((picked_BM, path_BM.long())).tolist()  # the round's one look at the device
        paths = [[row for row, kept in enumerate(rows) if kept] for rows in path_rows]
        self._keep(paths, past)
        events = []
        for seat, path, tokens in zip(seats, paths, token_rows, strict=True):
            new = [tokens[row] for row in path]
            new_ids = seat.stop.cut(new)
            events.append((seat.prompt, new_ids, min(len(path) - 1, len(new_ids))))
            seat.history.extend(torch.tensor(new, device=self.target.device))
            seat.root, seat.rows = new[-1], seat.rows + len(new)
        self.clock.lap("verify")
        self._feed(paths, token_rows, feature_BMD, past)
        self._stand_up()
        self.clock.lap("draft")
        seconds = {phase: value / len(events) for phase, value in self.clock.take().items()}
        return [(number, Round(new_ids, "draft", drafted, seconds)) for number, new_ids, drafted in events]

    def _forward(self, forest: tree.Draft, past: list[int]) -> torch.Tensor:
        """The features [B,M,D] of all trees, in one pass."""
        target, rows = self.target, forest.token_M.shape[1]
        past_B1 = torch.tensor(past, device=target.device)[:, None]
        end = max(past) + rows
        self.cache.place(past_B1 + torch.arange(rows, device=target.device), end)
        return target.forward(
            forest.token_M.clamp_min(0),
            position_BT=past_B1 + forest.depth_M,
            mask=masks.for_batch(target, past_B1, forest.depth_M, forest.sees_MM, end),
            cache=self.cache,
        )

    def _pick(
        self, forest: tree.Draft, drafts: list[tree.Draft], feature_BMD: torch.Tensor, past: list[int]
    ) -> torch.Tensor:
        """The target's picks [B,M]; rows that only fill up are neither multiplied with the head nor drawn for."""
        valid_BM = forest.token_M != tree.NO_TOKEN
        past_B1 = torch.tensor(past, device=self.target.device)[:, None]
        position_N = (past_B1 + forest.depth_M + 1)[valid_BM]
        past_NL = None
        if self.sampler.looks_back:
            pasts = [
                row_L for seat, draft in zip(self.seats, drafts, strict=True) for row_L in seat.history.rows(draft)
            ]
            widest = max(row_L.numel() for row_L in pasts)
            # Filled up with a token that the row holds anyway: how often it stands there does not matter.
            past_NL = torch.stack([torch.cat((row_L, row_L[-1:].expand(widest - row_L.numel()))) for row_L in pasts])
        picked_BM = torch.full_like(forest.token_M, tree.NO_TOKEN)
        picked_BM[valid_BM] = self.sampler.pick(self.target.logits(feature_BMD[valid_BM]), position_N, past_NL)
        return picked_BM

    def _keep(self, paths: list[list[int]], past: list[int]) -> None:
        """Move each path's rows behind the committed ones; a shorter path's surplus stays where it is."""
        widest = max(map(len, paths))
        sources = [path + list(range(len(path), widest)) for path in paths]
        past_B1 = torch.tensor(past, device=self.target.device)[:, None]
        target_BA = past_B1 + torch.arange(widest, device=self.target.device)
        self.cache.keep(past_B1 + torch.tensor(sources, device=self.target.device), target_BA)

    def _feed(
        self, paths: list[list[int]], token_rows: list[list[int]], feature_BMD: torch.Tensor, past: list[int]
    ) -> None:
        """Give the drafter the accepted tokens and the target's own features for them."""
        widest = max(map(len, paths))
        path_BA = torch.tensor([path + [0] * (widest - len(path)) for path in paths], device=self.target.device)
        token_BA = torch.tensor(token_rows, device=self.target.device).gather(1, path_BA)
        hidden_BAD = self.drafting.feed(token_BA, feature_BMD.take_along_dim(path_BA[..., None], dim=1), past)
        for number, (seat, path) in enumerate(zip(self.seats, paths, strict=True)):
            seat.hidden_1D = hidden_BAD[number, len(path) - 1 : len(path)]

    def _stand_up(self) -> None:
        """Free the seats of finished answers; the last answers move up, so that the first seats are the taken ones."""
        for place in reversed(range(len(self.seats))):
            if self.seats[place].stop.done:
                last = self.seats.pop()
                if place < len(self.seats):
                    self.cache.move(len(self.seats), place, last.rows)
                    self.drafting.slots.move(len(self.seats), place, last.rows)
                    self.seats[place] = last
