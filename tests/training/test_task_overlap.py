"""Rows of training.eval_tasks in the training text: the warning, and the command that removes them."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune
import train
from data import PretrainData
from tinylm.__main__ import main as run_command
from tinylm.cli import data_clean
from tinylm.cli.program import Parser
from tinylm.config.loader import load_config
from tinylm.eval.tasks.data import evaluation_texts
from tinylm.eval.tasks.table import EVALUATED_TASKS
from tinylm.eval.tasks.task import TaskExample
from tinylm.rows.conversation import Turn
from tinylm.text.contamination import ngram_index
from tinylm.text.shingles import word_hashes, words_of
from tinylm.tokenizer.byte_char import ByteTokenizer
from training import task_overlap
from training.stages.dpo import PreferenceData
from training.stages.grpo import PromptData
from training.task_overlap import notes_on_tasks
from training.task_scores import TaskScores

QUESTIONS = [
    "Natalia sold clips to 48 of her friends in April, and half as many in May. How many in all?",
    "Weng earns 12 dollars an hour for babysitting on weekday evenings, and did 50 minutes of it.",
    "How many are eleven and four?",  # too short to be compared
]
Make = Callable[..., Path]


@pytest.fixture
def rows(write: Callable[[str, str], Path]) -> Path:
    lines = [json.dumps({"question": text, "answer": "#### 3"}) for text in QUESTIONS]
    return write("test.jsonl", "\n".join(lines) + "\n")


def corpus_with(*texts: str) -> str:
    """Documents, of which the last of every hundred is one of `texts`."""
    lines = []
    for text in texts:
        lines += [f"document {n} says {text[:3]} and nothing that is of any use" for n in range(99)]
        lines.append(text)
    return "\n".join(lines) + "\n"


def config_of(make_config: Make, dataset: Path, rows: Path, **data: Any) -> Path:
    training = {"eval_tasks": {"gsm8k": str(rows)}, "max_steps": 1, "val_batches": 1}
    training |= {"val_every_steps": 100, "save_every_steps": 100}
    return make_config(data={"dataset": str(dataset), **data}, training=training)


def notes_of(config: Path, stage: str = "pretrain", data: Any = None) -> list[str]:
    """The warnings for the questions as rows of gsm8k."""
    loaded = load_config(config, [])
    task, (source,) = EVALUATED_TASKS["gsm8k"], loaded.training.eval_tasks.values()
    with open(source, encoding="utf-8") as file:
        numbered = enumerate(map(json.loads, file), start=1)
        examples = [task.example(f"test.jsonl:{n}", row) for n, row in numbered]
    if data is None:
        data = PretrainData(loaded, ByteTokenizer())
        data.prepare()
    scores = TaskScores(((task, examples),), ByteTokenizer(), None, 0)
    return notes_on_tasks(loaded, stage, scores, data)


@pytest.mark.slow
def test_the_warning_names_the_command_that_removes_the_rows(
    make_config: Make, tmp_path: Path, rows: Path, write: Any, monkeypatch: Any, capsys: Any
) -> None:
    """Two of three rows are in the text, in other letters and punctuation; validation is elsewhere. The
    text that the command writes has no warning, and a resumed run says nothing again.
    """
    text = write("a.txt", corpus_with(f"He read: {QUESTIONS[0].upper()}", QUESTIONS[1]))
    val = write("val.txt", "validation has its own document here\n" * 9)
    config = config_of(make_config, text, rows, val_dataset=str(val))
    monkeypatch.chdir(tmp_path)
    assert train.main(["--config", str(config)]) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "eval_tasks" in line]
    said, command = warning.split(" To remove them: python -m tinylm ")
    assert said == (
        "warning: 2 of 3 rows (1 too short to compare) of training.eval_tasks.gsm8k are in the training "
        f'text, for example {rows}:1 in {text}: "natalia sold clips to 48 of her friends in april and half '
        'as"; scores look better than they are.'
    )
    assert run_command(shlex.split(command)) == 0
    cleaned = f"data.dataset={tmp_path / 'clean.jsonl'}"
    fresh = ["training.checkpoint_dir=new", "training.run_name=new"]
    assert train.main(["--config", str(config), cleaned, *fresh]) == 0
    assert train.main(["--config", str(config), "training.max_steps=2"]) == 0
    err = capsys.readouterr().err
    assert "resuming" in err and "eval_tasks" not in err


def test_text_of_a_row_without_the_runs_of_a_row_has_no_warning(
    make_config: Make, rows: Path, write: Any
) -> None:
    """12 words in a row are one too few."""
    twelve = " ".join(QUESTIONS[0].split()[:12])
    text = write("a.txt", corpus_with(twelve, QUESTIONS[2]))
    val = str(write("val.txt", "validation\n"))
    assert notes_of(config_of(make_config, text, rows, val_dataset=val)) == []


def test_of_a_long_text_evenly_chosen_documents_are_read(
    make_config: Make, rows: Path, write: Any, monkeypatch: Any
) -> None:
    """Every document is the row: of 100 documents each third is 34, and the last of them is seen."""
    text = write("a.txt", f"{QUESTIONS[0]}\n" * 100)
    config = config_of(make_config, text, rows, val_dataset=str(write("val.txt", "validation\n")))
    monkeypatch.setattr(task_overlap, "MOST_TOKENS", 34 * (len(QUESTIONS[0]) + 1))
    seen = []
    monkeypatch.setattr(task_overlap, "words_of", lambda text: seen.append(text) or words_of(text))
    (note,) = notes_of(config)
    assert "1 of 3 rows (1 too short to compare)" in note
    assert "(1 of 3 documents was read)" in note
    assert seen == [QUESTIONS[0]] * 34


def test_one_long_document_is_read_up_to_the_limit_and_the_warning_says_so(
    make_config: Make, rows: Path, write: Any, monkeypatch: Any
) -> None:
    """The first row is within the limit, the second after it."""
    text = write("a.txt", f"{QUESTIONS[0]} {QUESTIONS[1]}\n")
    config = config_of(make_config, text, rows, val_dataset=str(write("val.txt", "validation\n")))
    monkeypatch.setattr(task_overlap, "MOST_TOKENS", len(QUESTIONS[0]))
    (note,) = notes_of(config)
    read = f"(only the first {len(QUESTIONS[0])} tokens of one document were read)"
    assert "1 of 3 rows" in note and read in note


def test_rows_of_fine_tuning_are_named_and_a_common_instruction_is_no_row(
    make_config: Make, write: Any, capsys: Any
) -> None:
    """The nine words that begin every question of sst2 are in each training row; the review of the
    second evaluation row is in training row 3 alone.
    """
    review = "a quiet film that takes its time and earns every one of its small surprises"
    training = [{"sentence": f"a plot number {n} of no use", "label": n % 2} for n in range(8)]
    training[2]["sentence"] = review
    evaluation = [{"sentence": "not this one at all", "label": 0}, {"sentence": review, "label": 1}]
    for name, lines in (("train.jsonl", training), ("test.jsonl", evaluation)):
        write(name, "".join(json.dumps(line) + "\n" for line in lines))
    file, test = write("val.jsonl", json.dumps(evaluation[0]) + "\n"), "test.jsonl"
    test = str(file.with_name("test.jsonl"))
    config = make_config(
        model={"max_seq_len": 192},
        data={"dataset": str(file.with_name("train.jsonl")), "val_dataset": str(file)}
        | {"task": "sst2", "template": "plain"},
        training={"seq_len": 192, "max_steps": 1, "train_on": "all"}
        | {"eval_tasks": {"sst2": test}, "val_every_steps": 100, "save_every_steps": 100},
    )
    assert finetune.main(["--config", str(config)]) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "eval_tasks" in line]
    assert warning == (
        "warning: 1 of 2 rows (1 too short to compare) of training.eval_tasks.sst2 are in the training "
        f"text, for example {test}:2 in {file.with_name('train.jsonl')}:3: "
        f'"{" ".join(review.split()[:13])}"; scores look better than they are. '
        f"Remove such rows from {file.with_name('train.jsonl')}"
    )


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_rows_of_other_stages_are_looked_at_too(
    make_config: Make, rows: Path, write: Any, kind: str
) -> None:
    lines = [
        {"prompt": f"{text} ({n})", "chosen": f"yes {n}", "rejected": "no", "response": f"yes {n}"}
        for n, text in enumerate([*QUESTIONS, *QUESTIONS])
    ]
    file = write("rows.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    config = config_of(make_config, file, rows, val_dataset=str(file), template="plain")
    section = {"dpo": "dpo={beta: 0.1}", "grpo": "grpo={group_size: 2}"}[kind]
    long = ["model.max_seq_len=200", "training.seq_len=200"]
    loaded = load_config(config, [section, *long])
    if kind == "dpo":
        data = PreferenceData(loaded, ByteTokenizer())
    else:
        data = PromptData(loaded, ByteTokenizer(), "cpu")
    data.prepare()
    (note,) = notes_of(config, kind, data)
    assert note.startswith("warning: 2 of 3 rows") and f"in {file}:1:" in note


@pytest.mark.parametrize(
    ("dataset", "data", "command"),
    [
        ("a b.bin", {}, "--data TEXT --out clean.jsonl --against gsm8k={rows}"),
        ("no/body", {}, "--data hf:no/body::train --out clean.jsonl --against gsm8k={rows}"),
        (
            "a*.txt",
            {"text_field": "body", "document_separator": "\n\n"},
            "--data 'a*.txt' --out clean.jsonl --against gsm8k={rows} --text-field body --separator '\n\n'",
        ),
    ],
)
def test_the_command_has_the_flags_of_the_settings(
    make_config: Make, rows: Path, dataset: str, data: dict[str, str], command: str
) -> None:
    config = load_config(config_of(make_config, Path(dataset), rows, **data), [])
    expected = f"To remove them: python -m tinylm data clean {command.format(rows=rows)}"
    fix = task_overlap.fix_of(config, "pretrain", "gsm8k")
    assert fix == expected
    parser = Parser()
    data_clean.add_arguments(parser)
    words = shlex.split(fix.removeprefix("To remove them: python -m tinylm data clean"))
    parsed = parser.parse_args(words)
    assert len(parsed.data) == 1
    assert parsed.against == [f"gsm8k={rows}"]
    assert parsed.out == Path("clean.jsonl")
    assert parsed.text_field == config.data.text_field
    assert parsed.separator == config.data.document_separator


words = st.lists(st.sampled_from("abc"), min_size=8, max_size=20).map(" ".join)


parts = st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(8, 20))


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(words, min_size=1, max_size=4), parts=st.lists(parts, max_size=3))
def test_rows_in_a_document_are_those_of_a_search_by_hand(
    texts: list[str], parts: list[tuple[int, int, int]]
) -> None:
    """A row is in a document if one of its runs of 13 words is, or of all its words if it has fewer. The
    document is made of parts of the rows.
    """
    document: list[str] = []
    for number, start, stop in parts:
        document += texts[number % len(texts)].split()[start:stop]
    index = ngram_index((str(number), text) for number, text in enumerate(texts))
    expected = set()
    for number, text in enumerate(texts):
        row = text.split()
        n = min(len(row), 13)
        runs = [row[start : start + n] for start in range(len(row) - n + 1)]
        if any(document[start : start + n] in runs for start in range(len(document) - n + 1)):
            expected.add(str(number))
    assert index.rows_in(word_hashes(document)) == expected


def test_what_all_rows_of_a_task_have_is_no_text_of_a_row() -> None:
    task = EVALUATED_TASKS["samsum"]
    examples = [
        task.example(f"{n}", {"dialogue": f"talk {n}", "summary": f"sum {n}"}) for n in (1, 2)
    ]
    assert list(evaluation_texts(examples)) == [
        ("1", "talk 1"),
        ("1", "sum 1"),
        ("2", "talk 2"),
        ("2", "sum 2"),
    ]
    assert list(evaluation_texts(examples[:1]))[0] == ("1", "Summarize this dialogue.")


def test_a_short_question_is_also_compared_joined_with_its_input() -> None:
    """5 and 6 words are 11 joined; two parts of 8 words each are not joined."""
    asked = [
        Turn("user", f"Translate this number {n} please", f"one two three four five {n}")
        for n in (1, 2)
    ]
    examples = [TaskExample(f"{n}", turn, f"done {n}") for n, turn in enumerate(asked, start=1)]
    assert list(evaluation_texts(examples))[:4] == [
        ("1", "Translate this number 1 please"),
        ("1", "one two three four five 1"),
        ("1", "done 1"),
        ("1", "Translate this number 1 please\none two three four five 1"),
    ]
    index = ngram_index(evaluation_texts(examples))
    assert index.names == ["1", "2"]
    asked = [
        Turn("user", f"the eight words of question {n} are enough", f"a {n} " * 4) for n in (1, 2)
    ]
    examples = [TaskExample(f"{n}", turn, "") for n, turn in enumerate(asked, start=1)]
    assert len(list(evaluation_texts(examples))) == 4
