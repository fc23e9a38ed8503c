"""Tables on stdout, on top of rich: whole in a pipe, fitted to a terminal. rich is imported only
where something is drawn.
"""

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Columns of a console that is not a terminal: enough for all our tables, so nothing is cut.
PIPE_WIDTH = 400
# A column of text in a table is not shortened below this; and not below the second where columns
# can be printed as headings instead.
TEXT_WIDTH = 12
READABLE_WIDTH = 24


def results_console() -> "Console":
    """Stdout for results: colors on a terminal that has them; in a pipe plain text of any width.

    Text is never interpreted as markup, so values from files can be printed as they are.
    """
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, markup=False, highlight=False)


@dataclass
class Table:
    """The cells of a table; add rows with `add_row`, print it with `print_table`."""

    columns: tuple[str, ...]
    """the headers; a table without a header has columns named \"\""""
    text: Collection[str] = ()
    """columns of text, such as paths and names: left-justified, and shortened where the terminal is
    too narrow; the others hold numbers: right-justified and never shortened"""
    fold: Collection[str] = ()
    """columns of `text` that are continued on the next line instead"""
    rows: list[tuple["str | Text", ...]] = field(default_factory=list)

    def add_row(self, *cells: "str | Text") -> None:
        """Add a row with a cell for each column."""
        self.rows.append(cells)

    def widths(self) -> list[int]:
        """The width of each column whose cells are shown whole."""
        from rich.cells import cell_len

        found = []
        for header, *cells in zip(self.columns, *self.rows, strict=True):
            lines = header.split("\n")
            found.append(max(cell_len(str(part)) for part in (*lines, *cells)))
        return found

    def least_widths(self, text_width: int = TEXT_WIDTH) -> list[int]:
        """The same with text shortened to `text_width`."""
        return [
            min(width, text_width) if header in self.text else width
            for header, width in zip(self.columns, self.widths(), strict=True)
        ]


def print_table(rows: Table, group: Sequence[str] = ()) -> None:
    """Print a table on stdout: whole in a pipe; on a narrow terminal paths and names are shortened
    in the middle, and a number never is.

    Args:
        rows: the table.
        group: columns that become headings on a terminal that is too narrow for readable text:
            one table for each of their values. If the numbers alone need more than the terminal
            has, the lines are wider than it.
    """
    console = results_console()
    width = console.width if console.is_terminal else PIPE_WIDTH
    if _needed(rows.least_widths(READABLE_WIDTH)) <= width:
        _print_fitted(console, rows, width)
        return
    for heading, part in _grouped(rows, [name for name in group if name in rows.columns]):
        if heading:
            console.print(heading, style="bold", soft_wrap=True)
        _print_fitted(console, _with_high_headers(part), width)


def _needed(widths: Sequence[int]) -> int:
    """The columns that a table takes, with two spaces between columns."""
    return sum(widths) + 2 * (len(widths) - 1)


def _grouped(rows: Table, group: Sequence[str]) -> Iterator[tuple[str, Table]]:
    """A table without the columns `group` for each of their values, which are its heading."""
    columns = [number for number, name in enumerate(rows.columns) if name not in group]
    parts: dict[str, Table] = {}
    for row in rows.rows:
        cells = dict(zip(rows.columns, row, strict=True))
        heading = ", ".join(f"{name} {cells[name]}" for name in group)
        names = tuple(rows.columns[number] for number in columns)
        part = parts.setdefault(heading, Table(names, rows.text, rows.fold))
        part.add_row(*(row[number] for number in columns))
    yield from parts.items()


def _with_high_headers(rows: Table) -> Table:
    """The table with the words of each number's header on lines of their own."""
    headers = []
    for header in rows.columns:
        is_text = header in rows.text
        headers.append(header if is_text else header.replace("_", "_\n").replace(" ", "\n"))
    return Table(tuple(headers), rows.text, rows.fold, rows.rows)


def _print_fitted(console: "Console", rows: Table, width: int) -> None:
    """Print a table in `width` columns, or more if its numbers need more."""
    from rich.table import Table as RichTable

    widths, least = rows.widths(), rows.least_widths()
    while _needed(widths) > width and widths != least:
        spare = [a - b for a, b in zip(widths, least, strict=True)]
        # the widest text that can be shortened
        number = max(range(len(widths)), key=lambda i: (spare[i] > 0, widths[i]))
        widths[number] -= 1
    made = RichTable(box=None, pad_edge=False, show_header=any(rows.columns), header_style="bold")
    for header, column_width in zip(rows.columns, widths, strict=True):
        folds = header in rows.fold
        made.add_column(
            header,
            justify="left" if header in rows.text else "right",
            width=column_width,
            no_wrap=not folds,
            overflow="fold" if folds else "crop",
        )
    for row in rows.rows:
        cells = zip(rows.columns, row, widths, strict=True)
        made.add_row(*(cell if name in rows.fold else shorten(cell, w) for name, cell, w in cells))
    console.width = max(width, _needed(widths))
    console.print(made)


def shorten(text: "str | Text", width: int) -> "str | Text":
    """`text` in at most `width` columns, with … for its middle: the end of a path says most.

    >>> shorten("checkpoints/sft/step-000060.ckpt", 18), shorten("0.5", 18)
    ('check…-000060.ckpt', '0.5')
    """
    from rich.cells import cell_len

    if cell_len(str(text)) <= width:
        return text
    text = str(text)
    head = (width - 1) // 3
    tail = width - 1 - head
    while cell_len(made := f"{text[:head]}…{text[-tail:]}") > width:  # wide characters
        head, tail = max(head - 1, 1), max(tail - 1, 1)
    return made
