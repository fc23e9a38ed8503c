"""The path of a row and the reasons to skip it: the page that explains them names what exists."""

import importlib
import re
from pathlib import Path

import pytest

from tinylm.common.errors import UserError
from tinylm.rows import skipped_rows
from tinylm.rows.conversation import Turn
from tinylm.rows.skipped_rows import RowReport, SkipReason

ROOT = Path(__file__).parents[2]


def test_every_step_of_the_path_exists():
    """`columns.parse_conversation` in the module docstring is tinylm.rows.columns.parse_conversation."""
    names = re.findall(r" ((?:\w+\.)+[a-zA-Z]\w*)  ", skipped_rows.__doc__)
    assert len(names) >= 9
    for name in names:
        module, _, attribute = name.rpartition(".")
        if module == "templates.Template":
            module, attribute = "templates", "Template"
        folder = "tinylm" if "." in module else "tinylm.rows"
        assert hasattr(importlib.import_module(f"{folder}.{module}"), attribute), name


def test_every_reason_is_used():
    source = "".join(path.read_text("utf-8") for path in (ROOT / "tinylm" / "rows").glob("*.py"))
    assert [reason.name for reason in SkipReason if f"SkipReason.{reason.name}" not in source] == []


def test_a_report_counts_and_names_skipped_rows():
    report = RowReport("val", 64, kept=5, truncated=2)
    for line in range(1, 6):
        report.skip(SkipReason.PROMPT_TOO_LONG, f"a.jsonl:{line}")
    report.skip(SkipReason.EMPTY_ANSWER, "a.jsonl:9")
    report.unread_columns["context"] = None
    assert report.notes() == [
        "validation: kept 5 of 11 rows",
        "validation: skipped 5 rows: the prompt fills the context of 64 tokens "
        "(a.jsonl:1, a.jsonl:2, a.jsonl:3 and 2 more). Raise training.seq_len, or shorten the prompts.",
        "validation: skipped 1 row: an answer is empty (a.jsonl:9). Give pairs with two answers.",
        "validation: columns not read: context; data.columns names those that are",
        "validation: 2 of 5 rows lost their end to the context of 64 tokens",
    ]


@pytest.mark.parametrize("reason", SkipReason, ids=lambda reason: reason.name)
def test_an_error_says_what_to_do_about_the_most_frequent_reason(reason):
    report = RowReport("train", 8)
    report.skip(reason, "a.jsonl:1")
    with pytest.raises(UserError) as error:
        report.require_rows()
    assert error.value.where == ("data.dataset",)
    assert error.value.problem == (
        f"no training rows are left: skipped 1 row: {reason.text(8)} (a.jsonl:1)"
    )
    assert error.value.fix == reason.fix


@pytest.mark.parametrize(
    ("systems", "commonest"),
    [([], None), (["a", "b", "b", ""], "b"), (["a", "", ""], None), (["a"], "a")],
)
def test_the_commonest_system_turn_is_none_if_most_rows_have_none(systems, commonest):
    report = RowReport("train", 8)
    for text in systems:
        system = (Turn("system", text),) if text else ()
        report.count_system((*system, Turn("user", "2+2?"), Turn("assistant", "4")))
    assert report.most_common_system == commonest
