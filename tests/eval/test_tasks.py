"""Tasks: rows become questions and targets, answers become scores, and no example is both solved and asked (FAULTS E1, E13)."""

import json
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from tinylm.common.errors import UserError
from tinylm.config.schema import Config, DataConfig
from tinylm.eval.tasks import PAIRS, TASKS, data
from tinylm.eval.tasks.data import find_task, load_task
from tinylm.eval.tasks.task import draw_shots
from tinylm.rows import columns, row_files
from tinylm.rows.conversation import Turn

EVERY_TASK = [*TASKS.values(), PAIRS]


def write_rows(path: Path, items: list) -> Path:
    """One row a line; text stands as it is."""
    path.write_text(
        "".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items),
        encoding="utf-8",
    )
    return path


def problems(n: int, start: int = 0) -> list[dict]:
    """GSM8K rows that all differ."""
    return [
        {"question": f"What is {i} and 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"}
        for i in range(start, start + n)
    ]


# --- every task ---


def test_the_names_are_those_of_the_setting():
    names = [
        name
        for kind in get_args(DataConfig.model_fields["task"].annotation)
        for name in get_args(kind)
    ]
    assert sorted(TASKS) == sorted(names)


@pytest.mark.parametrize("task", EVERY_TASK, ids=lambda task: task.name)
def test_the_right_answers_of_the_built_in_rows_are_worth_everything(task):
    """Eight to sixteen different rows; every measure of the targets themselves is 1, and its interval goes up to 1."""
    examples = load_task(task, None, smoke=True).examples
    targets = [example.target for example in examples]
    assert 8 <= len({example.question for example in examples}) == len(examples) <= 16
    for measure in task.score(targets, targets).values():
        assert (measure.value, measure.high) == (1.0, 1.0)
    for value in task.chance(targets).values():
        assert value < 0.7


@pytest.mark.parametrize("task", EVERY_TASK, ids=lambda task: task.name)
def test_an_empty_answer_is_worth_nothing(task):
    targets = [example.target for example in load_task(task, None, smoke=True).examples]
    assert all(measure.value == 0 for measure in task.score([""] * len(targets), targets).values())


def test_the_sums_of_the_built_in_problems_are_right():
    """Each <<a*b=c>> in them is what Python makes of it."""
    for row in TASKS["gsm8k"].smoke:
        for step in row["answer"].split("<<")[1:]:
            term, result = step.partition(">>")[0].split("=")
            assert eval(term) == float(result)  # noqa: S307  (our own text)


def test_a_few_shot_prompt_is_solved_examples_and_then_the_question():
    task = TASKS["gsm8k"]
    first, second = (task.example("here", row) for row in problems(2))
    assert (
        task.text(second, [first])
        == "Question: What is 0 and 1?\nAnswer: It is 1.\n#### 1\n\nQuestion: What is 1 and 1?\nAnswer:"
    )
    assert PAIRS.text(PAIRS.example("here", {"prompt": "2+2=", "target": "4"})) == "2+2="


