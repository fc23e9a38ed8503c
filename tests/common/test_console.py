"""Tables: a number is never cut, a path only where the terminal is too narrow, and nothing in a pipe."""

import io
import sys

import pytest

from tinylm.common.console import TEXT_WIDTH, print_table, results_console, table


class FakeTerminal(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self) -> bool:
        return True


PATH = "checkpoints/a-long-name/step-000100.ckpt"


def printed(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, columns: str = "200"
) -> list[str]:
    """The lines of a table with one path and two numbers, on `stream`."""
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    rows = table("file", "step", "parameters", text=("file",))
    rows.add_row(PATH, "100", "123,456,789")
    print_table(rows)
    return stream.getvalue().splitlines()


def test_a_wide_terminal_shows_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is left-justified and numbers right-justified, two spaces between columns."""
    assert printed(monkeypatch, FakeTerminal())[1] == f"{PATH}   100  123,456,789"


def test_a_narrow_terminal_cuts_the_path_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 columns: 4 for step, 11 for parameters and 4 between leave 21 for the path."""
    assert printed(monkeypatch, FakeTerminal(), "40")[1] == f"{PATH[:20]}…   100  123,456,789"


def test_a_terminal_too_narrow_for_the_numbers_shows_them_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = printed(monkeypatch, FakeTerminal(), "10")[1]
    assert line == f"{PATH[: TEXT_WIDTH - 1]}…   100  123,456,789"


def test_nothing_is_cut_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(monkeypatch, io.StringIO(), "10")[1] == f"{PATH}   100  123,456,789"


def test_a_table_without_headers_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    rows = table("", "")
    rows.add_row("memory", "1.5 GB")
    print_table(rows)
    assert sys.stdout.getvalue() == "memory  1.5 GB\n"


def test_values_are_never_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file named [red] prints as it is, in a table and alone; numbers get no colors of their own."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    results_console().print("[red]x[/red] 12")
    rows = table("file", text=("file",))
    rows.add_row("[bold]y")
    print_table(rows)
    assert [line.rstrip() for line in stream.getvalue().splitlines()] == [
        "[red]x[/red] 12",
        "file",
        "[bold]y",
    ]
