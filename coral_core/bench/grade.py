"""Are the answers right? GSM8K by the last number, HumanEval by its tests (pass@1, one answer per question).

Graded apart for every lane: at temperature 0 plain and drafted answers must come out the same.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from coral_core.bench.questions import Question
from coral_core.bench.race import PLAIN, Turn
from coral_core.bench.sandbox import runs_through

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_FENCE = re.compile(r"```[ \t]*\w*[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Graded:
    """How many answers of each lane are right."""

    metric: str
    checked: int
    right: dict[str, int]
    """Per lane."""

    def of(self, method: str) -> dict[str, Any]:
        """{metric, checked, plain, speculative}: right answers, plain and of one method."""
        return {
            "metric": self.metric,
            "checked": self.checked,
            "plain": self.right[PLAIN],
            "speculative": self.right[method],
        }


def grade(
    questions: Sequence[Question], raced: Sequence[Sequence[Turn]], text: Callable[[list[int]], str], *, run_code: bool
) -> Graded | None:
    """Grade the first answers to the questions that can be graded; None when none can.

    `text` turns ids into words. HumanEval's programs are run, in sandbox.py, only with `run_code`. A question's equal
    answers are graded once, so that a program at the edge of its time cannot part them.
    """
    right: dict[str, int] = {}
    metrics: list[str] = []
    for question, turns in zip(questions, raced, strict=True):
        metric = _metric(question, run_code=run_code)
        if metric is None or not turns:
            continue
        metrics.append(metric)
        answers = {lane: text(decoded.ids) for lane, decoded in turns[0].lanes.items()}
        verdicts = {answer: _right(question, answer) for answer in set(answers.values())}
        for lane, answer in answers.items():
            right[lane] = right.get(lane, 0) + verdicts[answer]
    return Graded(" and ".join(sorted(set(metrics))), len(metrics), right) if metrics else None


def _metric(question: Question, *, run_code: bool) -> str | None:
    if question.reference:
        return "exact match"
    return "pass@1" if question.tests and run_code else None


def _right(question: Question, answer: str) -> bool:
    if question.reference:
        return exact_match(answer, question.reference)
    return runs_through(program(question, answer))


def exact_match(answer: str, reference: str) -> bool:
    """Whether the number after ####, or else the last number, is the same in both."""
    wanted = final_number(reference)
    return wanted is not None and final_number(answer) == wanted


def final_number(text: str) -> Decimal | None:
    """The first number after the last ####; without that mark the last number; None without any. 1,000.50 is one."""
    before, mark, after = text.rpartition("####")
    found = _NUMBER.findall(after)
    if not found:
        found = _NUMBER.findall(before)
        mark = ""
    if not found:
        return None
    try:
        return Decimal((found[0] if mark else found[-1]).replace(",", ""))
    except InvalidOperation:
        return None


def program(question: Question, answer: str) -> str:
    """The answer as a program that checks itself: the first fenced block, or all of it.

    A block that defines the function stands for itself, after what the prompt has before the function (its imports);
    any other goes on where the prompt stops.
    """
    prompt = question.turns[0]
    fenced = _FENCE.search(answer)
    code = fenced.group(1) if fenced else answer
    definition = re.compile(rf"^def\s+{re.escape(question.entry_point)}\b", re.MULTILINE)
    if definition.search(code):
        begun = definition.search(prompt)
        code = (prompt[: begun.start()] if begun else "") + code
    else:
        code = prompt + code
    return f"{code}\n\n{question.tests}\n\ncheck({question.entry_point})\n"
