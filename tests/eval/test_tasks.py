"""Tasks: rows become questions and targets, answers become scores, and no solved example is also
asked (E1, E13)."""

import json
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from tinylm.common.errors import UserError
from tinylm.config.schema import Config, DataConfig
from tinylm.eval.tasks import data
from tinylm.eval.tasks.data import load_task
from tinylm.eval.tasks.table import PAIRS, TASKS, find_task
from tinylm.eval.tasks.task import draw_shots
from tinylm.rows import columns, row_files
from tinylm.rows.conversation import Turn

EVERY_TASK = [*TASKS.values(), PAIRS]


def write_rows(path: Path, items: list) -> Path:
    """One row per line; a string is written as it is."""
    path.write_text(
        "".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items),
        encoding="utf-8",
    )
    return path


def problems(n: int, start: int = 0) -> list[dict]:
    """Different GSM8K rows."""
    return [
        {"question": f"What is {i} and 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"}
        for i in range(start, start + n)
    ]


# --- every task ---


def test_the_names_are_the_values_of_the_setting():
    names = [
        name
        for kind in get_args(DataConfig.model_fields["task"].annotation)
        for name in get_args(kind)
    ]
    assert sorted(TASKS) == sorted(names)


@pytest.mark.parametrize("task", EVERY_TASK, ids=lambda task: task.name)
def test_the_targets_of_the_built_in_rows_have_the_highest_score(task):
    """8 to 16 different rows; every measure of the targets is 1, and so is the end of its interval."""
    examples = load_task(task, None, smoke=True).examples
    targets = [example.target for example in examples]
    assert 8 <= len({example.question for example in examples}) == len(examples) <= 16
    for measure in task.score(targets, targets).values():
        assert (measure.value, measure.high) == (1.0, 1.0)
    for value in task.chance(targets).values():
        assert value < 0.7


@pytest.mark.parametrize("task", EVERY_TASK, ids=lambda task: task.name)
def test_an_empty_answer_scores_0(task):
    targets = [example.target for example in load_task(task, None, smoke=True).examples]
    assert all(measure.value == 0 for measure in task.score([""] * len(targets), targets).values())


def test_the_arithmetic_of_the_built_in_problems_is_right():
    """Python computes the same result for each <<a*b=c>>."""
    for row in TASKS["gsm8k"].smoke:
        for step in row["answer"].split("<<")[1:]:
            term, result = step.partition(">>")[0].split("=")
            assert eval(term) == float(result)  # noqa: S307  (our own text)


def test_a_few_shot_prompt_has_solved_examples_before_the_question():
    task = TASKS["gsm8k"]
    first, second = (task.example("here", row) for row in problems(2))
    assert (
        task.text(second, [first])
        == "Question: What is 0 and 1?\nAnswer: It is 1.\n#### 1\n\nQuestion: What is 1 and 1?\nAnswer:"
    )
    assert PAIRS.text(PAIRS.example("here", {"prompt": "2+2=", "target": "4"})) == "2+2="


def test_chance_is_the_most_frequent_label_or_another_examples_target():
    """ham 3 of 4: accuracy 3/4, F1 of ham 6/7, of spam 0. Numbers: compared with the next target,
    7 with 7, 7 with 8, 8 with 7."""
    assert TASKS["sms"].chance(["ham", "spam", "ham", "ham"]) == pytest.approx(
        {"accuracy": 0.75, "macro_f1": 3 / 7}
    )
    assert TASKS["sms"].chance(["spam", "ham", "spam", "spam"]) == pytest.approx(
        {"accuracy": 0.75, "macro_f1": 3 / 7}
    )
    assert TASKS["gsm8k"].chance(["#### 7", "#### 7", "#### 8"]) == pytest.approx(
        {"exact_match": 1 / 3}
    )
    assert TASKS["gsm8k"].chance(["#### 7"]) == {}


# --- rows ---


