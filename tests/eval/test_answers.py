"""The answers of a fine-tuned model to its own rows, in the words of its template."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tinylm.config.schema import DataConfig
from tinylm.eval import answers
from tinylm.eval.answers import GivenAnswer, Question, first_question, read_questions
from tinylm.rows.conversation import Turn


def test_questions_are_the_turns_before_the_first_trained_answer() -> None:
    """An answer of weight 0 is a part of the question; what follows the answer is not."""
    seen = (Turn("user", "a"), Turn("assistant", "no", trained=False), Turn("user", "b", "c"))
    found = first_question((*seen, Turn("assistant", " yes "), Turn("user", "d")))
    assert found == Question(seen, "yes")
    assert found.text == "b c"
    assert first_question(seen) is None


def test_a_split_gives_its_first_questions_and_skips_bad_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "completion": f"{i}."} for i in range(40)]
    lines = [json.dumps(row) for row in [{"prompt": "no answer"}, *rows]]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    data = DataConfig(dataset=str(path), val_fraction=0.25)
    val = read_questions(data, "val", 1, 100)
    train = read_questions(data, "train", 1, 100)
    assert len(val) + len(train) == 40
    assert {question.expected for question in val} & {
        question.expected for question in train
    } == set()
    assert read_questions(data, "val", 1, 3) == val[:3]


def test_answers_are_asked_for_with_the_system_turn_of_the_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless the row has one of its own; scores by hand: 1 of 2 words of "a b" are those of "b c"."""
    asked = []

    def format_prompt(engine, turns, template, *, system):
        asked.append((turns[0].role, system))
        return SimpleNamespace(prompt=None, stop_ids=())

    def complete(requests):
        return [SimpleNamespace(text=" a b\n") for _ in requests]

    engine = SimpleNamespace(of=lambda loaded: SimpleNamespace(complete=complete))
    monkeypatch.setattr(answers, "Engine", engine)
    monkeypatch.setattr(answers, "format_prompt", format_prompt)
    loaded = SimpleNamespace(make_template=lambda: "plain", system="Be brief.")
    own = Question((Turn("system", "Be kind."), Turn("user", "x")), "b c")
    plain = Question((Turn("user", "x"),), "a b")
    given = answers.answer_questions(loaded, [own, plain], 8)
    assert asked == [("system", None), ("user", "Be brief.")]
    assert given == [GivenAnswer(own, "a b"), GivenAnswer(plain, "a b")]
    assert [(answer.is_exact, answer.f1) for answer in given] == [(False, 0.5), (True, 1.0)]
