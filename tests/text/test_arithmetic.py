"""The sums that the arithmetic recipe learns: right, the same every time, and really held out."""

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

from tinylm.__main__ import main
from tinylm.rows.numbers import final_number
from tinylm.text import arithmetic
from tinylm.text.arithmetic import Problem, Step, Writer, write_arithmetic

SMALL = {"text": 400, "answers": 400, "questions": 400, "solutions": 100, "dev": 80, "test": 80}
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


@pytest.mark.slow
def test_every_sum_in_every_file_is_right(folder):
    """The oracle is Python's own arithmetic on each `...=...` that is written."""
    n = 0
    for text in texts_of(folder, *SMALL):
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
    trained = texts_of(folder, "text", "answers", "questions", "solutions")
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
    """No style tells the answers of solutions.jsonl from those of a model that shows digits; no
    question of it is in the files that the model learns from.
    """
    rows = [json.loads(line) for line in (folder / "solutions.jsonl").read_text().splitlines()]
    assert all(re.fullmatch(r"(.+: .+, so \d+\.\n)+#### \d+", row["answer"]) for row in rows)
    asked = {row["question"] for row in rows}
    assert not asked & set(texts_of(folder, "answers", "questions"))


def test_the_command_writes_the_files_and_prints_their_folder(tmp_path, monkeypatch, capsys):
    """The last line of stdout is the folder; the files are those of write_arithmetic."""
    monkeypatch.setattr(arithmetic, "SIZES", SMALL)
    assert main(["arithmetic", "--out", str(tmp_path / "made")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'made'}\n"
    assert {path.stem for path in (tmp_path / "made").iterdir()} == set(SMALL)
