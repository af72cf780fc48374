"""The page of results and the README's table say what the files say."""

import pytest

from benchmarks import page
from tests.benchmarks.test_real import row


def test_the_page_is_of_todays_files():
    assert (page.ROOT / "docs" / "results.md").read_text(encoding="utf-8") == page.results_page(), (
        "run: python -m benchmarks.page"
    )


def test_the_readmes_table_is_of_todays_file():
    text = (page.ROOT / "README.md").read_text(encoding="utf-8")
    assert all(page.BEGIN.format(name) in text for name in page.TABLES)
    assert text == page.readme(text), "run: python -m benchmarks.page"


def test_every_file_of_results_is_on_the_page():
    assert {path.stem for path in page.RESULTS.glob("*.json")} <= page.ABOUT.keys()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.98765, "0.9877"), (12345.6, "12,346"), ([1.02, 1.05], "[1.02, 1.05]"), (True, "True"), (3, "3")],
)
def test_numbers_are_rounded(value, shown):
    assert page.text(value) == shown


def test_a_table_typed_by_hand_is_replaced():
    begin = page.BEGIN.format("pico")
    table = page.pico_table(page.load("pico")["rows"])
    assert page.readme(f"a\n{begin}\ntau 9\n{page.END}\nb\n") == f"a\n{begin}\n{table}\n{page.END}\nb\n"


def test_the_table_of_real_models():
    rows = [real_row("mt-bench", "a"), real_row("gsm8k", "b")]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.real_table(rows).splitlines()[2:]]
    assert lines == [
        ["SmolLM2-135M", "0", "CORAL, full head", "4.00, 1.67x", "4.00, 1.67x"],
        ["SmolLM2-135M", "0", "CORAL, grouped head", "3.00, 2.50x", "3.00, 2.50x"],
    ], "tau of the fixed tree; the speed of the tree that pays over the fastest plain lane, 60 tokens in 5 s"


def test_a_method_has_a_line_for_each_temperature_and_one_for_all_seeds():
    warm = row("gsm8k", "b", temperature=1.0)
    warm["lanes"]["coral full fixed float32"]["rounds"] = 30
    cold = row("gsm8k", "a")
    for one in (cold, warm):
        one["lanes"]["hass full auto float32"] = one["lanes"]["coral full auto float32"]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.real_table([cold, warm]).splitlines()]
    assert [(line[1], line[2], line[3].partition(",")[0]) for line in lines[2:]] == [
        ("0", "HASS, full head", "3.75"),
        ("0", "CORAL, full head", "4.00"),
        ("0", "CORAL, grouped head", "3.00"),
        ("1", "HASS, full head", "3.75"),
        ("1", "CORAL, full head", "2.00"),
        ("1", "CORAL, grouped head", "3.00"),
    ]


def real_row(bench, question):
    found = row(bench, question)
    found["lanes"] = {name: lane for name, lane in found["lanes"].items() if not name.startswith("hass")}
    return found


def test_nested_figures_have_dotted_names():
    assert page.flat({"tau": {"coral": 3.5}, "gain": 1.25}) == [("tau.coral", "3.5"), ("gain", "1.25")]
