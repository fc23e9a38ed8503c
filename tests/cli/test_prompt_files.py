"""infer.py --input: files of prompts, their answers, and how an answer file is continued."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.test_infer import error_of, piped, run, save, start, tuned
from tinylm.common.files import locked
from tinylm.generate.engine import Engine, Request

__all__ = ["run", "save", "tuned"]  # fixtures
# Nearly uniform probabilities: texts are equal only if their random numbers are.
RANDOM = ("--temperature", 50, "--max-new-tokens", 6)


@pytest.fixture
def ask(run, save, tmp_path) -> Callable[..., tuple[int, str, list[dict]]]:
    """Ask the rows of a file: exit code, stderr, and the lines of the answer file."""
    model = save("abcdefgh")

    def program(rows, *flags, ckpt=(model,), output=tmp_path / "answers.jsonl"):
        code, out, err = run("--ckpt", *ckpt, "--input", rows, "--output", output, *flags)
        assert out == f"{output}\n"
        return code, err, [json.loads(line) for line in output.read_text("utf-8").splitlines()]

    return program


def texts(lines: list[dict]) -> list[list[str]]:
    """The texts of each line."""
    return [[one["text"] for one in line["completions"]] for line in lines]


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The prompts that any engine gets from now on."""
    prompts: list[str] = []
    original = Engine.add

    def add(engine: Engine, request: Request) -> int:
        prompts.append(engine.tokenizer.decode(request.prompt.ids))
        return original(engine, request)

    monkeypatch.setattr(Engine, "add", add)
    return prompts


# --- rows and their answers ---


def test_each_line_of_a_text_file_is_a_prompt_and_the_order_is_kept(ask, write):
    """The model continues a prompt of n tokens with its letters from the n-th on. Of 20 rows, 8 at
    a time, the first ends last: it has 6 tokens, the others g and then h, the stop.
    """
    rows = write("rows.txt", b"\xef\xbb\xbfx\r\n\n" + b"1234567\n" * 19)
    code, err, lines = ask(rows, "--max-new-tokens", 6, "--stop", "h")
    assert (code, texts(lines)) == (0, [["abcdef"]] + [["g"]] * 19)
    assert [line["prompt"] for line in lines] == ["x"] + ["1234567"] * 19
    assert "answers: 20 rows in " in err


def test_json_rows_keep_their_other_keys_and_bad_rows_are_counted(ask, write):
    good = {"id": 1, "prompt": "x", "nested": {"é": [None]}, "completions": "dropped"}
    bad = ["[1]", "{oops", '{"text": "x"}', '{"prompt": ""}', '{"prompt": "\\ud800"}']
    bad.append('{"messages": [{"role": "user", "content": "x"}]}')
    rows = write("rows.jsonl", "\n".join([json.dumps(good), *bad, '{"prompt": "y"}']))
    code, err, lines = ask(rows, "--max-new-tokens", 2)
    assert code == 2
    assert list(lines[0]) == ["id", "prompt", "nested", "completions"]
    assert (lines[0]["nested"], texts(lines[:1])) == ({"é": [None]}, [["ab"]])
    assert lines[0]["completions"][0]["finish_reason"] == "length"
    problems = [
        'must be an object such as {"prompt": "..."}, got a list. Correct the row, or remove it.',
        "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1). "
        "Each line is one object; correct the line.",
        "prompt: missing; the row has text. Add prompt or messages, or remove the row.",
        "prompt: must not be empty. Correct the row, or remove it.",
        "the text has the lone surrogate \\ud800 at position 0, which is half a character. "
        "Remove it, or write the whole character.",
        "messages: only valid for a fine-tuned model, without --no-wrap. Give prompt.",
    ]
    expected = [f"{rows}:{number}: {problem}" for number, problem in enumerate(problems, start=2)]
    assert [line["error"] for line in lines[1:-1]] == expected
    assert texts(lines[-1:]) == [["ab"]]
    assert f"FAILED: 6 of 8 rows have an error; the first: {expected[0]}" in err


def test_a_table_has_its_prompts_in_a_column(ask, write):
    """A cell may have line ends; a row with too many cells, or without a prompt, is an error."""
    rows = write("rows.csv", 'id,prompt\n1,x\n2,"y,\nz"\n3,a,b\n4\n')
    code, _, lines = ask(rows, "--max-new-tokens", 1)
    assert code == 2
    assert [(line["id"], line["prompt"]) for line in lines] == [
        ("1", "x"),
        ("2", "y,\nz"),
        ("3", "a"),
        ("4", None),
    ]
    assert texts(lines[:2]) == [["a"], ["d"]]
    assert [line["error"] for line in lines[2:]] == [
        f'{rows}:5: has 3 cells, but there are 2 columns. Put text with commas in quotes: "a, b".',
        f"{rows}:6: prompt: missing; the row has id, prompt. Add prompt or messages, or remove the row.",
    ]


