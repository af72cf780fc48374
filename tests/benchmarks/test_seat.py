"""Two checkouts in turns: what a worker answers, and what is made of it."""

from benchmarks.seat import ROOT, Checkout, figures


def test_a_checkout_answers_alike_with_and_without_exact_forwards() -> None:
    with Checkout(ROOT) as checkout:
        assert checkout.lanes == ["", "not exact"]
        answers = [checkout.answer(lane, [3, 632, 16, 465], 6) for lane in checkout.lanes]
    assert answers[0]["ids"] == answers[1]["ids"]
    assert len(answers[0]["ids"]) == 6
    assert all(answer["seconds"] > 0 for answer in answers)


def test_only_equal_answers_are_compared() -> None:
    rows = [
        {"prompt": prompt, "turn": 0, "lane": lane, "seconds": seconds, "tokens": 10, "equal_to_old": equal}
        for prompt, lane, seconds, equal in (
            *((0, "old", 2.0, True), (0, "new", 1.0, True)),
            *((1, "old", 2.0, True), (1, "new", 8.0, False)),
        )
    ]
    assert figures(rows) == {"tokens_per_s": {"old": 5.0, "new": 20 / 9}, "new over old": 2.0}
