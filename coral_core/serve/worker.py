"""One thread that works for everybody: a step of each active job in turn, the others wait in line.

A step of an answer is a round. A model has one device, so more threads would gain nothing; taking turns gives each
client its share, and a short answer does not wait for a long one. Nothing here knows what a job computes.
"""

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

log = logging.getLogger("coral.serve")


@dataclasses.dataclass(frozen=True)
class Ended:
    """The last thing a job's owner is told."""

    error: Exception | None = None


class FullError(Exception):
    """As many jobs wait as may, or the worker is closing."""


@dataclasses.dataclass(eq=False)
class Job:
    """Steps to take, and whom to tell what came of each. `tell` is called in the worker's thread and must not block."""

    steps: Generator[Any, None, None]
    tell: Callable[[Any], None]
    cancelled: bool = False


class Worker:
    """Runs at most `active` jobs in turn while at most `waiting` wait; made in one thread, used from any."""

    def __init__(self, active: int, waiting: int) -> None:
        self.most_active, self.most_waiting = active, waiting
        self.active: deque[Job] = deque()
        self.waiting: deque[Job] = deque()
        self.current: Job | None = None
        self.closing = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="coral-worker", daemon=True)
        self.thread.start()

    def submit(self, steps: Generator[Any, None, None], tell: Callable[[Any], None]) -> Job:
        """Put a job at the end of the line; it is told each step's value, then Ended. Raises FullError."""
        with self.changed:
            free = self.most_active - self.counts()[0]
            if self.closing or len(self.waiting) >= self.most_waiting + max(0, free):
                raise FullError
            job = Job(steps, tell)
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
        return len(self.active) + (self.current is not None), len(self.waiting)

    def close(self) -> None:
        """End after the step under way; jobs that are left are told so."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            if job.cancelled or self._step(job):
                job.steps.close()  # its caches are freed now
                self.current = None
                del job  # an idle worker holds no caches
        for left in (*self.active, *self.waiting):
            left.steps.close()
            self._tell(left, Ended(FullError()))

    def _next(self) -> Job | None:
        """Take a job whose turn it is; None when the worker closes."""
        with self.changed:
            while not (self.closing or self.current or self.active or self.waiting):
                self.changed.wait()
            while self.waiting and self.counts()[0] < self.most_active:
                self.active.append(self.waiting.popleft())
            if self.current is not None:
                self.active.append(self.current)
            self.current = None if self.closing else self.active.popleft()
            return self.current

    def _step(self, job: Job) -> bool:
        """Take one step; whether it was the last. What a job raises ends that job and no other."""
        try:
            value = next(job.steps)
        except StopIteration:
            self._tell(job, Ended())
        except Exception as error:  # a bug in one answer must not stop the others
            log.exception("an answer failed")
            self._tell(job, Ended(error))
        else:
            self._tell(job, value)
            return False
        return True

    def _tell(self, job: Job, value: Any) -> None:
        if not job.cancelled:
            job.tell(value)
