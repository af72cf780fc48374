"""Markdown tables that fit the terminal: a table that is too wide is shown as one block of lines for each of its rows.

A file or a pipe gets the table as it is.
"""

import textwrap


def fitted(text: str, width: int) -> str:
    """The text, each Markdown table wider than `width` characters as blocks, and long lines wrapped at words."""
    out: list[str] = []
    lines = text.split("\n")
    while lines:
        if not lines[0].startswith("|"):
            line = lines.pop(0)
            out += textwrap.wrap(line, width) if len(line) > width else [line]
            continue
        size = next((number for number, line in enumerate(lines) if not line.startswith("|")), len(lines))
        rows, lines = lines[:size], lines[size:]
        out += rows if max(map(len, rows)) <= width else _blocks(rows, width)
    return "\n".join(out)


def _blocks(rows: list[str], width: int) -> list[str]:
    """A block for each row: its first cell, then a line for each further cell that says something."""
    header, _, *body = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    left = max(map(len, header[1:]), default=0)
    out: list[str] = []
    for number, (name, *cells) in enumerate(body):
        out += [""] * (number > 0) + textwrap.wrap(f"{header[0]} {name}".strip(), width)
        for title, cell in zip(header[1:], cells, strict=True):
            if cell:
                indent = " " * min(left + 4, width // 2)
                out += textwrap.wrap(f"  {title:<{left}}  {cell}", width, subsequent_indent=indent)
    return out