@pytest.mark.parametrize("given", ["x\n\nyy\n", '{"prompt": "x"}\n{"prompt": "yy"}\n'])
def test_standard_input_is_lines_of_text_or_json(ask, monkeypatch, given):
    piped(monkeypatch, "\ufeff" + given)
    assert texts(ask("-", "--max-new-tokens", 1)[2]) == [["a"], ["b"]]


def test_a_conversation_is_asked_in_the_template_of_the_checkpoint(ask, write, tuned, asked):
    """A row's own system text wins over that of the checkpoint; messages over a prompt."""
    user = {"role": "user", "content": "red"}
    answered = [user, {"role": "assistant", "content": "RED"}]
    rows = [
        {"prompt": "red"},
        {"prompt": "red", "system": "Be brief."},
        {"prompt": "no", "messages": [*answered, user]},
        {"prompt": None, "messages": [{"role": "system", "content": "Hi."}, user]},
        {"messages": answered},
        {"messages": "red"},
    ]
    path = write("rows.jsonl", "\n".join(map(json.dumps, rows)))
    flags = ("--max-new-tokens", 2, "--system", "Be kind.")
    code, _, lines = ask(path, *flags, ckpt=[tuned()])
    question = "### Instruction: red\n### Output:"
    assert asked == [
        f"### System: Be kind.\n{question}",
        f"### System: Be brief.\n{question}",
        f"### System: Be kind.\n{question} RED\n{question}",
        f"### System: Hi.\n{question}",
    ]
    assert (code, texts(lines[:4])) == (2, [["xx"]] * 4)
    assert [line["error"] for line in lines[4:]] == [
        f"{path}:5: messages: the last one must be the user's. Correct the row, or remove it.",
        f"{path}:6: messages: must be a list of turns, got a string. Correct the row, or remove it.",
    ]


def test_several_checkpoints_write_their_texts_side_by_side(ask, write, save, tuned, tmp_path):
    """A glob or --ckpt twice; all names of one file are one checkpoint."""
    save("12345678", name="b[1].ckpt")
    paths = [tmp_path / "step-000007.ckpt", tmp_path / "b[1].ckpt"]
    (tmp_path / "last.ckpt").hardlink_to(paths[0])
    rows = write("rows.jsonl", '{"prompt": "x"}\n[]')
    code, _, lines = ask(rows, "--max-new-tokens", 2, "--ckpt", tmp_path / "[ls]*.ckpt", ckpt=paths)
    found = [(one["checkpoint"], one["completions"][0]["text"]) for one in lines[0]["checkpoints"]]
    assert found == [(str(paths[0]), "ab"), (str(paths[1]), "12")]
    assert (code, "checkpoints" in lines[1]) == (2, False)


def test_a_constraint_applies_to_each_text(ask, write):
    pytest.importorskip("llguidance")
    rows = write("rows.txt", "x\ny\n")
    _, err, lines = ask(rows, "--regex", "[0-9]{3}", "--n-samples", 2, *RANDOM)
    assert all(text.isdigit() and len(text) == 3 for row in texts(lines) for text in row)
    assert "complete" not in err


def test_a_text_that_cannot_be_continued_fails_its_row_alone(ask, write, monkeypatch):
    """The only character that may come, a, repeats the prompt of row 2."""
    pytest.importorskip("llguidance")
    rows = write("rows.txt", "x\na\ny\n")
    flags = ("--regex", "a|aa", "--no-repeat-ngram", 1, "--n-samples", 2, "--max-new-tokens", 1)
    code, _, lines = ask(rows, *flags)
    assert [list(line) for line in lines] == [
        ["prompt", "completions"],
        ["prompt", "error"],
        ["prompt", "completions"],
    ]
    assert code == 2


def test_beam_search_and_long_prompts(ask, write):
    rows = write("rows.txt", "x\n0123456789\n")
    code, err, lines = ask(rows, "--n-beams", 2, "--max-new-tokens", 1)
    assert (code, texts(lines)) == (0, [["a"], ["h"]])
    assert lines[1]["completions"][0]["truncated"] == 2
    assert "prompts that are longer than the context and lost their beginning: 1\n" in err


