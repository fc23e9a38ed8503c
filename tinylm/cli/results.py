"""The results of `evaluate_checkpoints.py`: ranked, as tables on stdout, as files."""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tinylm.common.errors import printable
from tinylm.common.files import writing
from tinylm.common.tables import Table, print_table
from tinylm.eval.best_of_n import Candidates
from tinylm.eval.task_scores import Answer, format_ranks

Row = dict[str, Any]


@dataclass
class Results:
    """The rows of the tables, as they are written to files."""

    cases: list[Row] = field(default_factory=list)
    case_scores: list[Row] = field(default_factory=list)
    measures: list[Row] = field(default_factory=list)
    best_of: list[Row] = field(default_factory=list)
    failed: list[Row] = field(default_factory=list)
    answers: dict[str, Sequence[Answer | Candidates]] = field(default_factory=dict)
    """by file name: the wrong answers of a task, or the candidates of --best-of"""

    def add(self, other: "Results") -> None:
        """Append the results of another model."""
        self.cases += other.cases
        self.case_scores += other.case_scores
        self.measures += other.measures
        self.best_of += other.best_of
        self.answers |= other.answers

    def rank(self) -> None:
        """Sort the rows of cases and measures, the best first, and add their ranks."""
        self.cases = rank_rows(self.cases, lambda row: (row["file"],))
        self.measures = rank_rows(
            self.measures, lambda row: (row["task"], str(row["shots"]), row["measure"])
        )


def rank_rows(rows: Iterable[Row], group_of: Callable[[Row], tuple[str, ...]]) -> list[Row]:
    """Sort the rows of each group by `rank_key` and replace it by `place`;
    equal ones share a place.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(group_of(row), []).append(row)
    ranked = []
    for group in groups.values():
        group.sort(key=lambda row: row["rank_key"], reverse=True)
        ranks = format_ranks([row["rank_key"] for row in group])
        for place, row in zip(ranks, group, strict=True):
            columns = {name: value for name, value in row.items() if name != "rank_key"}
            ranked.append({"place": place, **columns})
    return ranked


# --- tables -----------------------------------------------------------------------------------

# On a narrow terminal a table for each value of these.
GROUP = ("task", "shots", "measure", "cases")
# Columns of text; the others are numbers.
TEXT = ("ckpt", "stage", "place", "checkpoint", "task", "measure", "metric", "cases", "choice")


def print_results(results: Results) -> None:
    """Print the tables, and below them what failed."""
    tables = [
        cases_table(results.cases),
        measures_table(results.measures),
        best_of_table(results.best_of),
    ]
    for number, rows in enumerate(rows for rows in tables if rows):
        if number:
            print()
        print_rows(rows)
    for row in results.failed:
        print(f"{row['checkpoint']}  FAILED: {printable(row['error'])}")


def cases_table(rows: list[Row]) -> list[Row]:
    """The columns of the cases."""
    return [
        {
            "place": row["place"],
            "checkpoint": row["checkpoint"],
            "step": row["step"],
            "val_loss": row["val_loss"],
            "log_prob": row["log_prob"],
            # A median of whole numbers: 3 or 2.5.
            "first_rank": None if row["first_rank"] is None else f"{row['first_rank']:g}",
            "greedy": f"{row['n_greedy']}/{row['n_cases']}",
            "failed": row["n_failed"],
            "prompt_ppl": row["prompt_perplexity"],
            "cases": row["file"],
        }
        for row in rows
    ]


def measures_table(rows: list[Row]) -> list[Row]:
    """The columns of the measures of all tasks."""
    names = ("task", "shots", "measure", "place", "checkpoint", "step", "val_loss", "value")
    return [
        {
            **{name: row[name] for name in names},
            "95% interval": interval(row),
            "chance": row["chance"],
            "examples": row["n_examples"],
        }
        for row in rows
    ]


def best_of_table(rows: list[Row]) -> list[Row]:
    """The columns of --best-of."""
    names = ("task", "n", "choice", "checkpoint", "step")
    return [
        {
            **{name: row[name] for name in names},
            "right": row["value"],
            "95% interval": interval(row),
            "examples": row["n_examples"],
        }
        for row in rows
    ]


def interval(row: Row) -> str | None:
    """`0.2500 to 0.7500`."""
    return None if row["low"] is None else f"{row['low']:.4f} to {row['high']:.4f}"


def print_rows(rows: Sequence[Row]) -> None:
    """Print rows as a table, with the keys of the first as columns."""
    if not rows:
        return
    printed = Table(tuple(rows[0]), TEXT)
    for row in rows:
        printed.add_row(*map(cell, row.values()))
    print_table(printed, GROUP)


def cell(value: Any) -> str:
    """A value for people: four decimals, a dash for None."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else printable(value)


# --- files ------------------------------------------------------------------------------------


def write_results(results: Results, folder: Path) -> None:
    """Write results.json, a .csv for each table, and a .jsonl for each list of answers."""
    tables = {
        "cases": results.cases,
        "case_scores": results.case_scores,
        "measures": results.measures,
        "best_of": results.best_of,
        "failed": results.failed,
    }
    with writing(folder, "--out"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")
        for name, rows in tables.items():
            path = folder / f"{name}.csv"
            path.unlink(missing_ok=True)  # of an earlier evaluation
            if rows:
                with open(path, "w", encoding="utf-8", newline="") as file:
                    writer = csv.DictWriter(file, list(rows[0]))
                    writer.writeheader()
                    writer.writerows(rows)
        for name, answers in results.answers.items():
            lines = (json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
            (folder / name).write_text("".join(lines), encoding="utf-8")
