"""One thread that decodes for everybody: a round of all active requests at a time, the others wait in line.

A model has one device, so more threads would gain nothing; a round of several costs little more than a round of one.
Requests join and leave between rounds, and a short answer does not wait for a long one.
"""

import dataclasses
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from coral_core.decoding.rounds import Round
from coral_core.decoding.seat import Seat
from coral_core.decoding.table import Table
from coral_core.serve.answer import Answer, Piece

log = logging.getLogger("coral.serve")
CLOSE_S = 2.0
"""How long the end of the server waits for the round under way."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """The last thing a job's owner is told."""

    error: Exception | None = None


class FullError(Exception):
    """As many jobs wait as may, or the worker is closing."""


@dataclasses.dataclass(eq=False)
class Job:
    """An answer, and whom to tell what came of each round. `tell` runs in the worker's thread and must not block."""

    answer: Answer
    tell: Callable[[Any], None]
    cancelled: bool = False


class OneThread:
    """A thread that does what it is given, one thing after the other. It ends with the process.

    What loads a model should decode with it: each thread that computes gets OpenMP's helpers of its own, and with more
    of these than cores they sleep between operations. On two cores answers of SmolLM2-135M took 1.5 times as long in
    a second thread, and 1.1 times where the first had not computed.
    """

    def __init__(self) -> None:
        self._given: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="coral-worker", daemon=True).start()

    def submit(self, function: Callable[[], Any]) -> "Future[Any]":
        """What the function returns or raises, once it has been called."""
        found: Future[Any] = Future()
        self._given.put((function, found))
        return found

    def _run(self) -> None:
        while True:
            function, found = self._given.get()
            try:
                found.set_result(function())
            except Exception as error:  # noqa: BLE001 (whoever asked is told)
                found.set_exception(error)
            del function, found  # and what they hold, while there is nothing to do


class Worker:
    """Decodes for as many jobs as `table` has places while at most `waiting` wait; used from any thread."""

    def __init__(self, thread: OneThread, table: Callable[[], Table], active: int, waiting: int) -> None:
        """`table` makes one with `active` places; it is dropped with its caches when nobody is left."""
        self.new_table, self.most_active, self.most_waiting = table, active, waiting
        self.table: Table | None = None
        self.active: dict[Seat, Job] = {}
        self.joining: Job | None = None
        self.waiting: deque[Job] = deque()
        self.closing = False
        self.changed = threading.Condition()
        self.done = thread.submit(self._run)

    def submit(self, answer: Answer, tell: Callable[[Any], None]) -> Job:
        """Put a job at the end of the line; it is told each round's value, then Ended. Raises FullError."""
        with self.changed:
            free = self.most_active - self.counts()[0]
            if self.closing or len(self.waiting) >= self.most_waiting + max(0, free):
                raise FullError
            job = Job(answer, tell)
            self.waiting.append(job)
            self.changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Give the job's place to the next one; it is told nothing more. A job that has ended is left alone."""
        with self.changed:
            job.cancelled = True
            if job in self.waiting:
                self.waiting.remove(job)

    def counts(self) -> tuple[int, int]:
        """Jobs that are active, and jobs that wait."""
        return len(self.active) + (self.joining is not None), len(self.waiting)

    def close(self) -> None:
        """End after the round under way; jobs that are left are told so. Where it takes long, as a long prompt may, the
        thread is left to end with the process."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        wait([self.done], CLOSE_S)

    def _run(self) -> None:
        while self._wait():
            while (job := self._next()) is not None:
                self._join(job)
            for seat in [seat for seat, job in self.active.items() if job.cancelled]:
                self._leave(seat)
            if self.active:
                self._round()
        self.table = None
        for job in (*self.active.values(), *self.waiting):
            self._tell(job, Ended(FullError()))

    def _wait(self) -> bool:
        """Wait for work; False when the worker closes."""
        if not self.active:
            self.table = None  # an idle worker holds no caches
        with self.changed:
            while not (self.closing or self.active or self.waiting):
                self.changed.wait()
            return not self.closing

    def _next(self) -> Job | None:
        """The next in line, if there is a place for it."""
        with self.changed:
            free = len(self.active) < self.most_active and not self.closing
            self.joining = self.waiting.popleft() if self.waiting and free else None
            return self.joining

    def _join(self, job: Job) -> None:
        """Read a request's prompt. What fails here ends this job and no other."""
        try:
            request, opened = job.answer.open()
            self._tell(job, opened)
            if request is None or job.cancelled:
                self._tell(job, Ended())
                return
            self.table = self.table or self.new_table()
            seat, event = self.table.sit(request)
            self.active[seat] = job
        except Exception as error:
            log.exception("an answer failed")
            self._tell(job, Ended(error))
            return
        finally:
            self.joining = None
        self._heard(seat, event)

    def _round(self) -> None:
        """One round of all active jobs. A bug in it ends them all: nobody knows what their caches hold."""
        assert self.table is not None
        try:
            events = self.table.step()
        except Exception as error:
            log.exception("a round failed")
            ended, self.active, self.table = list(self.active.values()), {}, None
            for job in ended:
                self._tell(job, Ended(error))
            return
        for seat, event in events:
            self._heard(seat, event)

    def _heard(self, seat: Seat, event: Round) -> None:
        """Tell a job's owner of its round. A bug in one answer must not stop the others."""
        job, last = self.active[seat], seat.stop.done
        value: Piece | Ended
        try:
            value, done = (Ended(seat.error), True) if seat.error else job.answer.feed(event, last)
        except Exception as error:
            log.exception("an answer failed")
            value, done = Ended(error), True
        self._tell(job, value)
        if done or last:
            if not isinstance(value, Ended):
                self._tell(job, Ended())
            self._leave(seat)

    def _leave(self, seat: Seat) -> None:
        del self.active[seat]
        if self.table is not None and seat in self.table.seats:
            self.table.leave(seat)

    def _tell(self, job: Job, value: Any) -> None:
        if not job.cancelled:
            job.tell(value)