@pytest.mark.parametrize("size", [1, 3])
def test_the_size_of_the_batch_is_that_of_the_flag(ask, write, monkeypatch, size):
    running = []
    original = Engine.step

    def step(engine: Engine) -> list:
        events = original(engine)
        running.append(len(events))
        return events

    monkeypatch.setattr(Engine, "step", step)
    rows = write("rows.txt", "x\n" * 7)
    lines = ask(rows, "--batch-size", size, "--max-new-tokens", 2)[2]
    assert (texts(lines), max(running)) == ([["ab"]] * 7, size)


# --- random numbers ---


def test_a_text_depends_on_its_prompt_seed_and_row_and_on_no_other_row(ask, write, run, tmp_path):
    """Row 0 is the text of --prompt. Equal prompts in other rows have other texts."""
    flags = (*RANDOM, "--deterministic", "--seed", 3)
    lines = ask(write("a.txt", "x\nx\nx\n" * 4), *flags)[2]
    found = [line["completions"][0]["ids"] for line in lines]
    assert len({tuple(ids) for ids in found}) == 12
    others = write("b.txt", "y\ny\ny\nx\n")
    again = ask(others, *flags, "--n-samples", 2, output=tmp_path / "b.jsonl")[2]
    assert again[3]["completions"][0] == lines[3]["completions"][0]
    assert again[3]["completions"][1]["ids"] != found[3]
    ckpt = tmp_path / "step-000007.ckpt"
    alone = json.loads(run("--ckpt", ckpt, "--prompt", "x", "--json", *flags)[1])
    assert alone["completions"] == lines[0]["completions"]


# --- an answer file is continued ---


@pytest.mark.slow
def test_a_cut_file_is_continued_without_asking_twice(ask, write, tmp_path, asked):
    """Cut in the middle of a line, at its end, and to nothing: the same bytes in the end."""
    rows = write("rows.jsonl", "".join(f'{{"prompt": "{n}"}}\n' for n in range(12)) + "[]\n")
    output = tmp_path / "answers.jsonl"
    flags = (*RANDOM, "--deterministic")
    assert ask(rows, *flags)[0] == 2
    whole = output.read_bytes()
    ends = [n for n, byte in enumerate(whole, start=1) if byte == ord("\n")]
    for size, n_kept in ((ends[4] + 9, 5), (ends[8], 9), (0, 0), (len(whole), 13)):
        output.write_bytes(whole[:size])
        asked.clear()
        code, err, _ = ask(rows, *flags)
        assert (code, output.read_bytes()) == (2, whole)  # an error that was kept counts too
        assert asked == [str(n) for n in range(n_kept, 12)]
        assert (f"output: {n_kept} of 13 rows are in {output} already" in err) == (n_kept > 0)


@pytest.mark.slow
def test_a_killed_program_is_continued(ask, write, save, tmp_path):
    rows = write("rows.txt", "".join(f"{n}\n" for n in range(200)))
    flags = (*RANDOM, "--max-new-tokens", 20, "--deterministic", "--device", "cpu")
    ask(rows, *flags, output=tmp_path / "whole.jsonl")
    output = tmp_path / "answers.jsonl"
    ckpt = tmp_path / "step-000007.ckpt"
    program = start("--ckpt", ckpt, "--input", rows, "--output", output, *flags)
    while not (output.exists() and output.read_bytes().count(b"\n") > 5):
        assert program.poll() is None
        time.sleep(0.01)
    program.send_signal(signal.SIGKILL)
    program.communicate()
    assert output.read_bytes().count(b"\n") < 200
    _, err, _ = ask(rows, *flags)
    assert "rows are in" in err
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_an_answer_file_belongs_to_its_input_checkpoint_and_settings(run, save, write, tmp_path):
    rows, output = write("rows.txt", "x\ny\n"), tmp_path / "answers.jsonl"
    first = ["--ckpt", save("abc"), "--input", rows, "--output", output, "--seed", 1]
    assert run(*first)[0] == 0
    whole = output.read_bytes()
    fix = f"To begin anew, delete {output}, or choose another --output."
    others = {
        "input": ["--input", write("other.txt", "x\nz\n")],
        "sampling": ["--seed", 2],
        "--deterministic or --batch-size": ["--deterministic"],
    }
    for name, flags in others.items():
        expected = f"--output: {output}: was begun with another {name}. {fix}"
        assert error_of(run(*first, *flags)) == expected
    save("xyz")
    expected = f"--output: {output}: was begun with another checkpoint. {fix}"
    assert error_of(run(*first)) == expected
    settings = tmp_path / "answers.settings.json"
    assert json.loads(settings.read_text("utf-8"))["checkpoint"] == [str(first[1])]
    settings.write_text("{}", encoding="utf-8")
    assert f"{settings} is damaged. {fix}" in error_of(run(*first))
    settings.unlink()
    assert f"exists, but not {settings}, which says what it was made from. {fix}" in error_of(
        run(*first)
    )
    assert output.read_bytes() == whole
    output.unlink()
    assert run(*first)[0] == 0


