"""Dialogues answered by an endpoint: many at once, and ahead of the shard that is being made.

A server is only fast when its queue is never empty. So requests do not wait for a shard's last answer, nor for its
features: threads work through the dialogues of the shards to come, and each shard is handed over when it is whole.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from coral_core.data.answer import derive_seed
from coral_core.data.endpoint import Endpoint
from coral_core.data.meter import Meter
from coral_core.data.plan import Fit
from coral_core.data.prompts import Dialogue
from coral_core.target.template import Encoded, Turn, closing_ids, join, text_ids

REQUESTS = 64
"""In flight at once."""

AHEAD = 3
"""Dialogues under way or waiting, for each request in flight."""


class BrokenOffError(Exception):
    """Nobody waits for this answer any more."""


class Ahead:
    """Threads that answer dialogues. They are daemons: an interrupted program does not wait for a server."""

    def __init__(self, fit: Fit, model: str, key: str = "") -> None:
        self.fit = fit
        self.endpoint = Endpoint(fit.spec.endpoint, model, key, self._wait)
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Dialogue, int]] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._tokenizing = threading.Lock()  # a fast tokenizer may not be used by two threads at once
        self._closing = closing_ids(fit.tokenizer, fit.stop_ids)

    def shards(
        self, shards: Iterable[tuple[int, list[Dialogue], int]], meter: Meter
    ) -> Iterator[tuple[int, list[list[Encoded]]]]:
        """(number, pieces of each dialogue) for (number, dialogues, seed), in the same order.

        Raises DataError of the first answer that failed.
        """
        self.endpoint.check()
        for _ in range(REQUESTS):
            threading.Thread(target=self._work, daemon=True).start()
        coming = iter(shards)
        under_way: deque[tuple[int, list[Future[Any]]]] = deque()
        try:
            while True:
                while sum(len(futures) for _, futures in under_way) < AHEAD * REQUESTS:
                    shard = next(coming, None)
                    if shard is None:
                        break
                    under_way.append(self._submit(*shard))
                if not under_way:
                    return
                number, futures = under_way.popleft()
                yield number, [self._result(future, meter) for future in futures]
        finally:
            self._stopped.set()

    def _submit(self, number: int, dialogues: list[Dialogue], seed: int) -> tuple[int, list[Future[Any]]]:
        futures: list[Future[Any]] = []
        for row, dialogue in enumerate(dialogues):
            futures.append(Future())
            self._tasks.put((futures[-1], dialogue, derive_seed(seed, row)))
        return number, futures

    def _result(self, future: "Future[list[Encoded]]", meter: Meter) -> list[Encoded]:
        pieces = future.result()
        meter.advance(1, sum(sum(piece.answer) for piece in pieces))
        return pieces

    def _work(self) -> None:
        while not self._stopped.is_set():
            try:
                future, dialogue, seed = self._tasks.get(timeout=0.2)
            except queue.Empty:
                continue
            try:
                future.set_result(self._answer(dialogue, seed))
            except BaseException as error:  # noqa: BLE001  # raised again by future.result()
                future.set_exception(error)

    def _answer(self, dialogue: Dialogue, seed: int) -> list[Encoded]:
        """Turn after turn, as far as `data.max_length` lets it go on."""
        spec = self.fit.spec
        turns: list[Turn] = []
        texts: list[str] = []
        for number in range(len(dialogue.users)):
            messages = dialogue.messages(texts)
            with self._tokenizing:
                prompt = self.fit.following(dialogue, texts)
            if prompt is None:
                break
            room = min(spec.max_new_tokens, spec.max_length - len(prompt))
            temperature = 1.0 if spec.regenerate == "sample" else 0.0
            reply = self.endpoint.reply(messages, room, temperature, derive_seed(seed, number))
            with self._tokenizing:
                answer = text_ids(self.fit.tokenizer, reply.text) + (self._closing if reply.ended else [])
            turns.append(Turn(prompt, answer[:room]))
            texts.append(reply.text.strip())
        return join(turns)

    def _wait(self, wait_s: float) -> None:
        if self._stopped.wait(wait_s):
            raise BrokenOffError
