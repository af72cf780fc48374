"""Markdown and LaTeX of an evaluation."""

from coral_core.report.tables import comparison, details, inside, latex, markdown, notes
from tests.report.example import results


def test_the_papers_table_has_a_row_per_method_and_two_columns_per_bench() -> None:
    header, body = comparison(results(benches=2, methods=2))
    assert header == [
        "method",
        "T",
        "gsm8k speedup",
        "gsm8k tau",
        "mt-bench speedup",
        "mt-bench tau",
        "mean speedup",
        "mean tau",
    ]
    assert [row[0] for row in body] == ["coral grouped", "coral full"]
    assert body[0] == ["coral grouped", "0", "1.36x", "3.00", "1.32x", "2.91", "1.34x", "2.96"]


def test_temperatures_are_rows() -> None:
    found = results(benches=1)
    hot = found["benches"]["gsm8k"] | {"temperature": 1.0, "tokens_per_round_micro": 1.5}
    found["benches"] = {"gsm8k T=0": found["benches"]["gsm8k"], "gsm8k T=1": hot}
    header, body = comparison(found)
    assert header == ["method", "T", "gsm8k speedup", "gsm8k tau"]
    assert [row[1] for row in body] == ["0", "1"]
    assert [row[3] for row in body] == ["3.00", "1.50"]


def test_columns_that_say_nothing_are_left_out() -> None:
    found = results()
    assert "method" not in details(found)[0]
    assert "right answers" in details(found)[0]
    found["benches"]["gsm8k"]["answers"] = None
    assert "right answers" not in details(found)[0]
    assert "method" in details(results(methods=2))[0]


def test_a_round_is_shown_by_depth_and_phase() -> None:
    header, body = inside(results())
    row = dict(zip(header, body[0], strict=True))
    assert row["depth 1"] == "88%"
    assert row["verify, ms/round"] == "11.0"  # 6.6 s over 600 rounds
    assert row["prefill, ms/turn"] == "20.0"


def test_markdown_is_a_table_with_definitions() -> None:
    text = markdown(results(2, 2))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "bootstrap 95 % intervals" in text
    assert "plain decoders on every question, tokens/s: plain bfloat16 104.4" in text


def test_micro_and_macro_are_explained_where_they_differ() -> None:
    found = results()
    numbers = found["benches"]["gsm8k"]
    (text,) = [line for line in notes(found) if "macro" in line]
    assert text.startswith("gsm8k, coral grouped: tau is 3.00 micro and 3.10 macro, since answers of many rounds")
    assert "accept fewer tokens" in text
    numbers["tokens_per_round_macro"] = 2.9
    assert any("accept more tokens" in line for line in notes(found))
    numbers["tokens_per_round_macro"] = 3.04
    assert not any("macro" in line for line in notes(found))


def test_a_dash_is_explained_where_there_is_one() -> None:
    found = results()
    assert "nothing to divide" not in markdown(found)
    found["benches"]["gsm8k"] |= {"speedup": None, "speedup_ci95": None}
    assert "-: nothing to divide: no answer of that bench has a second token" in markdown(found)


def test_a_difference_is_told_with_gap_and_rounding() -> None:
    found = results()
    first = {
        "question": "17",
        "turn": 0,
        "position": 4,
        "plain": 9,
        "speculative": 8,
        "logit_gap": 0.031,
        "rounding": 0.06,
        "operation": "before layers.3.self_attn.o_proj",
        "tie": True,
    }
    found["benches"]["gsm8k"]["lossless"] = {"checked": 24, "equal": 23, "ties": 1, "first_divergence": first}
    (text,) = [line for line in notes(found) if "differ" in line]
    assert "1 answers differ from plain, 1 of them at a tie that rounding in float32 decides" in text
    assert "token 5: tokens 9 (plain) and 8 are 0.031 apart, and rounding moves that by 0.06" in text
    assert "with other rows beside it is before layers.3.self_attn.o_proj." in text
    first |= {"operation": None, "tie": False}
    found["benches"]["gsm8k"]["lossless"]["ties"] = 0
    (text,) = [line for line in notes(found) if "differ" in line]
    assert "0 of them at a tie" in text and "this is a bug of coral" in text


def test_a_wrong_distribution_is_loud() -> None:
    found = results()
    found["benches"]["gsm8k"]["distribution"] = {
        "tokens": 320,
        "bins": [1] * 8,
        "chi2": 99.0,
        "p_value": 0.0,
        "ok": False,
    }
    assert any("NOT the target's distribution" in line for line in notes(found))


def test_latex_is_whole_and_escaped() -> None:
    found = results(2, 2)
    found["method"] = "my_run 50% grouped"
    text = latex(found)
    assert r"my\_run 50\% grouped" in text
    assert r"1.36$\times$" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in body[1:]} == {7}
    assert text.count(r"\multicolumn{2}{c}") == 3


def test_rounds_without_the_drafter_are_told() -> None:
    found = results()
    found["benches"]["gsm8k"] |= {"plain_rounds": 30, "copied_rounds": 12}
    told = [line.partition(": ")[2] for line in notes(found) if "of 600 rounds" in line]
    assert told == [
        "30 of 600 rounds were plain steps: drafting did not pay there.",
        "12 of 600 rounds drafted a copy of the text, without the drafter.",
    ]