def test_a_line_that_is_not_the_answer_to_its_row_is_an_error(ask, run, write, tmp_path):
    """Someone removed or changed lines: the next answers would be beside other prompts."""
    rows, output = write("rows.txt", "x\ny\n"), tmp_path / "answers.jsonl"
    ask(rows)
    first, second = output.read_bytes().splitlines(keepends=True)
    flags = ("--ckpt", tmp_path / "step-000007.ckpt", "--input", rows, "--output", output)
    changed = f"line 1 is not the answer to {rows}:1: it was changed"
    for content, problem in (
        (second, changed),
        (b"[1]\n", changed),
        (b"\xff\n", changed),
        (first + second * 2, "has more lines than the input has rows (2)"),
    ):
        output.write_bytes(content)
        fix = f"To begin anew, delete {output}, or choose another --output."
        assert error_of(run(*flags)) == f"--output: {output}: {problem}. {fix}"
        assert output.read_bytes() == content


def test_two_programs_do_not_write_one_file(run, save, write, tmp_path):
    output = tmp_path / "answers.jsonl"
    with locked(output, "--output"):
        result = run("--ckpt", save(), "--input", write("a.txt", "x"), "--output", output)
    fix = "Wait for it, or choose another --output."
    assert error_of(result) == f"{output}: another process is writing it. {fix}"


# --- mistakes ---


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--input", "a.txt"],
            "--input, --output: each needs the other. Give --input prompts.jsonl --output "
            "answers.jsonl, or neither.",
        ),
        (
            ["--input", "a.txt", "--output", "a.csv"],
            "--output: a.csv: must end in .jsonl. Rename it: answers.jsonl.",
        ),
        (
            ["--input", "a.pdf", "--output", "a.jsonl"],
            "--input: a.pdf: must be a .txt, .jsonl or .csv file, or - for standard input. "
            "Rename or convert it.",
        ),
        (
            ["--input", "a.txt", "--output", "a.jsonl", "--chat"],
            "--chat: cannot be combined with --input. Remove one of the two.",
        ),
        (
            ["--input", "empty.txt", "--output", "a.jsonl"],
            "--input: empty.txt: has no rows. Write one prompt per line.",
        ),
        (
            ["--input", "other.csv", "--output", "a.jsonl"],
            "other.csv: has no column prompt; there are id, text. Rename the column that has the "
            "prompts.",
        ),
        (
            ["--input", "quote.csv", "--output", "a.jsonl"],
            "quote.csv:2: not CSV: unexpected end of data. Correct the line.",
        ),
        (
            ["--input", "bytes.csv", "--output", "a.jsonl"],
            "bytes.csv: not UTF-8 text (byte 7). Save the file as UTF-8.",
        ),
        (
            ["--prompt", "x", "--batch-size", "2"],
            "--batch-size: only valid with --input. Remove it.",
        ),
        (
            ["--input", "a.txt", "--output", "a.jsonl", "--ckpt", "none*.ckpt"],
            "--ckpt: none*.ckpt: no file matches. Train a model first: python train.py --config "
            "config_smoke.yaml.",
        ),
        (
            ["--prompt", "x", "--ckpt", "a", "b"],
            "--ckpt: several are only valid with --input. Give one.",
        ),
    ],
)
def test_a_wrong_flag_or_file_is_named(run, write, tmp_path, monkeypatch, flags, message):
    """Before any model is loaded: there is none."""
    monkeypatch.chdir(tmp_path)
    write("a.txt", "x")
    write("empty.txt", "\n")
    write("other.csv", "id,text\n1,x\n")
    write("quote.csv", 'prompt\n"x\n')
    write("bytes.csv", b"prompt\n\xff\n")
    assert error_of(run(*flags)) == message


def test_standard_input_may_be_closed(run, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", None)
    message = error_of(run("--input", "-", "--output", tmp_path / "a.jsonl"))
    assert message == "--input: standard input is closed. Give the path of a file."


def test_a_constraint_that_no_row_can_have_is_one_error(run, save, write, tmp_path):
    pytest.importorskip("llguidance")
    flags = ["--ckpt", save(), "--input", write("a.txt", "x"), "--output", tmp_path / "a.jsonl"]
    message = error_of(run(*flags, "--n-beams", 2, "--regex", "a"))
    assert message == "--regex: not supported with beam search. Set n_beams to 1."
    assert not (Path(tmp_path) / "a.jsonl").exists()