@pytest.mark.parametrize(
    ("task", "row", "problem"),
    [
        (
            "gsm8k",
            {"question": "q"},
            "answer: missing; the row has question. Correct the row, or give the data of this task.",
        ),
        (
            "gsm8k",
            {"question": None, "answer": "#### 1"},
            "question: must be a string, got null. Correct the row, or remove it.",
        ),
        (
            "gsm8k",
            {"question": "q", "answer": 1},
            "answer: must be a string, got a number. Correct the row, or remove it.",
        ),
        (
            "gsm8k",
            {"question": "q", "answer": " "},
            "answer: must not be empty. Correct the row, or remove it.",
        ),
        (
            "sst2",
            {"sentence": "s", "label": -1},
            "label: must be one of 0 (negative), 1 (positive), got -1. Correct the row, or use another split.",
        ),
        (
            "sst2",
            {"sentence": "s", "label": True},
            "label: must be one of 0 (negative), 1 (positive), got True.",
        ),
        (
            "sms",
            {"label": "eggs", "text": "s"},
            "label: must be one of 0 (ham), 1 (spam), got 'eggs'.",
        ),
        ("sms", {"label": "ham"}, "sms: missing; the row has label."),
        (
            "alpaca",
            {"instruction": "i", "input": 3, "output": "o"},
            "input: must be a string, got a number.",
        ),
        ("gsm8k", "{", "not JSON"),
        ("gsm8k", ["q"], "must be an object"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_column(tmp_path, task, row, problem):
    good = dict(TASKS[task].smoke[0])
    path = write_rows(tmp_path / "rows.jsonl", [good, row, good])
    with pytest.raises(UserError) as error:
        load_task(TASKS[task], path)
    assert str(error.value).startswith(f"{path}:2: {problem}")


def test_a_task_and_parse_conversation_agree_on_a_row():
    """Otherwise a model would be evaluated on other prompts than it was fine-tuned on."""
    alpaca = {"instruction": "Add. ", "input": "1 and 2\n", "output": "3"}
    sms = {"label": "ham", "text": "see you"}
    assert TASKS["alpaca"].conversation(alpaca) == columns.parse_conversation(alpaca, DataConfig())
    assert TASKS["sms"].conversation(sms) == columns.parse_conversation(sms, DataConfig())
    assert TASKS["sms"].conversation({"label": 0, "sms": "see you\n"}) == TASKS["sms"].conversation(
        sms
    )


def test_carriage_returns_are_removed_from_a_chat():
    question, answer = TASKS["samsum"].conversation(
        {"dialogue": "A: hi\r\nB: hello", "summary": "They meet."}
    )
    assert (question.input, answer) == ("A: hi\nB: hello", Turn("assistant", "They meet."))


def test_the_spam_collection_is_read_as_it_is_published(tmp_path):
    path = tmp_path / "SMSSpamCollection"
    path.write_text("ham\tsee you\nspam\tWIN a prize\n", encoding="utf-8")
    assert [(e.question.input, e.target) for e in load_task(TASKS["sms"], path).examples] == [
        ("see you", "ham"),
        ("WIN a prize", "spam"),
    ]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("sst2", [("nyu-mll/glue", "sst2", "validation"), ("nyu-mll/glue", "sst2", "train")]),
        ("samsum", [("knkarthick/samsum", None, "test"), ("knkarthick/samsum", None, "train")]),
        ("gsm8k", [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]),
        ("sms", 2 * [("ucirvine/sms_spam", "plain_text", "train")]),
        ("alpaca", 2 * [("tatsu-lab/alpaca", None, "train")]),
    ],
)
def test_without_a_path_the_evaluated_rows_are_not_those_of_fine_tuning(monkeypatch, name, asked):
    """Two splits are read whole. Of a single split, the rows that fine-tuning holds out by default
    are evaluated."""
    calls, one_split = [], name in ("sms", "alpaca")

    def records(config, which, seed):
        calls.append((config.dataset, config.dataset_config, config.split))
        split = row_files.find_split(config, which, seed, row_files.ROW_FILES)
        defaults = Config()
        assert (split.held_out, split.limit) == (
            (defaults.data.val_fraction, defaults.training.seed) if one_split else None,
            None,
        )
        assert which == (["train", "val"][len(calls) - 1] if one_split else "train")
        return ((f"row {i}", row) for i, row in enumerate(TASKS[name].smoke))

    monkeypatch.setattr(data, "read_rows", records)
    monkeypatch.setattr(
        data, "draw_shots", lambda task, rows, n, **more: [task.example(*row) for row in rows][:n]
    )
    load_task(TASKS[name], None, n_shots=1)
    assert calls == asked


def test_an_unreachable_hub_is_an_error_that_names_other_flags(monkeypatch):
    def records(config, which, seed):
        raise UserError("x", "not reached")

    monkeypatch.setattr(data, "read_rows", records)
    with pytest.raises(
        UserError,
        match=r"^task sst2: x: not reached\. Give the rows with --data sst2=PATH, or try --smoke, "
        r"which needs no data\.$",
    ):
        load_task(TASKS["sst2"], None)


@pytest.mark.parametrize(("name", "value"), [("rows", "alpaca"), ("columns", {"prompt": "q"})])
def test_a_task_cannot_be_combined_with_rows_or_columns(name, value):
    with pytest.raises(
        ValidationError,
        match=f"{name}: cannot be combined with task. Remove {name} or task",
    ):
        DataConfig.model_validate({"task": "sst2", name: value})


# --- examples ---


def test_solved_examples_of_a_file_are_never_asked(tmp_path):
    """Row 0 is there three times: if it is a solved example, none of them is asked."""
    path = write_rows(tmp_path / "rows.jsonl", problems(6) + problems(1) + problems(1))
    seen = set()
    for seed in range(8):
        loaded = load_task(TASKS["gsm8k"], path, n_shots=3, seed=seed)
        solved = {shot.question for shot in loaded.shots}
        assert len(solved) == 3
        assert solved.isdisjoint(example.question for example in loaded.examples)
        assert len(loaded.examples) == (
            5 - 2 if Turn("user", "What is 0 and 1?") in solved else 8 - 3
        )
        assert loaded == load_task(TASKS["gsm8k"], path, n_shots=3, seed=seed)
        seen.add(frozenset(solved))
    assert len(seen) > 1


def test_solved_examples_of_a_folder_are_other_training_rows(tmp_path):
    """Test rows 0 to 4 are among training rows 0 to 7, of which 7 is invalid: only 5 and 6 can be
    solved examples."""
    write_rows(tmp_path / "train.jsonl", [*problems(7), {"question": "What is 7 and 1?"}])
    write_rows(tmp_path / "test.jsonl", problems(5))
    loaded = load_task(TASKS["gsm8k"], tmp_path, n_shots=2)
    assert {shot.question.text for shot in loaded.shots} == {"What is 5 and 1?", "What is 6 and 1?"}
    assert len(loaded.examples) == 5
    with pytest.raises(
        UserError,
        match=r"^task gsm8k: needs 3 solved examples, but only 2 are available\. Lower --shots, or give more rows\.$",
    ):
        load_task(TASKS["gsm8k"], tmp_path, n_shots=3)


def test_a_limit_draws_examples_with_the_seed_and_keeps_their_order(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", problems(50))
    places = [
        [
            int(e.location.rpartition(":")[2])
            for e in load_task(TASKS["gsm8k"], path, limit=10, seed=seed).examples
        ]
        for seed in (0, 0, 1)
    ]
    assert places[0] == places[1] != places[2]
    assert all(len(set(found)) == 10 and found == sorted(found) for found in places)
    assert max(places[0]) > 10


def test_no_solved_examples_need_no_training_rows(tmp_path):
    write_rows(tmp_path / "validation.jsonl", problems(3))
    assert len(load_task(TASKS["gsm8k"], tmp_path).examples) == 3
    assert draw_shots(TASKS["gsm8k"], [], 0, seed=0) == []


def test_each_mistake_in_the_data_has_its_message(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", problems(2))
    wanted = {
        "--tasks: no\\x1b: no such task. Give one of sst2, samsum, gsm8k, sms, alpaca, pairs.": lambda: (
            find_task("no\x1b")
        ),
        "--tasks: pairs: has no data of its own. Give your rows: --data pairs=rows.jsonl": lambda: (
            load_task(PAIRS, None)
        ),
        f"--data: {path}: cannot be combined with --smoke. Give one of the two.": lambda: load_task(
            PAIRS, path, smoke=True
        ),
        f"--data: {tmp_path}: no file begins with test or validation or val. Give a file of rows": lambda: (
            load_task(TASKS["gsm8k"], tmp_path)
        ),
        "task gsm8k: no examples are left to evaluate besides 2 solved ones. Lower --shots, or give "
        "more rows.": lambda: load_task(TASKS["gsm8k"], path, n_shots=2),
    }
    for message, load in wanted.items():
        with pytest.raises(UserError) as error:
            load()
        assert str(error.value).startswith(message)
    for name in ("test.jsonl", "test2.jsonl"):
        write_rows(tmp_path / name, problems(2))
    with pytest.raises(
        UserError, match=r"2 files begin with test\. Give one of them: .*test\.jsonl\.$"
    ):
        load_task(TASKS["gsm8k"], tmp_path)
