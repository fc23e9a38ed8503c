r"""The rows of a .csv or .tsv file: the first line names the columns, every cell is text.

Cells as spreadsheets and pandas write them (RFC 4180): in quotes if they have a delimiter, a line
end or a quote, which is then written twice. Lines end in \n, \r\n or \r. Memory holds one row.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tinylm.common.errors import UserError, first_line

# A longer cell is a quote that is never closed.
CELL_CHARACTERS = 2**28
_LINES = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


def table_rows(
    path: Path, lines: Iterable[str], delimiter: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row as {column: cell} with its location, the line that it begins in.

    Args:
        path: the name of the file.
        lines: its text, with line ends.
        delimiter: a comma or a tab.

    Raises:
        UserError: a row has more or fewer cells than there are columns, two columns have one name,
            or a quote is not closed.

    >>> list(table_rows("a.csv", ['id,text\\n', '1,"one,\\n', 'two"\\n'], ","))
    [('a.csv:2', {'id': '1', 'text': 'one,\\ntwo'})]
    """
    csv.field_size_limit(CELL_CHARACTERS)
    table = csv.reader(_segments(lines), delimiter=delimiter, strict=True)
    columns: list[str] = []
    start = 1
    try:
        for cells in table:
            where, start = f"{path}:{start}", table.line_num + 1
            if not cells:  # a blank line
                continue
            if not columns:
                columns = cells
                twice = next((name for name in columns if columns.count(name) > 1), None)
                if twice is not None:
                    problem = f"two columns are named '{twice}'"
                    raise UserError(where, problem, "Rename one of them")
                continue
            if len(cells) != len(columns):
                problem = f"has {len(cells)} cells, but there are {len(columns)} columns"
                fix = 'Put text with commas in quotes: "a, b"'
                if delimiter == "\t":
                    fix = "Put a cell with tabs or line ends in quotes"
                raise UserError(where, problem, fix)
            yield where, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        problem = f"not a table of cells: {first_line(error)}"
        fix = 'Close the quotes of each cell, and write a quote in it twice: "say ""yes"""'
        raise UserError(f"{path}:{start}", problem, fix) from None


def _segments(lines: Iterable[str]) -> Iterator[str]:
    r"""The lines, also divided after each \r that is alone, as the csv module wants them."""
    for line in lines:
        if "\r" in line:
            yield from _LINES.findall(line)
        else:
            yield line
