"""Charts as SVG text: lines, stacked bars, a dot per question, points. Colours come from the page's style sheet.

A chart is 360 units wide, about a phone's width, so that its 12-unit letters stay readable there; a page sets several
side by side where it is wider. Every mark carries its numbers as a tooltip, every chart a sentence for screen readers.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 360.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 14.0, 26.0, 38.0
BAR, GAP = 20.0, 30.0
"""Height of a horizontal bar, and of the label above it with its margin."""

Point = tuple[float, float]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        high = low + 1.0
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def lines(series: Mapping[str, Sequence[Point]], labels: tuple[str, str], told: str, *, percent: bool = False) -> str:
    """One line per series, with a dot at each point where there are few. `labels` name the axes."""
    points = [point for line in series.values() for point in line]
    frame = _Frame(points, told, labels, floor=0.0, ceiling=1.0 if percent else None, percent=percent)
    marks = []
    for number, (name, line) in enumerate(series.items()):
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line)
        marks.append(f'<polyline class="line s{number % 6}" points="{path}"/>')
        if len(line) <= 20:
            marks += [
                _dot(frame.x(x), frame.y(y), f"s{number % 6}", f"{name}: {frame.said(y)} at {labels[0]} {x:g}")
                for x, y in line
            ]
    return frame.drawn(marks)


def points(series: Mapping[str, Point], labels: tuple[str, str], told: str, *, limit: tuple[float, str]) -> str:
    """One point per series, and an upright line at the largest x there can be."""
    most, name = limit
    frame = _Frame([*series.values(), (0.0, 1.0), (most, 1.0)], told, labels, floor=0.0)
    marks = [
        _rule(frame.x(most), TOP, frame.x(most), HEIGHT - BOTTOM, "one"),
        _tick(frame.x(most) - 5, HEIGHT - BOTTOM - 6, name, "end"),
    ]
    for number, (method, (x, y)) in enumerate(series.items()):
        said = f"{method}: {frame.said(y)} at {x:,.0f}"
        marks.append(_dot(frame.x(x), frame.y(y), f"s{number % 6}", said, radius=5.5))
    return frame.drawn(marks)


def per_question(series: Mapping[str, Mapping[str, float]], told: str) -> str:
    """A dot per question, each series sorted by its own value, with a line at 1: above it drafting paid."""
    longest = max((len(values) for values in series.values()), default=1)
    everything = [(1.0, 1.0), (float(max(2, longest)), 1.0)]
    everything += [(1.0, value) for values in series.values() for value in values.values()]
    frame = _Frame(everything, told, ("questions, slowest first", "speedup"), floor=0.0)
    marks = [
        _rule(LEFT, frame.y(1), WIDTH - RIGHT, frame.y(1), "one"),
        _tick(WIDTH - RIGHT, frame.y(1) + 15, "plain = 1×", "end"),
    ]
    for number, (method, values) in enumerate(series.items()):
        for place, (question, value) in enumerate(sorted(values.items(), key=lambda pair: pair[1]), start=1):
            said = f"{method}, question {question}: {value:.2f}×"
            marks.append(_dot(frame.x(place), frame.y(value), f"s{number % 6}", said, radius=3.5))
    return frame.drawn(marks)


def stacked(bars: Sequence[tuple[str, dict[str, float], float]], told: str) -> str:
    """Horizontal bars of (label, milliseconds by phase, a mark: plain decoding's milliseconds for the same tokens)."""
    longest = max((max(sum(parts.values()), mark) for _, parts, mark in bars), default=1.0)
    axis = ticks(0.0, longest)
    height = 8 + len(bars) * (BAR + GAP) + BOTTOM
    inner = WIDTH - RIGHT - 8

    def x(value: float) -> float:
        return 8 + inner * max(0.0, value) / axis[-1]

    base = height - BOTTOM
    found = [_rule(x(value), 8, x(value), base, "grid") + _tick(x(value), base + 15, f"{value:g}") for value in axis]
    for number, (label, parts, mark) in enumerate(bars):
        top = 8 + number * (BAR + GAP) + 18
        found.append(f'<text class="label" x="8" y="{top - 5:.1f}">{escape(label)}</text>')
        begun = 0.0
        for place, (phase, spent) in enumerate(parts.items()):
            if spent > 0:
                found.append(
                    f'<rect class="bar p{place % 6}" x="{x(begun):.1f}" y="{top:.1f}" width="{x(spent) - 8:.1f}" '
                    f'height="{BAR}"><title>{escape(f"{label}: {phase} {spent:.2f} ms")}</title></rect>'
                )
                begun += spent
        if mark:
            said = escape(f"{label}: plain decoding takes {mark:.2f} ms for as many tokens")
            found.append(
                f'<g class="mark"><title>{said}</title>{_rule(x(mark), top - 4, x(mark), top + BAR + 4, "same")}</g>'
            )
    found.append(f'<text class="axis" x="{WIDTH / 2}" y="{height - 5}" text-anchor="middle">ms of one round</text>')
    return _svg(height, told, found)


class _Frame:
    """Axes with their ticks, and the scales that place a point between them."""

    def __init__(
        self,
        points: Iterable[Point],
        told: str,
        labels: tuple[str, str],
        *,
        floor: float | None = None,
        ceiling: float | None = None,
        percent: bool = False,
    ) -> None:
        xs, ys = zip(*points, strict=True) if (points := list(points)) else ((0.0, 1.0), (0.0, 1.0))
        low, high = (min(ys) if floor is None else floor), (max(ys) if ceiling is None else ceiling)
        self.told, self.labels, self.percent = told, labels, percent
        counted = all(x == int(x) for x in xs)  # a question and a half is nobody's place
        self.x_ticks = [
            value
            for value in ticks(min(xs), max(xs))
            if min(xs) <= value <= max(xs) and (value % 1 == 0 or not counted)
        ] or [min(xs)]
        self.y_ticks = ticks(low, high)
        self.x_ends = (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1)

    def x(self, value: float) -> float:
        """Places a value from left to right."""
        low, high = self.x_ends
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Places a value from bottom to top."""
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def said(self, value: float) -> str:
        """A value of the vertical axis in words."""
        return f"{value:.0%}" if self.percent else f"{value:.3g}"

    def drawn(self, marks: Sequence[str]) -> str:
        """The whole chart."""
        base = HEIGHT - BOTTOM
        grid = [_rule(LEFT, self.y(value), WIDTH - RIGHT, self.y(value), "grid") for value in self.y_ticks]
        names = [_tick(LEFT - 6, self.y(value) + 4, self.said(value), "end") for value in self.y_ticks]
        names += [_tick(self.x(value), base + 15, f"{value:,g}") for value in self.x_ticks]
        titles = [
            f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">'
            f"{escape(self.labels[0])}</text>",
            f'<text class="axis" x="0" y="11">{escape(self.labels[1])}</text>',
        ]
        return _svg(HEIGHT, self.told, [*grid, *names, *titles, *marks])


def _svg(height: float, told: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(told)}">'
    return head + "".join(parts) + "</svg>"


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _tick(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _dot(x: float, y: float, kind: str, said: str, radius: float = 4.0) -> str:
    return f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(said)}</title></circle>'
