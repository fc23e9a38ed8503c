"""Tables: a number is never cut, a path only where the terminal is too narrow, and nothing in a pipe."""

import io
import re
import sys

import pytest

from tinylm.common.tables import TEXT_WIDTH, Table, print_table, results_console


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
    rows = Table(("file", "step", "parameters"), text=("file",))
    rows.add_row(PATH, "100", "123,456,789")
    print_table(rows)
    return stream.getvalue().splitlines()


def test_a_wide_terminal_shows_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is left-justified and numbers right-justified, two spaces between columns."""
    assert printed(monkeypatch, FakeTerminal())[1] == f"{PATH}   100  123,456,789"


def test_a_narrow_terminal_cuts_the_path_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 columns: 4 for step, 11 for parameters and 4 between leave 21 for the path: a third of
    20 before its middle, the rest after it.
    """
    line = f"{PATH[:6]}…{PATH[-14:]}   100  123,456,789"
    assert printed(monkeypatch, FakeTerminal(), "40")[1] == line


def test_a_terminal_too_narrow_for_the_numbers_shows_them_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = printed(monkeypatch, FakeTerminal(), "10")[1]
    assert line == f"{PATH[:3]}…{PATH[4 - TEXT_WIDTH :]}   100  123,456,789"


def test_on_a_narrow_terminal_columns_become_headings(monkeypatch: pytest.MonkeyPatch) -> None:
    """One table for each of their values; the words of a number's header get a line each."""
    monkeypatch.setattr(sys, "stdout", stream := FakeTerminal())
    for name, value in (("COLUMNS", "40"), ("TERM", "xterm"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    rows = Table(("task", "file", "val_loss"), text=("task", "file"))
    for task, loss in (("sst2", "1.0"), ("gsm8k", "2.5"), ("sst2", "3.0")):
        rows.add_row(task, PATH, loss)
    print_table(rows, group=("task", "absent"))
    text = re.sub(r"\x1b\[\d*m", "", stream.getvalue())
    lines = [line.rstrip() for line in text.splitlines()]
    assert [line for line in lines if line.startswith("task")] == ["task sst2", "task gsm8k"]
    assert lines[1].strip() == "val_" and lines[2].split() == ["file", "loss"]
    shown = f"{PATH[:11]}…{PATH[-22:]}"
    assert [line.split() for line in lines[3:5]] == [[shown, "1.0"], [shown, "3.0"]]
    assert max(map(len, lines)) <= 40


def test_nothing_is_cut_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(monkeypatch, io.StringIO(), "10")[1] == f"{PATH}   100  123,456,789"


def test_a_table_without_headers_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    rows = Table(("", ""))
    rows.add_row("memory", "1.5 GB")
    print_table(rows)
    assert sys.stdout.getvalue() == "memory  1.5 GB\n"


def test_values_are_never_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file named [red] prints as it is, in a table and alone; numbers get no colors of their own."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    results_console().print("[red]x[/red] 12")
    rows = Table(("file",), text=("file",))
    rows.add_row("[bold]y")
    print_table(rows)
    assert [line.rstrip() for line in stream.getvalue().splitlines()] == [
        "[red]x[/red] 12",
        "file",
        "[bold]y",
    ]
