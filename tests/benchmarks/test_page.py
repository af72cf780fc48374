"""The page of results and the README's table say what the files say."""

import pytest

from benchmarks import page


def test_the_page_is_of_todays_files():
    assert (page.ROOT / "docs" / "results.md").read_text(encoding="utf-8") == page.results_page(), (
        "run: python -m benchmarks.page"
    )


def test_the_readmes_table_is_of_todays_file():
    text = (page.ROOT / "README.md").read_text(encoding="utf-8")
    assert page.BEGIN in text
    assert text == page.readme(text), "run: python -m benchmarks.page"


def test_every_file_of_results_is_on_the_page():
    assert {path.stem for path in page.RESULTS.glob("*.json")} <= page.ABOUT.keys()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.98765, "0.9877"), (12345.6, "12,346"), ([1.02, 1.05], "[1.02, 1.05]"), (True, "True"), (3, "3")],
)
def test_numbers_are_rounded(value, shown):
    assert page.text(value) == shown


def test_nested_figures_have_dotted_names():
    assert page.flat({"tau": {"coral": 3.5}, "gain": 1.25}) == [("tau.coral", "3.5"), ("gain", "1.25")]
