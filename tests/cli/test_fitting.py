"""Tables fit the terminal."""

import pytest

from coral_cli.fitting import fitted

TABLE = """| bench    | method | tau  |
| -------- | ------ | ---: |
| mt-bench | coral  | 3.99 |
| gsm8k    | hass   |    - |"""


def test_a_table_that_fits_stays():
    assert fitted(f"{TABLE}\n\nwords", 40) == f"{TABLE}\n\nwords"


def test_a_wide_table_becomes_a_block_for_each_row():
    assert fitted(TABLE, 24).split("\n") == [
        "bench mt-bench",
        "  method  coral",
        "  tau     3.99",
        "",
        "bench gsm8k",
        "  method  hass",
        "  tau     -",
    ]


def test_a_wide_table_of_many_rows_becomes_tables_with_some_columns_each():
    rows = [f"| group {number} | {number}.1 | {number}.2 | {number}.3 |" for number in range(9)]
    shown = fitted("\n".join(["| groups  | kept | tau | ms  |", "| ------- | ---: | --: | --: |", *rows]), 24).split(
        "\n"
    )
    assert len(shown) == 2 * 11 + 1 and max(map(len, shown)) <= 24
    assert shown[:3] == ["| groups  | kept | tau |", "| ------- | ---: | --: |", "| group 0 | 0.1 | 0.2 |"]
    assert shown[11:15] == ["", "| groups  | ms  |", "| ------- | --: |", "| group 0 | 0.3 |"]


def test_a_table_of_two_columns_is_one_block():
    rows = ["| drafter | a/long/path |", "| --- | ---: |", "| dtype | float32 |", "| made with | torch 2 and others |"]
    assert fitted("\n".join(rows), 26).split("\n") == [
        "drafter a/long/path",
        "  dtype      float32",
        "  made with  torch 2 and",
        "             others",
    ]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_nothing_is_wider_than_the_terminal_and_no_number_is_lost(width):
    cells = [f"{number}.25 [1.00, 9.00]" for number in range(12)]
    header = "| " + " | ".join(f"column {number}" for number in range(12)) + " |"
    text = "\n".join([header, "|" + " --- |" * 12, f"| {' | '.join(cells)} |", "", "a long line " * 20])
    shown = fitted(text, width)
    assert max(map(len, shown.split("\n"))) <= width
    assert all(f"{number}.25" in shown for number in range(12))
