"""report.html: whole, self-contained, escaped; then in a real browser, where there is one."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from coral_core.report import svg
from coral_core.report.page import _read_log, page
from coral_core.report.svg import ticks
from tests.report.example import charts, results, write_log

VOID = {"meta", "input", "br"}


def report(folder: Path, benches: int = 1, methods: int = 1, name: str = "my-model") -> str:
    found = results(benches, methods)
    return page(name, found, charts(found), write_log(folder / "log.jsonl"))


class Balance(HTMLParser):
    """Every tag is closed in order; ids are unique; what attributes point to outside is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize(("benches", "methods"), [(1, 1), (3, 2), (2, 6)])
def test_the_page_is_well_formed_and_asks_for_nothing(tmp_path: Path, benches: int, methods: int) -> None:
    text = report(tmp_path, benches, methods)
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert parser.links == []
    assert not re.search(r"https?:|url\(|@import|<script|javascript:", text)
    assert "default-src 'none'" in text


def test_every_section_is_there_and_every_chart_has_words(tmp_path: Path) -> None:
    text = report(tmp_path, 2, 2)
    assert re.findall(r'<section id="(\w+)"', text) == [
        "results", "depth", "time", "questions", "rows", "training", "answers",
    ]  # fmt: skip
    drawn = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawn) == 4 * 2 + 3
    for chart in drawn:
        root = ElementTree.fromstring(chart)
        assert root.attrib["role"] == "img"
        assert len(root.attrib["aria-label"]) > 10
        assert "nan" not in chart
    assert "coral grouped: 88%, 66%, 41%" in text


def test_marks_stay_inside_their_chart(tmp_path: Path) -> None:
    for chart in re.findall(r"<svg.*?</svg>", report(tmp_path, 1, 3), re.DOTALL):
        root = ElementTree.fromstring(chart)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for mark in root.iter("circle"):
            assert 0 <= float(mark.attrib["cx"]) <= width
            assert 0 <= float(mark.attrib["cy"]) <= height
        for bar in root.iter("rect"):
            assert 0 <= float(bar.attrib["x"]) <= float(bar.attrib["x"]) + float(bar.attrib["width"]) <= width + 0.1


def test_answers_keep_their_words_and_show_where_they_came_from(tmp_path: Path) -> None:
    text = report(tmp_path)
    (said,) = re.findall(r'<p class="said">(.*?)</p>', text, re.DOTALL)
    (sample,) = charts(results())["gsm8k"]["samples"]
    words = "".join(piece for piece, _ in sample["pieces"])
    assert re.sub(r"<[^>]+>", "", said) == escape(words)
    assert '<span class="t d1" data-d="1" title="drafted at depth 1">' in said
    assert '<span class="t d6" data-d="6"' in said
    drafted = sum(depth > 0 for _, depth in sample["pieces"])
    assert f"{drafted} of {len(sample['pieces'])} tokens were drafted" in text


def test_what_models_and_users_write_is_escaped(tmp_path: Path) -> None:
    text = report(tmp_path, name="<script>alert(1)</script>")
    assert "<script" not in text
    assert "&lt;How&gt; much?" in text
    assert "<b>keeps" not in text


def test_the_curve_is_the_last_trainings(tmp_path: Path) -> None:
    """Steps after 100 are there twice, as the training was killed at 150; those of a longer one before not at all."""
    steps = [*range(10, 1610, 10), *range(10, 160, 10), *range(110, 210, 10)]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f'{{"stage": "train", "step": {step}, "loss": 1.0}}\n' for step in steps))
    assert [line["step"] for line in _read_log(log)] == list(range(10, 210, 10))


def test_a_run_without_a_log_says_so(tmp_path: Path) -> None:
    found = results()
    text = page("x", found, charts(found), tmp_path / "none.jsonl")
    assert "This run holds no training log" in text


