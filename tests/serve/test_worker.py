"""Rounds, the line, leaving, failing and closing, with a table that computes nothing."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from coral_core.decoding.rounds import Round
from coral_core.serve.worker import Ended, FullError, OneThread, Worker


@dataclasses.dataclass(eq=False)
class Place:
    """A seat that ends after so many rounds."""

    name: str
    left: int
    error: None = None

    @property
    def stop(self) -> Any:
        return self

    @property
    def done(self) -> bool:
        return self.left == 0


class Story:
    """What a worker's jobs were told, in order. It is the table too: rounds are done as the gate lets them."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.gate = threading.Semaphore(0)
        self.seats: list[Place] = []
        self.companies: list[str] = []

    def sit(self, place: Place) -> tuple[Place, Round]:
        self.seats.append(place)
        return place, Round([0], "prefill")

    def step(self) -> list[tuple[Place, Round]]:
        self.gate.acquire()
        self.companies.append("".join(seat.name for seat in self.seats))
        now = list(self.seats)
        for seat in now:
            seat.left -= 1
            if seat.done:
                self.leave(seat)
        return [(seat, Round([1], "draft")) for seat in now]

    def leave(self, seat: Place) -> None:
        self.seats.remove(seat)

    def tell(self, name: str) -> Any:
        return lambda value: self.told.append((name, value))

    def until(self, name: str) -> list[Any]:
        """What `name` was told, once it has ended."""
        deadline = time.monotonic() + 60
        while not any(who == name and isinstance(value, Ended) for who, value in self.told):
            assert time.monotonic() < deadline, self.told
            time.sleep(0.001)
        return [value for who, value in self.told if who == name]


@dataclasses.dataclass
class Answer:
    """Tells the kinds of its rounds; fails, or is done, where it is told to."""

    name: str
    rounds: int = 99
    fails_at: int = -1
    done_at: int = -1
    fed: int = 0

    def open(self) -> tuple[Any, str]:
        return (Place(self.name, self.rounds) if self.rounds else None), "opened"

    def feed(self, event: Round, last: bool) -> tuple[str, bool]:
        self.fed += 1
        if self.fed == self.fails_at:
            raise ValueError("a bug")
        return event.kind, self.fed == self.done_at


@pytest.fixture
def story() -> Story:
    return Story()


@pytest.fixture
def worker(story: Story) -> Iterator[Worker]:
    worker = Worker(OneThread(), lambda: story, active=2, waiting=2)  # type: ignore[arg-type, return-value]
    yield worker
    story.gate.release(999)
    if not worker.done.done():
        worker.close()


def started(worker: Worker, story: Story, answer: Answer) -> Any:
    """A job whose first round is under way and waits at the gate."""
    job = worker.submit(answer, story.tell(answer.name))
    while not story.seats:
        time.sleep(0.001)
    return job


def test_active_jobs_share_rounds_and_the_next_in_line_takes_a_free_place(worker: Worker, story: Story) -> None:
    started(worker, story, Answer("a", 4))
    for answer in (Answer("b", 1), Answer("c", 2)):
        worker.submit(answer, story.tell(answer.name))
    story.gate.release(4)
    assert story.until("a") == ["opened", "prefill", *["draft"] * 4, Ended()]
    assert story.until("b") == ["opened", "prefill", "draft", Ended()]
    assert story.until("c") == ["opened", "prefill", "draft", "draft", Ended()]
    assert story.companies == ["a", "ab", "ac", "ac"]
    while worker.counts() != (0, 0):
        time.sleep(0.001)


def test_a_full_line_refuses_and_a_job_that_leaves_it_frees_its_place(worker: Worker, story: Story) -> None:
    started(worker, story, Answer("a"))
    waiting = [worker.submit(Answer(name, 1), story.tell(name)) for name in "bcd"]
    with pytest.raises(FullError):
        worker.submit(Answer("e", 1), story.tell("e"))
    worker.cancel(waiting[1])
    worker.submit(Answer("e", 1), story.tell("e"))
    story.gate.release(99)
    for name in "abde":
        story.until(name)
    assert {name for name, _ in story.told} == {"a", "b", "d", "e"}


def test_a_job_that_is_left_is_told_nothing_more(worker: Worker, story: Story) -> None:
    job = started(worker, story, Answer("a"))
    worker.cancel(job)
    told = len(story.told)
    worker.submit(Answer("b", 1), story.tell("b"))
    story.gate.release(2)
    story.until("b")
    assert {name for name, _ in story.told[told:]} == {"b"}
    assert story.companies == ["a", "b"]


def test_an_error_ends_its_job_and_no_other(worker: Worker, story: Story, caplog: pytest.LogCaptureFixture) -> None:
    started(worker, story, Answer("a", 3))
    worker.submit(Answer("b", fails_at=2), story.tell("b"))
    story.gate.release(3)
    assert str(story.until("b")[-1].error) == "a bug" and "a bug" in caplog.text
    assert story.until("a") == ["opened", "prefill", "draft", "draft", "draft", Ended()]


def test_an_answer_may_be_done_before_its_last_round_or_need_none(worker: Worker, story: Story) -> None:
    started(worker, story, Answer("a", done_at=2))
    worker.submit(Answer("b", 0), story.tell("b"))
    story.gate.release()
    assert story.until("a") == ["opened", "prefill", "draft", Ended()]
    assert story.until("b") == ["opened", Ended()]
    assert story.seats == []


def test_a_bug_in_a_round_ends_those_that_shared_it(worker: Worker, story: Story, monkeypatch: Any) -> None:
    started(worker, story, Answer("a"))
    monkeypatch.setattr(story, "leave", None)  # what a round does when an answer ends
    worker.submit(Answer("b", 1), story.tell("b"))
    story.gate.release(2)
    for name in "ab":
        assert isinstance(story.until(name)[-1].error, TypeError)


def test_closing_tells_everybody_and_takes_nobody(worker: Worker, story: Story) -> None:
    started(worker, story, Answer("a"))
    for name in "bc":
        worker.submit(Answer(name, 1), story.tell(name))
    closing = threading.Thread(target=worker.close)
    closing.start()
    while not worker.closing:
        time.sleep(0.001)
    story.gate.release()
    closing.join(timeout=60)
    ended = [(name, type(value.error)) for name, value in story.told if isinstance(value, Ended)]
    assert sorted(ended) == [(name, FullError) for name in "abc"]
    with pytest.raises(FullError):
        worker.submit(Answer("d", 1), story.tell("d"))
    assert worker.done.done()


def test_closing_does_not_wait_for_a_long_round(worker: Worker, story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coral_core.serve.worker.CLOSE_S", 0.1)
    started(worker, story, Answer("a"))
    closing = threading.Thread(target=worker.close, daemon=True)
    closing.start()
    closing.join(timeout=5)
    assert not closing.is_alive() and not worker.done.done()
