"""The benches that coral knows by name: where their questions are on the Hub, and how a row becomes a question.

Data sets, files and fields have the names that their pages on the Hub give them. Spec-Bench's tasks come from Red Hat's
copy (RedHatAI/speculator_benchmarks), since its authors' own file is not on the Hub.
"""

import dataclasses
import string
from typing import Any

SPEED_BENCH_MASK = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"
"""SPEED-Bench publishes 494 of its 880 qualitative rows with this in place of text that it may not share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A bench on the Hub."""

    dataset: str
    configuration: str | None = None
    file: str | None = None
    """The one file of the data set to read; None: what the data set itself calls its split."""
    split: str = "test"
    template: str = ""
    """The user's words, with the row's fields in braces; empty: the row's `turns`, `prompt` or `question`."""

    def words(self, row: dict[str, Any]) -> str | None:
        """The user's words after the template; None without one, or where the row lacks one of its fields."""
        fields = [name for _, name, _, _ in string.Formatter().parse(self.template) if name]
        if not fields or any(row.get(name) is None for name in fields):
            return None
        return self.template.format(**{name: _text(row[name]) for name in fields}).strip()


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _spec_bench(task: str) -> Published:
    return Published(dataset="RedHatAI/speculator_benchmarks", file=f"{task}.jsonl", split="train")


PUBLISHED: dict[str, Published] = {
    "mt-bench": Published(dataset="HuggingFaceH4/mt_bench_prompts", split="train"),
    "humaneval": Published(dataset="openai/openai_humaneval"),
    "gsm8k": Published(dataset="openai/gsm8k", configuration="main"),
    "math-500": Published(dataset="HuggingFaceH4/MATH-500", template="{problem}"),
    "mbpp": Published(
        dataset="google-research-datasets/mbpp",
        configuration="sanitized",
        template="{prompt}\nYour code should pass these tests:\n{test_list}",
    ),
    "alpaca": Published(dataset="tatsu-lab/alpaca", split="train", template="{instruction}\n{input}"),
    "cnn-dailymail": Published(
        dataset="abisee/cnn_dailymail", configuration="3.0.0", template="Summarize this article.\n\n{article}"
    ),
    "speed-bench": Published(dataset="nvidia/SPEED-Bench", configuration="qualitative"),
    "spec-bench-conversation": _spec_bench("question"),
    "spec-bench-translation": _spec_bench("translation"),
    "spec-bench-summarization": _spec_bench("summarization"),
    "spec-bench-qa": _spec_bench("qa"),
    "spec-bench-math": _spec_bench("math_reasoning"),
    "spec-bench-rag": _spec_bench("rag"),
}