def test_an_evaluation_with_hardly_anything_in_it(tmp_path: Path) -> None:
    """Answers of one token: no rounds, no speeds."""
    found = results()
    numbers = found["benches"]["gsm8k"]
    empty = ("tokens_per_round_micro", "tokens_per_round_macro", "tokens_per_s", "baseline_tokens_per_s", "speedup")
    numbers |= dict.fromkeys((*empty, "plain_tokens_per_s", "speedup_ci95", "speedup_mean", "speedup_mean_ci95"))
    numbers |= {"rounds": 0, "accepted_by_depth": [], "seconds_by_phase": {"other": 0.0}}
    nothing = {"gsm8k": {"speedups": {found["method"]: {}}, "samples": []}}
    parser = Balance()
    parser.feed(page("x", found, nothing, tmp_path / "none.jsonl"))
    assert parser.open == []


def test_counted_axes_have_whole_ticks() -> None:
    chart = svg.per_question({"m": {"a": 1.2, "b": 0.9}}, "two questions")
    bottom = re.findall(r'text-anchor="middle">([\d.]+)</text>', chart)
    assert bottom == ["1", "2"]


def test_ticks_are_round_and_span() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0, 23.7) == [0, 5, 10, 15, 20, 25]
    assert ticks(0, 0) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(3, 7) == [3, 4, 5, 6, 7]


# ---- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync --hide-scrollbars"
PROBE = """<!doctype html><meta charset="utf-8"><iframe id="f" style="border:0;width:{width}px;height:900px"></iframe>
<pre id="out">nothing</pre><script>
const frame = document.getElementById("f");
frame.onload = () => {{
  const page = frame.contentDocument, view = frame.contentWindow;
  const lum = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const ratio = (a, b) => {{ const [x, y] = [lum(a), lum(b)].sort((m, n) => n - m); return (x + .05) / (y + .05); }};
  const over = (top, base) => {{ const t = top.match(/[\\d.]+/g).map(Number), b = base.match(/[\\d.]+/g).map(Number);
    const a = t.length > 3 ? t[3] : 1;
    return "rgb(" + [0, 1, 2].map(i => t[i] * a + b[i] * (1 - a)).join(",") + ")"; }};
  const card = view.getComputedStyle(page.querySelector("section")).backgroundColor;
  const style = query => view.getComputedStyle(page.querySelector(query));
  const wide = [...page.querySelectorAll("section, figure, svg, .answer, .tile")]
    .filter(e => e.getBoundingClientRect().right > {width} + .5).length;
  document.getElementById("out").textContent = JSON.stringify({{
    overflow: page.documentElement.scrollWidth - {width}, wide,
    text: ratio(style("body").color, card), soft: ratio(style(".hint").color, card),
    deepest: ratio(style(".d6").color, over(style(".d6").backgroundColor, card)),
    tick: ratio(style("svg .tick").fill, card), dot: ratio(style(".s0").color, card),
    dark: lum(card) < .2, letters: page.querySelector("svg").getBoundingClientRect().width / 360 * 12,
    charts: page.querySelectorAll("svg").length,
    requests: view.performance.getEntriesByType("resource").length}});
}};
frame.srcdoc = {page};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the report was not looked at in a browser")
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1200, False)])
def test_in_a_browser(tmp_path: Path, width: int, dark: bool) -> None:
    """Nothing wider than the screen, every text readable on its ground, letters of charts large enough, no request."""
    text = report(tmp_path, 2, 2)
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(width=width, page=json.dumps(text).replace("</", "<\\/")), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [CHROMIUM, *QUIET.split(), scheme, f"--user-data-dir={tmp_path / 'user'}", "--virtual-time-budget=4000"]
    done = subprocess.run(
        [*command, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    (found,) = re.findall(r'<pre id="out">(.*?)</pre>', done.stdout)
    seen = json.loads(found)
    assert seen["overflow"] <= 0
    assert seen["wide"] == 0
    assert seen["dark"] == dark
    assert min(seen[key] for key in ("text", "soft", "deepest", "tick")) >= 4.5, seen  # WCAG 2.2, AA
    assert seen["dot"] >= 3, seen
    assert seen["letters"] >= 10, seen
    assert seen["charts"] == 11
    assert seen["requests"] == 0
