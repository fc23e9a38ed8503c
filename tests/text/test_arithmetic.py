"""The sums that the arithmetic recipe learns: right, the same every time, and really held out."""

import json
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tinylm.__main__ import main
from tinylm.rows.numbers import final_number
from tinylm.text import arithmetic
from tinylm.text.arithmetic import Problem, Step, Writer, write_arithmetic

SMALL = {"text": 400, "answers": 400, "questions": 400, "graded": 300, "dev": 80, "test": 80}
SUM = re.compile(r"(\d[\d+*-]*)=(\d+)(?!r)\b")
DIVISION = re.compile(r"(\d+)/(\d+)=(\d+)(?:r(\d+))?\b")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All six files, with few rows."""
    out = tmp_path_factory.mktemp("arithmetic")
    write_arithmetic(out, sizes=SMALL)
    return out


def texts_of(folder: Path, *names: str) -> list[str]:
    """Every text in the rows of these files."""
    found: list[str] = []

    def collect(value: object) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, list | dict):
            for item in value.values() if isinstance(value, dict) else value:
                collect(item)

    for name in names:
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            collect(json.loads(line))
    return found


def graded_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of graded.jsonl."""
    return [json.loads(line) for line in (folder / "graded.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_sum_in_every_file_is_right(folder):
    """The oracle is Python's own arithmetic on each `...=...` that is written."""
    n = 0
    right = set(texts_of(folder, *SMALL))
    wrong = {row["answer"] for row in graded_rows(folder) if not row["label"]}
    for text in right - wrong:
        for first, second, quotient, rest in DIVISION.findall(text):
            assert divmod(int(first), int(second)) == (int(quotient), int(rest or 0)), text
            n += 1
        for left, right in SUM.findall(DIVISION.sub("", text)):
            assert eval(left) == int(right), text  # noqa: S307  (digits, + - *)
            n += 1
        for left, right in re.findall(r"(\d+[-+*/]\d+): [^:]*, so (\d+)\.", text):
            assert eval(left) == int(right), text  # noqa: S307  (digits, + - * /)
            n += 1
    assert n > 2000


def test_an_answer_is_the_last_number_of_its_work(folder):
    """Where an answer shows its sums, the line after them repeats the last result."""
    shown = [text for text in texts_of(folder, "answers") if "=" in text and "####" in text]
    assert len(shown) > 100
    for text in shown:
        assert final_number(text) == int(re.findall(r"(?:=|so )(\d+)\.\n", text)[-1])


def test_the_three_styles_have_the_same_result():
    """38 * 7 = 266, then 266 - 45 = 221, by hand."""
    problem = Problem("", "", "", (Step(38, "*", 7), Step(266, "-", 45)))
    assert problem.answer("brief") == "#### 221"
    assert problem.answer("sums") == "38*7=266.\n266-45=221.\n#### 221"
    assert problem.answer("digits") == (
        "38*7: 8*7=56, 3*7+5=26, so 266.\n266-45: 6-5=1, 6-4=2, 2-0=2, so 221.\n#### 221"
    )


@pytest.fixture
def problems(monkeypatch, tmp_path) -> dict[str, list[Problem]]:
    """Every problem that goes into a file, by the split that it was made for."""
    made: dict[str, list[Problem]] = defaultdict(list)
    original = Writer.problem

    def record(self: Writer) -> Problem:
        made[self.split].append(original(self))
        return made[self.split][-1]

    monkeypatch.setattr(Writer, "problem", record)
    write_arithmetic(tmp_path, sizes=SMALL)
    return made


def test_no_pair_of_numbers_and_no_wording_is_in_two_splits(problems):
    """By construction: sets of what the three splits were made of have nothing in common."""
    assert set(problems) == {"train", "dev", "test"}
    for parts_of in (
        lambda problem: {step.pair for step in problem.steps},
        lambda problem: {problem.wording},
        lambda problem: {problem.question},
    ):
        parts = {split: set().union(*map(parts_of, made)) for split, made in problems.items()}
        assert all(parts.values())
        assert not parts["train"] & parts["test"]
        assert not parts["train"] & parts["dev"]
        assert not parts["dev"] & parts["test"]


def test_no_training_file_shows_a_sum_a_question_or_a_story_of_the_test(folder, problems):
    """Read from the files as texts: the sums of each test problem, and its question with other
    numbers, are nowhere in what is trained on.
    """
    trained = texts_of(folder, "text", "answers", "questions", "graded")
    shown = set(re.findall(r"\d+[-+*/]\d+", " ".join(trained)))
    without_numbers = {re.sub(r"\d+", "0", text) for text in trained}
    assert len(shown) > 500
    for problem in problems["test"]:
        for step in problem.steps:
            assert not shown & {step.expression, f"{step.second}{step.operator}{step.first}"}
        assert re.sub(r"\d+", "0", problem.question) not in without_numbers


@pytest.mark.slow
def test_the_files_depend_on_the_seed_alone(folder, tmp_path):
    """The same seed gives the same bytes; another one other rows in each file."""
    write_arithmetic(tmp_path / "same", sizes=SMALL)
    write_arithmetic(tmp_path / "other", sizes=SMALL, seed=1)
    for name, size in SMALL.items():
        content = (folder / f"{name}.jsonl").read_bytes()
        assert content.count(b"\n") == size
        assert (tmp_path / "same" / f"{name}.jsonl").read_bytes() == content
        assert (tmp_path / "other" / f"{name}.jsonl").read_bytes() != content


def test_questions_to_learn_by_reward_have_no_written_answer(folder):
    """questions.jsonl has only results, and no question twice or with an answer elsewhere."""
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    assert all(re.fullmatch(r"#### \d+", row["answer"]) for row in rows)
    asked = {row["question"] for row in rows}
    assert len(asked) == len(rows)
    assert not asked & set(texts_of(folder, "answers"))


def test_the_questions_of_a_verifier_are_others_and_show_every_digit(folder):
    """No style tells the answers of graded.jsonl from those of a model that shows digits, or the
    right ones from the wrong ones; no question of it is in the files that the model learns from.
    """
    rows = graded_rows(folder)
    assert all(re.fullmatch(r"(.+: .+, so \d+\.\n)+#### \d+", row["answer"]) for row in rows)
    asked = {row["question"] for row in rows}
    assert not asked & set(texts_of(folder, "answers", "questions"))


def wrong_statements(answer: str, right: str) -> int:
    """What an answer says that is not so: another number than the right answer copies from the
    question, or than the step before has, a fact that is false, a result that its facts do not give.
    """
    n_wrong, result = 0, None
    for line, right_line in zip(answer.splitlines()[:-1], right.splitlines(), strict=False):
        first, operator, second, work, written = re.fullmatch(
            r"(\d+)([-+*/])(\d+): (.*), so (\d+)\.", line
        ).groups()
        asked = re.split(r"[-+*/]", right_line.partition(":")[0])
        n_wrong += (first, second) != (result or asked[0], asked[1])
        result = written
        facts = re.findall(r"([^ ,]+)=(\d+)(?:r(\d+))?", work)
        for left, number, rest in facts:
            expected = divmod(*map(int, left.split("/"))) if rest else (eval(left), "")  # noqa: S307
            n_wrong += (int(number), int(rest) if rest else "") != expected
        digits = [fact[1] for fact in (facts if operator == "/" else facts[::-1])]
        if operator in "+*":
            digits = [digits[0], *(number[-1] for number in digits[1:])]
        n_wrong += int("".join(digits)) != int(result)
    assert answer.endswith(f"#### {result}")
    return n_wrong


def test_a_wrong_answer_has_one_mistake_and_follows_it(folder):
    """Read from the texts: 0 wrong statements with label 1, one with label 0. So the answer's other
    numbers do not say that it is wrong.
    """
    rows = graded_rows(folder)
    assert [row["label"] for row in rows] == [1, 0, 0] * 100
    right = {row["question"]: row["answer"] for row in rows if row["label"]}
    for row in rows:
        assert wrong_statements(row["answer"], right[row["question"]]) == 1 - row["label"], row
    assert len({(row["question"], row["answer"]) for row in rows}) == len(rows)


def test_a_verifier_sees_each_kind_of_mistake():
    """By hand: 38*7 with 8*7=53, with 36 copied for 38, and with 276 read from 26 and 6."""
    problem = Problem("", "", "", (Step(38, "*", 7),))
    written = {problem.wrong_answer(random.Random(seed)) for seed in range(3000)}
    for answer in (
        "38*7: 8*7=53, 3*7+5=26, so 263.\n#### 263",
        "36*7: 6*7=42, 3*7+4=25, so 252.\n#### 252",
        "38*7: 8*7=56, 3*7+5=26, so 276.\n#### 276",
    ):
        assert answer in written


def test_the_command_writes_the_files_and_prints_their_folder(tmp_path, monkeypatch, capsys):
    """The last line of stdout is the folder; the files are those of write_arithmetic."""
    monkeypatch.setattr(arithmetic, "SIZES", SMALL)
    assert main(["arithmetic", "--out", str(tmp_path / "made")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'made'}\n"
    assert {path.stem for path in (tmp_path / "made").iterdir()} == set(SMALL)
