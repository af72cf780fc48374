"""Markdown tables that fit the terminal: one that is too wide is shown as several with a part of its columns each, or
as a block of lines for each of its rows, whichever is shorter.

A file or a pipe gets the table as it is.
"""

import textwrap


def fitted(text: str, width: int) -> str:
    """The text, each Markdown table wider than `width` characters in parts, and long lines wrapped at words."""
    out: list[str] = []
    lines = text.split("\n")
    while lines:
        if not lines[0].startswith("|"):
            line = lines.pop(0)
            out += textwrap.wrap(line, width) if len(line) > width else [line]
            continue
        size = next((number for number, line in enumerate(lines) if not line.startswith("|")), len(lines))
        rows, lines = lines[:size], lines[size:]
        ways = [rows] if max(map(len, rows)) <= width else [_blocks(rows, width), _tables(rows, width)]
        shortest: list[str] = min((shown for shown in ways if shown), key=len)
        out += shortest
    return "\n".join(out)


def _tables(rows: list[str], width: int) -> list[str]:
    """The table as several, each with its first column and as many others as fit; none where a column does not fit."""
    columns = list(zip(*(row.strip("|").split("|") for row in rows), strict=True))
    sizes = [max(map(len, column)) + 1 for column in columns]
    parts: list[list[int]] = []
    for number in range(1, len(columns)):
        if 1 + sizes[0] + sizes[number] > width:
            return []
        if not parts or 1 + sizes[0] + sum(sizes[other] for other in [*parts[-1], number]) > width:
            parts.append([])
        parts[-1].append(number)
    out: list[str] = []
    for part in parts:
        shown = [
            "|".join(["", columns[0][row], *(columns[number][row] for number in part), ""]) for row in range(len(rows))
        ]
        out += [*([""] if out else []), *shown]
    return out


def _blocks(rows: list[str], width: int) -> list[str]:
    """A block for each row: its first cell, then a line for each further cell. A table of two columns is one block."""
    header, _, *body = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    if len(header) == 2:
        return _block(" ".join(header), [(name, cell) for name, cell in body], width)
    out: list[str] = []
    for number, (name, *cells) in enumerate(body):
        out += [""] * (number > 0)
        out += _block(f"{header[0]} {name}", list(zip(header[1:], cells, strict=True)), width)
    return out


def _block(title: str, pairs: list[tuple[str, str]], width: int) -> list[str]:
    """A title, and below it a line for each pair whose second part says something."""
    left = max((len(name) for name, _ in pairs), default=0)
    indent = " " * min(left + 4, width // 2)
    out = textwrap.wrap(title.strip(), width)
    for name, cell in pairs:
        if cell:
            out += textwrap.wrap(f"  {name:<{left}}  {cell}", width, subsequent_indent=indent)
    return out
