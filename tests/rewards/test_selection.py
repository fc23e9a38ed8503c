"""Rejection sampling: which answers of a model become rows, and the command that writes them."""

import json
from pathlib import Path
from typing import Any

import pytest

import finetune
import infer
from tests.training.test_finetune import Make, home, make  # noqa: F401  (fixtures)
from tests.training.test_train import Capture
from tinylm.__main__ import main
from tinylm.rewards.by_text import number_reward
from tinylm.rewards.selection import Passing, answers_in, row_of, select_answers


def line_of(*texts: str, cut: tuple[int, ...] = (), **fields: Any) -> dict[str, Any]:
    """A line of infer.py --output with these answers, of which those in `cut` have no end."""
    completions = [
        {"text": text, "ids": [1, 2], "finish_reason": "length" if i in cut else "eos"}
        for i, text in enumerate(texts)
    ]
    return {"prompt": "2 + 3 =", "completion": "#### 5", **fields, "completions": completions}


def kept(line: dict[str, Any], passing: Passing, n: int = 9) -> list[str]:
    """The texts that are selected from a line."""
    return [
        answer.text for answer in select_answers(answers_in(line, "f:1", "completion"), passing, n)
    ]


RIGHT = Passing(lambda answers: [number_reward(answer) for answer in answers])


def test_right_answers_are_kept_once_in_their_order() -> None:
    """Of seven: wrong, right, right again, the same with spaces, right without an end, empty, right."""
    line = line_of("so 4", "so 5", "it is 5", " so 5 ", "5", "", "5.0", cut=(4,))
    assert kept(line, RIGHT) == ["so 5", "it is 5", "5.0"]
    assert kept(line, RIGHT, n=1) == ["so 5"]
    assert kept(line_of("4", "6"), RIGHT) == []


def test_the_highest_scores_are_kept_first() -> None:
    """The score is the length here; 3 is the least."""
    length = Passing(None, lambda answers: [float(len(answer.text)) for answer in answers], 3.0)
    assert kept(line_of("aaa", "b", "cccc"), length) == ["cccc", "aaa"]
    both = Passing(RIGHT.reward, length.scores)
    assert kept(line_of("x 5", "so it is 5", "so it is 4!"), both) == ["so it is 5", "x 5"]


def test_a_row_has_the_prompt_or_the_messages_and_the_answer() -> None:
    [answer] = select_answers(answers_in(line_of("5"), "f:1", "completion"), RIGHT, 1)
    assert row_of(line_of("5"), answer) == {"prompt": "2 + 3 =", "completion": "5"}
    turns = [{"role": "user", "content": "2 + 3 ="}]
    line = {"messages": turns, "system": "Add.", "completion": "5"}
    assert row_of(line, answer) == {
        "system": "Add.",
        "messages": [*turns, {"role": "assistant", "content": "5"}],
    }


@pytest.mark.slow
def test_sampled_answers_become_rows_that_finetune_reads(
    make: Make,  # noqa: F811
    home: Path,  # noqa: F811
    tmp_path: Path,
    capsys: Capture,
) -> None:
    """The whole way with a model of two steps: sample, select, show the rows. A reward model's
    place is taken by the key of the row's own answer, an answer that the model did give.
    """
    (tmp_path / "asked.jsonl").write_text('{"prompt": "say 7"}\n{"prompt": "say 8"}\n', "utf-8")
    answers = tmp_path / "answers.jsonl"
    command = [
        "--ckpt",
        str(home / "base" / "final.ckpt"),
        "--input",
        str(tmp_path / "asked.jsonl"),
    ]
    command += ["--output", str(answers), "--n-samples", "4", "--max-new-tokens", "3", "--no-wrap"]
    assert infer.main([*command, "--deterministic", "--device", "cpu"]) == 0
    lines = [json.loads(text) for text in answers.read_text("utf-8").splitlines()]
    for number, line in enumerate(lines):  # as if all of them had ended, one of them was right
        for completion in line["completions"]:
            completion["finish_reason"] = "eos"
        line["completion"] = line["completions"][2]["text"] if number == 0 else "none"
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    rows = tmp_path / "rows.jsonl"
    capsys.readouterr()
    select = ["select", "--answers", str(answers), "--out", str(rows), "--reward", "exact"]
    assert main(select) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{rows}\n"
    assert "kept 1 answers to 1 of 2 prompts; 0 of 8 answers had no end" in printed.err
    expected = {"prompt": "say 7", "completion": lines[0]["completion"].strip()}
    assert json.loads(rows.read_text("utf-8")) == expected
    config = make(data={"dataset": str(rows), "val_dataset": str(home / "rows.jsonl")})
    assert finetune.main(["--config", str(config), "--show-rows", "1"]) == 0
    assert "say 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "line", "words"),
    [
        ([], line_of("5"), "--reward, --verifier: nothing says which answers pass."),
        (["--reward", "exact", "--min-score", "1"], line_of("5"), "--min-score: needs --verifier."),
        (
            ["--reward", "exact", "--per-prompt", "0"],
            line_of("5"),
            "--per-prompt: must be at least 1",
        ),
        (["--reward", "exact", "--target", "key"], line_of("5"), ":1: key: missing: the answer to"),
        (
            ["--reward", "exact"],
            line_of("4"),
            "no answer passes. Sample more answers (--n-samples)",
        ),
        (
            ["--reward", "exact"],
            {"prompt": "x"},
            ":1: has no completions. Give a file that infer.py",
        ),
        (["--reward", "exact"], [1], ":1: not a JSON object. If infer.py was killed, run it again"),
    ],
)
def test_a_mistake_is_one_line_and_no_file_is_written(
    flags: list[str], line: Any, words: str, tmp_path: Path, capsys: Capture
) -> None:
    path, out = tmp_path / "answers.jsonl", tmp_path / "rows.jsonl"
    path.write_text(json.dumps(line) + "\n", "utf-8")
    assert main(["select", "--answers", str(path), "--out", str(out), *flags]) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()