def test_chance_is_the_most_frequent_label_or_another_examples_target():
    """ham 3 of 4: accuracy 3/4, F1 of ham 6/7, of spam 0. Numbers: each is compared with the next one's, 7 with 7, 7 with 8, 8 with 7."""
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
            "question: expected a string, found null. Correct the row, or take it out.",
        ),
        (
            "gsm8k",
            {"question": "q", "answer": 1},
            "answer: expected a string, found a number. Correct the row, or take it out.",
        ),
        (
            "gsm8k",
            {"question": "q", "answer": " "},
            "the answer is blank. Correct the row, or take it out.",
        ),
        (
            "sst2",
            {"sentence": "s", "label": -1},
            "label: expected 0 (negative), 1 (positive), found -1. Correct the row, or take another split.",
        ),
        (
            "sst2",
            {"sentence": "s", "label": True},
            "label: expected 0 (negative), 1 (positive), found True.",
        ),
        ("sms", {"label": "eggs", "text": "s"}, "label: expected 0 (ham), 1 (spam), found 'eggs'."),
        ("sms", {"label": "ham"}, "sms: missing; the row has label."),
        (
            "alpaca",
            {"instruction": "i", "input": 3, "output": "o"},
            "input: expected a string, found a number.",
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


def test_a_task_and_rows_py_make_the_same_conversation_of_a_row():
    """Or a model would be evaluated on other words than it was fine-tuned on."""
    alpaca = {"instruction": "Add. ", "input": "1 and 2\n", "output": "3"}
    sms = {"label": "ham", "text": "see you"}
    assert TASKS["alpaca"].conversation(alpaca) == columns.parse_conversation(alpaca, DataConfig())
    assert TASKS["sms"].conversation(sms) == columns.parse_conversation(sms, DataConfig())
    assert TASKS["sms"].conversation({"label": 0, "sms": "see you\n"}) == TASKS["sms"].conversation(
        sms
    )


def test_the_lines_of_a_chat_end_without_carriage_returns():
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
def test_without_a_path_rows_are_evaluated_that_fine_tuning_does_not_train_on(
    monkeypatch, name, asked
):
    """Two splits are read whole. Of a single one, the rows that fine-tuning with default settings holds out are evaluated, and the others solved."""
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


def test_a_hub_that_cannot_be_reached_names_the_flags_that_do_without(monkeypatch):
    def records(config, which, seed):
        raise UserError("x: not reached.")

    monkeypatch.setattr(data, "read_rows", records)
    with pytest.raises(
        UserError,
        match=r"^task sst2: x: not reached\. Here that is --data sst2=PATH; --smoke needs no data\.$",
    ):
        load_task(TASKS["sst2"], None)


@pytest.mark.parametrize(("name", "value"), [("rows", "alpaca"), ("columns", {"prompt": "q"})])
def test_a_task_and_another_word_on_its_rows_contradict_each_other(name, value):
    with pytest.raises(
        ValidationError,
        match=f"{name}: cannot be combined with task. Remove {name} or task",
    ):
        DataConfig.model_validate({"task": "sst2", name: value})


# --- examples ---


def test_solved_examples_of_one_file_are_never_asked(tmp_path):
    """Row 0 stands there three times: as a solved example it is asked nowhere."""
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


def test_solved_examples_of_a_folder_are_training_rows_that_are_not_asked(tmp_path):
    """The test rows 0 to 4 are among the training rows 0 to 7; one of those is no row, and only 5 and 6 are left to solve."""
    write_rows(tmp_path / "train.jsonl", [*problems(7), {"question": "What is 7 and 1?"}])
    write_rows(tmp_path / "test.jsonl", problems(5))
    loaded = load_task(TASKS["gsm8k"], tmp_path, n_shots=2)
    assert {shot.question.text for shot in loaded.shots} == {"What is 5 and 1?", "What is 6 and 1?"}
    assert len(loaded.examples) == 5
    with pytest.raises(
        UserError,
        match=r"^task gsm8k: 3 examples were asked for, and there are 2 to take\. Lower --shots or give more rows\.$",
    ):
        load_task(TASKS["gsm8k"], tmp_path, n_shots=3)


def test_a_limit_draws_examples_by_the_seed_and_keeps_their_order(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", problems(50))
    places = [
        [
            int(e.place.rpartition(":")[2])
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


def test_what_is_wrong_with_the_data_is_said(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", problems(2))
    wanted = {
        "--tasks: no\\x1b: no such task. There are sst2, samsum, gsm8k, sms, alpaca, pairs.": lambda: (
            find_task("no\x1b")
        ),
        "--tasks: pairs has no data of its own. Give your rows: --data pairs=rows.jsonl": lambda: (
            load_task(PAIRS, None)
        ),
        f"--data: {path}: --smoke takes the built-in rows. Give one of the two.": lambda: load_task(
            PAIRS, path, smoke=True
        ),
        f"--data: {tmp_path}: no file begins with test or validation or val. Give a file of rows": lambda: (
            load_task(TASKS["gsm8k"], tmp_path)
        ),
        "task gsm8k: no examples are left to evaluate beside 2 solved ones. Lower --shots, or give more rows.": lambda: (
            load_task(TASKS["gsm8k"], path, n_shots=2)
        ),
    }
    for message, load in wanted.items():
        with pytest.raises(UserError) as error:
            load()
        assert str(error.value).startswith(message)
    for name in ("test.jsonl", "test2.jsonl"):
        write_rows(tmp_path / name, problems(2))
    with pytest.raises(
        UserError, match=r"2 files begin with test\. Give one of them: .*test\.jsonl$"
    ):
        load_task(TASKS["gsm8k"], tmp_path)
