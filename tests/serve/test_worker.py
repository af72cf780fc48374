"""Turns, the line, leaving, failing and closing, with jobs that compute nothing."""

import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from coral_core.serve.worker import Ended, FullError, Worker


class Story:
    """What a worker's jobs were told, in order; jobs take steps as they are let."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.closed: list[str] = []
        self.gate = threading.Semaphore(0)

    def job(self, name: str, steps: int, gated: bool = False) -> Generator[int, None, None]:
        try:
            for step in range(steps):
                if gated:
                    self.gate.acquire()
                yield step
        finally:
            self.closed.append(name)

    def tell(self, name: str) -> Any:
        return lambda value: self.told.append((name, value))

    def until(self, count: int) -> list[tuple[str, Any]]:
        """The first `count` things told."""
        deadline = time.monotonic() + 10
        while len(self.told) < count:
            assert time.monotonic() < deadline, self.told
            time.sleep(0.001)
        return self.told


@pytest.fixture
def story() -> Story:
    return Story()


def started(worker: Worker, story: Story, name: str, steps: int = 99) -> Any:
    """A job whose first step is under way and waits at the gate."""
    job = worker.submit(story.job(name, steps, gated=True), story.tell(name))
    while worker.current is None:
        time.sleep(0.001)
    return job


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker(active=2, waiting=2)
    yield worker
    if worker.thread.is_alive():
        worker.close()


def test_active_jobs_take_turns_and_the_next_in_line_takes_a_free_place(worker: Worker, story: Story) -> None:
    started(worker, story, "a", 3)
    for name, steps in (("b", 1), ("c", 2)):
        worker.submit(story.job(name, steps), story.tell(name))
    story.gate.release(3)
    steps = [(name, value) for name, value in story.until(9) if not isinstance(value, Ended)]
    assert steps == [("a", 0), ("b", 0), ("a", 1), ("a", 2), ("c", 0), ("c", 1)]
    assert story.told.count(("b", Ended())) == 1
    assert worker.counts() == (0, 0)


def test_a_full_line_refuses_and_a_job_that_leaves_it_frees_its_place(worker: Worker, story: Story) -> None:
    started(worker, story, "a")
    waiting = [worker.submit(story.job(name, 1), story.tell(name)) for name in "bcd"]
    with pytest.raises(FullError):
        worker.submit(story.job("e", 1), story.tell("e"))
    worker.cancel(waiting[1])
    worker.submit(story.job("e", 1), story.tell("e"))
    story.gate.release(99)
    told = story.until(99 + 1 + 3 * 2)
    assert {name for name, _ in told} == {"a", "b", "d", "e"}


def test_a_job_that_is_left_is_closed_and_told_nothing_more(worker: Worker, story: Story) -> None:
    job = started(worker, story, "a")
    worker.cancel(job)
    story.gate.release()
    worker.submit(story.job("b", 1), story.tell("b"))
    assert story.until(2) == [("b", 0), ("b", Ended())]
    assert story.closed == ["a", "b"]


def test_an_error_ends_its_job_and_no_other(worker: Worker, story: Story, caplog: pytest.LogCaptureFixture) -> None:
    def failing() -> Generator[int, None, None]:
        yield 0
        raise ValueError("a bug")

    started(worker, story, "a", 3)
    worker.submit(failing(), story.tell("b"))
    story.gate.release(3)
    told = story.until(6)
    (error,) = [value.error for name, value in told if name == "b" and isinstance(value, Ended)]
    assert str(error) == "a bug" and "a bug" in caplog.text
    assert [value for name, value in told if name == "a"] == [0, 1, 2, Ended()]


def test_closing_tells_everybody_and_takes_nobody(worker: Worker, story: Story) -> None:
    started(worker, story, "a")
    for name in "bc":
        worker.submit(story.job(name, 1), story.tell(name))
    closing = threading.Thread(target=worker.close)
    closing.start()
    while not worker.closing:
        time.sleep(0.001)
    story.gate.release()
    closing.join(timeout=10)
    ended = [(name, type(value.error)) for name, value in story.told if isinstance(value, Ended)]
    assert sorted(ended) == [(name, FullError) for name in "abc"]
    with pytest.raises(FullError):
        worker.submit(story.job("d", 1), story.tell("d"))
    assert not worker.thread.is_alive()
