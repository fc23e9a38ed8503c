"""Rows of fine-tuning data: every published shape is read, every mistake is named by file, line and key."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig, RowColumn
from tinylm.rows.columns import COLUMNS, parse_conversation, unread_columns
from tinylm.rows.conversation import Conversation, Turn
from tinylm.rows.row_files import TINY_ROWS, folder_or_tiny_rows, read_rows, resolve_dataset
from tinylm.rows.sft import build_examples, count_shared_examples, count_shared_prompts
from tinylm.rows.skipped_rows import RowReport
from tinylm.rows.template_factory import make_template
from tinylm.text.sources import Which
from tinylm.tokenizer.byte_char import ByteTokenizer, CharTokenizer
from tinylm.tokens.example_rows import Example, collate_examples, fill_rows
from tinylm.tokens.packing import IGNORE_INDEX

ROOT = Path(__file__).parents[2]
QUESTION, ANSWER = Turn("user", "2+2?"), Turn("assistant", "4")
BRIEF = Turn("system", "Be brief.")


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def pairs(n: int) -> list[dict[str, str]]:
    return [{"prompt": f"{i}+{i}?", "completion": str(2 * i)} for i in range(n)]


def both(data: DataConfig) -> tuple[list, list]:
    return list(read_rows(data, "train", 0)), list(read_rows(data, "val", 0))


# --- files ---


def test_the_place_of_a_row_is_file_and_line(write):
    path = write("mine.jsonl", "\n" + lines(*pairs(2)))
    read = list(read_rows(DataConfig(dataset=str(path), val_fraction=1e-9), "train", 0))
    assert read == [(f"{path}:2", pairs(2)[0]), (f"{path}:3", pairs(2)[1])]


def test_every_file_format_has_the_same_rows(write, tmp_path):
    import pandas
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pairs(30)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    files = [
        write("rows.jsonl", lines(*rows)),
        write("rows.json", "\ufeff" + json.dumps(rows)),
        tmp_path / "rows.parquet",
    ]
    frame = pandas.DataFrame(rows)
    for name, delimiter in (("rows.csv", ","), ("rows.tsv.gz", "\t"), ("rows.csv.zst", ",")):
        frame.to_csv(tmp_path / "plain", sep=delimiter, index=False)
        content = (tmp_path / "plain").read_bytes()
        if name.endswith(".zst"):
            content = pa.compress(content, codec="zstd", asbytes=True)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        files.append(tmp_path / name)
    read = [
        [row for _, row in read_rows(DataConfig(dataset=str(file)), "train", 0)] for file in files
    ]
    assert all(of_file == read[0] for of_file in read)
    assert 20 < len(read[0]) < 30


def test_no_row_is_in_both_splits(write):
    """Equal rows are in the same split, whatever their position and order of keys, and no row is lost."""
    rows = pairs(100)
    path = write("rows.jsonl", lines(*rows, *[dict(reversed(row.items())) for row in rows]))
    train, val = (
        sorted(json.dumps(row, sort_keys=True) for _, row in part)
        for part in both(DataConfig(dataset=str(path)))
    )
    assert len(train) + len(val) == 200
    assert not set(train) & set(val)
    assert val and train[::2] == train[1::2]


def test_limits_and_another_validation_source(write):
    data = DataConfig(
        dataset=str(write("a.jsonl", lines(*pairs(9)))),
        val_dataset=str(write("b.jsonl", lines(*pairs(5)))),
        train_docs=7,
        val_docs=3,
    )
    train, val = both(data)
    assert [row for _, row in train] == pairs(7)
    assert [row for _, row in val] == pairs(3)


def test_a_hub_dataset_gives_all_its_columns(monkeypatch):
    import datasets

    monkeypatch.setattr("tinylm.text.hub_dataset.require_hub", lambda where, fix: None)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, config, *, split, streaming: datasets.Dataset.from_list(pairs(3)),
    )
    data = DataConfig(dataset="owner/pairs", val_split="test")
    assert list(read_rows(data, "train", 0)) == [
        (f"owner/pairs (train): row {number}", row) for number, row in enumerate(pairs(3), start=1)
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt"\n', "a.jsonl:2: not JSON: "),
        (
            "a.jsonl",
            "[1]\n",
            'a.jsonl:1: must be an object such as {"instruction": "...", "output": "..."}, got a '
            "list. Correct the row.",
        ),
        (
            "a.jsonl",
            "",
            "a.jsonl: no rows, only blank lines or nothing at all. Give a file with rows.",
        ),
        (
            "a.jsonl",
            "\n \n",
            "a.jsonl: no rows, only blank lines or nothing at all. Give a file with rows.",
        ),
        (
            "a.json",
            "{}",
            "a.json: must be a list of objects, got an object. Write [{...}, {...}], or one object per line as .jsonl.",
        ),
        ("a.json", '[{"a": 1}, {"b"', "a.json: row 2: not JSON: "),
        ("a.json", "[]", "a.json: no rows"),
        ("a.json", '[{"a": 1}, null]', "a.json: row 2: must be an object"),
        (
            "SMSSpamCollection",
            "ham hello\n",
            "SMSSpamCollection:1: must be ham or spam, a tab, and a message; there is no tab. Correct the line.",
        ),
        (
            "a.yaml",
            "a,b\n",
            "a.yaml: not a kind of file with rows (.parquet, SMSSpamCollection, .jsonl, .json, .csv, "
            ".tsv; also .gz, .bz2, .xz, .zst). Convert it, or name it by its kind.",
        ),
        (
            "a.txt",
            "A document.\n",
            "Convert it, or name it by its kind. Documents are for train.py.",
        ),
    ],
)
def test_a_file_without_rows_is_named(write, name, text, message):
    data = DataConfig(dataset=str(write(name, text)), val_fraction=1e-9)
    with pytest.raises(UserError) as refused:
        list(read_rows(data, "train", 0))
    assert message in str(refused.value)


def test_bytes_that_are_not_utf8_are_an_error(tmp_path):
    (tmp_path / "a.json").write_bytes(b'["\xff"]')
    with pytest.raises(
        UserError, match=r"a.json: not UTF-8 text \(byte 2\). Save the file as UTF-8."
    ):
        list(read_rows(DataConfig(dataset=str(tmp_path / "a.json")), "train", 0))


def test_too_few_rows_for_two_splits_are_counted(write):
    with pytest.raises(
        UserError,
        match=r"validation got 0 of 2 rows \(data.val_fraction 1e-09\). Give more rows, another data.val_fraction, or",
    ):
        list(
            read_rows(
                DataConfig(dataset=str(write("a.jsonl", lines(*pairs(2)))), val_fraction=1e-9),
                "val",
                0,
            )
        )


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("stride", 4),
        ("max_doc_len", 4),
        ("document_separator", "x"),
        ("token_dtype", "uint16"),
        ("mix", [{"dataset": "a.txt"}]),
        ("text_field", "answer"),
        ("shuffle_window", 9),
    ],
)
def test_a_setting_that_does_not_apply_is_an_error(setting, value):
    with pytest.raises(
        UserError,
        match=f"^data.{setting}: does not apply to rows for fine-tuning. Remove it. "
        r"Documents are for train.py.$",
    ):
        resolve_dataset(DataConfig.model_validate({setting: value}))


# --- S0's folder ---


def test_messages_and_instructions_in_a_folder_are_both_read(write, tmp_path):
    """S0's layout: data/raw/sms_spam_collection/SMSSpamCollection beside data/raw/instruction-data.json."""
    write("raw/sms_spam_collection/SMSSpamCollection", "ham\tOk lar\tfine\nspam\tFree entry!\n")
    write(
        "raw/instruction-data.json",
        json.dumps([{"instruction": "Name a color.", "input": "", "output": "Red."}]),
    )
    data = DataConfig(dataset=str(tmp_path / "raw"), val_fraction=1e-9)
    template, tokenizer = make_template("instruction", ByteTokenizer()), ByteTokenizer()
    made, _ = build_examples(data, "train", 0, template, tokenizer, 256, train_on="all")
    sep = tokenizer.sep_id
    assert [tokenizer.decode(example.ids[:-1]) for example in made] == [
        "### Instruction: Name a color.\n### Output: Red.\n",
        "### Instruction: classify if the SMS is spam or ham\n### Input: Ok lar\tfine\n### Output: ham\n",
        "### Instruction: classify if the SMS is spam or ham\n### Input: Free entry!\n### Output: spam\n",
    ]
    assert [example.ids[-1] for example in made] == [sep, sep, sep]
    assert all(
        example.trained.tolist() == [False] + [True] * (len(example.ids) - 1) for example in made
    )


def test_a_folder_without_rows_is_replaced_by_the_tiny_rows_with_a_note(
    write, tmp_path, monkeypatch
):
    folder = write("empty/readme.md", "nothing").parent
    name, note = folder_or_tiny_rows(str(folder))
    assert name == TINY_ROWS
    names = "SMSSpamCollection, instruction-data.json or any other file of rows"
    assert note == f"data.dataset: {folder} has no {names}; using {TINY_ROWS} instead"
    monkeypatch.chdir(ROOT)
    tiny = Path(TINY_ROWS).read_text(encoding="utf-8").splitlines()
    train, val = both(DataConfig(dataset=str(folder)))
    assert len(train) + len(val) == len(tiny) > 40
    assert len(val) > 0


def test_a_folder_with_several_splits_is_an_error(write, tmp_path):
    """Otherwise the test split would be trained on."""
    for name in ("test.jsonl", "validation.jsonl"):
        write(name, lines(*pairs(2)))
    assert resolve_dataset(DataConfig(dataset=str(tmp_path)))[1] is None
    write("train-1.jsonl", lines(*pairs(2)))
    with pytest.raises(UserError) as refused:
        resolve_dataset(DataConfig(dataset=str(tmp_path)))
    found = (
        f"data.dataset: {tmp_path}: has train-1.jsonl and validation.jsonl, and every file of a "
        f"folder is trained on"
    )
    assert (
        str(refused.value) == f"{found}. Set data.dataset={tmp_path}/train-1.jsonl, and "
        f"data.val_dataset={tmp_path}/validation.jsonl to validate on that."
    )
    write("train-2.jsonl", lines(*pairs(2)))
    with pytest.raises(UserError, match=r"Set data.dataset=.*/train\*, and "):
        resolve_dataset(DataConfig(dataset=str(tmp_path)))


def test_a_folder_with_rows_is_used_as_it_is(write):
    folder = str(write("some/a.jsonl", lines(*pairs(2))).parent)
    assert folder_or_tiny_rows(folder) == (folder, None)


# --- shapes of rows ---

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]
SHARED = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "2+2?"},
    {"from": "gpt", "value": "4"},
]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"instruction": "2+2?", "input": "", "output": "4"}, (QUESTION, ANSWER)),
        ({"instruction": "2+2?", "input": None, "output": "4"}, (QUESTION, ANSWER)),
        ({"instruction": "2+2?", "response": "4"}, (QUESTION, ANSWER)),
        (
            {"instruction": "Add.", "input": "2, 2", "output": "4"},
            (Turn("user", "Add.", "2, 2"), ANSWER),
        ),
        ({"prompt": "2+2?", "completion": "4"}, (QUESTION, ANSWER)),
        ({"prompt": "2+2?", "response": "4"}, (QUESTION, ANSWER)),
        ({"question": "2+2?", "answer": "4"}, (QUESTION, ANSWER)),
        ({"messages": CHAT}, (Turn("system", "Be brief."), QUESTION, ANSWER)),
        ({"conversations": SHARED}, (Turn("system", "Be brief."), QUESTION, ANSWER)),
        (
            {"label": "spam", "text": "Free!"},
            (
                Turn("user", "classify if the SMS is spam or ham", "Free!"),
                Turn("assistant", "spam"),
            ),
        ),
        ({"system": "Be brief.", "conversations": SHARED[1:]}, (BRIEF, QUESTION, ANSWER)),
        ({"system": "Be brief.", "conversations": SHARED}, (BRIEF, QUESTION, ANSWER)),
        ({"system": " ", "messages": CHAT[1:]}, (QUESTION, ANSWER)),
        (
            {"system_prompt": "Be brief.", "question": "2+2?", "response": "4"},
            (BRIEF, QUESTION, ANSWER),
        ),
        (
            {"messages": [{"role": "user", "content": parts("2+", "2?")}, CHAT[2]]},
            (QUESTION, ANSWER),
        ),
        (
            {"messages": [CHAT[1], CHAT[2] | {"weight": 1, "tool_calls": None}]},
            (QUESTION, ANSWER),
        ),
        (
            {"messages": [CHAT[1], CHAT[2] | {"weight": 0}, *CHAT[1:]]},
            (QUESTION, Turn("assistant", "4", trained=False), QUESTION, ANSWER),
        ),
        ({"id": 7, "prompt": "as a chat", "messages": CHAT[1:]}, (QUESTION, ANSWER)),
        ({"prompt": "2+2?", "target": "4"}, (QUESTION, ANSWER)),
        ({"conversations": CHAT[1:]}, (QUESTION, ANSWER)),
        ({"messages": SHARED[1:]}, (QUESTION, ANSWER)),
        ({"messages": [turn | {"from": None} for turn in CHAT[1:]]}, (QUESTION, ANSWER)),
        ({"messages": None, "instruction": "2+2?", "output": "4"}, (QUESTION, ANSWER)),
    ],
)
def test_the_keys_of_a_row_decide_its_shape(row: dict, turns: Conversation):
    assert parse_conversation(row, DataConfig()) == turns


def test_data_rows_overrides_the_keys():
    row = {"messages": CHAT, "instruction": "2+2?", "output": "4"}
    assert parse_conversation(row, DataConfig(rows="alpaca")) == (QUESTION, ANSWER)


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        (
            {"prompt": "frage", "completion": "antwort"},
            {"frage": "2+2?", "antwort": "4", "text": "x"},
        ),
        ({"instruction": "task", "output": "text"}, {"task": "2+2?", "text": "4", "input": ""}),
        ({"messages": "chat"}, {"chat": CHAT[1:]}),
        ({"conversations": "chat"}, {"chat": SHARED[1:]}),
    ],
)
def test_columns_may_have_other_names_in_the_data(columns, row):
    assert parse_conversation(row, DataConfig(columns=columns)) == (QUESTION, ANSWER)


def test_the_schema_has_the_columns_of_rows():
    assert tuple(COLUMNS) == get_args(RowColumn)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (
            {"id": 1, "foo": 2},
            {},
            "row: must have instruction and output, prompt and completion, messages, or "
            "conversations; it has id, foo. Name its columns",
        ),
        ({}, {}, "it has no keys."),
        (
            {"text": "A document."},
            {},
            "it has text. Name its columns, for example data.columns: {prompt: question}. "
            "Documents are for train.py.",
        ),
        (
            {"prompt": "a"},
            {},
            "completion or response or answer or target: missing; the row has prompt. Add it, or "
            "set data.columns: {completion: its name in",
        ),
        ({"a": "b"}, {"rows": "alpaca"}, "instruction: missing; the row has a."),
        (
            {"prompt": "a", "completion": "b"},
            {"columns": {"completion": "c"}},
            "c: missing; the row has prompt, completion.",
        ),
        ({"instruction": "a", "output": "b"}, {"columns": {"input": "c"}}, "c: missing;"),
        (
            {"prompt": "a", "completion": 4},
            {},
            "completion: must be a string, got a number. Correct the row, or remove it.",
        ),
        ({"prompt": "a", "completion": None}, {}, "completion: must be a string, got null."),
        (
            {"prompt": "a", "completion": " \n"},
            {},
            "completion: must not be empty. Correct the row, or remove it.",
        ),
        ({"prompt": "", "completion": "a"}, {}, "prompt: must not be empty."),
        (
            {"instruction": "a", "input": 3, "output": "b"},
            {},
            "input: must be a string, got a number.",
        ),
        (
            {"messages": "hello"},
            {},
            "messages: must be a list of turns, got a string. Correct the row, or set data.rows.",
        ),
        ({"messages": []}, {}, "messages: none of 0 turns is the assistant's. Add an answer"),
        ({"messages": CHAT[:2]}, {}, "messages: none of 2 turns is the assistant's."),
        (
            {"messages": [*CHAT, "x"]},
            {},
            "messages[3]: must be an object with role and content, got a string.",
        ),
        (
            {"messages": [*CHAT, {"role": "user"}]},
            {},
            "messages[3].content: missing; the turn has role.",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            {},
            "messages[0].role: must be one of system, user, assistant, human, gpt, got tool.",
        ),
        (
            {"messages": [{"role": 1, "content": "x"}]},
            {},
            "messages[0].role: must be one of system, user, assistant, human, gpt, got a number.",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            {},
            "messages[0].content: must be a string, got null.",
        ),
        (
            {"messages": [{"role": "user", "content": ""}]},
            {},
            "messages[0].content: must not be empty.",
        ),
        (
            {"conversations": [{"from": "bing", "value": "x"}]},
            {},
            "conversations[0].from: must be one of system, user, assistant, human, gpt, got bing.",
        ),
        (
            {"conversations": [{"speaker": "user"}]},
            {},
            "conversations[0].role: missing; the turn has speaker. Add it, or remove the row.",
        ),
        (
            {"messages": [*CHAT[:2], CHAT[2] | {"weight": 0.5}]},
            {},
            "messages[2].weight: must be 1 (trained) or 0 (not trained), got 0.5. Correct the row",
        ),
        (
            {"messages": [*CHAT[:2], CHAT[2] | {"weight": True}]},
            {},
            "messages[2].weight: must be 1 (trained) or 0 (not trained), got True.",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}]},
            {},
            "messages[0].tool_calls: tool calls are not supported. Remove rows with tool calls.",
        ),
        (
            {"messages": [*CHAT, {"role": "tool", "content": "x"}]},
            {},
            "got tool. Remove rows with tool calls.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            {},
            "messages[0].content[0].type: must be text, got image_url. Correct the row",
        ),
        (
            {"messages": [{"role": "user", "content": ["x"]}]},
            {},
            "messages[0].content[0]: must be an object with type and text, got a string.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
            {},
            "messages[0].content[0].text: must be a string, got a number.",
        ),
        (
            {"messages": [{"role": "user", "content": []}]},
            {},
            "messages[0].content: must not be empty.",
        ),
        (
            {"system": "Be long.", "messages": CHAT},
            {},
            "system: the turns begin with another system turn. Keep one of the two.",
        ),
        ({"system": 3, "messages": CHAT}, {}, "system: must be a string, got a number."),
        ({"label": "maybe", "text": "x"}, {}, "label: must be ham or spam, got maybe."),
        ({"prompt": "a", "\x1b[31m": 1}, {}, "the row has prompt, \\x1b[31m."),
    ],
)
def test_a_row_that_is_not_a_conversation_is_named_by_its_key(row, settings, message):
    with pytest.raises(UserError) as refused:
        parse_conversation(row, DataConfig(**settings))
    assert message in str(refused.value)


# --- examples ---


def made_of(
    path: Path, seq_len: int, which: Which = "train", **keywords: Any
) -> tuple[list[Example], RowReport]:
    data = DataConfig(dataset=str(path), val_fraction=1e-9)
    return build_examples(
        data,
        which,
        0,
        make_template("plain", ByteTokenizer()),
        ByteTokenizer(),
        seq_len,
        **({"train_on": "response"} | keywords),
    )


def test_a_long_answer_is_cut_and_a_prompt_that_fills_the_context_is_skipped_and_named(write):
    """D6. Question, newline, answer and end are n + 1 + m + 1 tokens; 9 fit a context of 8, since
    the last is not an input."""
    rows = [
        {"prompt": "q" * n, "completion": "a" * m}
        for n, m in ((4, 3), (4, 9), (8, 1), (9, 1), (20, 1), (30, 1), (40, 1))
    ]
    made, report = made_of(path := write("a.jsonl", lines(*rows)), 8)
    assert [len(example.ids) for example in made] == [9, 9, 9]
    assert [int(example.trained.sum()) for example in made] == [5, 5, 1]
    assert made[0].ids[-1] == ByteTokenizer().eos_id != made[1].ids[-1]
    assert (report.kept, report.truncated) == (3, 2)
    assert report.notes() == [
        "training: kept 3 of 7 rows",
        f"training: skipped 4 rows: the prompt fills the context of 8 tokens ({path}:4, {path}:5, "
        f"{path}:6 and 1 more). Raise training.seq_len, or shorten the prompts.",
        "training: 2 of 3 rows lost their end to the context of 8 tokens",
    ]


def test_nothing_but_skipped_rows_is_an_error(write):
    """D6: the loss over no target is not a number."""
    path = write("a.jsonl", lines({"prompt": "q" * 20, "completion": "a"}))
    with pytest.raises(
        UserError,
        match=r"^data.dataset: no training rows are left: skipped 1 row: the prompt fills the "
        r"context of 8 tokens \(.*:1\). Raise training.seq_len, or shorten the prompts.$",
    ):
        made_of(path, 8)


def test_with_train_on_all_every_token_but_the_first_is_a_target(write):
    made, report = made_of(
        write("a.jsonl", lines({"prompt": "q" * 20, "completion": "a"})), 8, train_on="all"
    )
    assert made[0].trained.tolist() == [False] + [True] * 8
    assert report.skipped == {}


def test_a_task_makes_its_own_conversations(write):
    """A task hands in a function from its columns to turns."""
    path = write("a.jsonl", lines({"sentence": "Lovely.", "label": 1}))
    made, _ = made_of(
        path,
        32,
        to_conversation=lambda row: (
            Turn("user", row["sentence"]),
            Turn("assistant", ["bad", "good"][row["label"]]),
        ),
    )
    assert ByteTokenizer().decode(made[0].ids) == "Lovely.\ngood"
    assert made[0].location == f"{path}:1"


def test_columns_that_are_not_read_are_named(write):
    """In Dolly the context belongs to the question: without it the answers would be trained
    without their source."""
    rows = [
        {"id": "", "instruction": "Who?", "context": "Ada wrote it.", "response": "Ada.", "n": 1},
        {"instruction": "Why?", "response": "So.", "by": "me"},
    ]
    path = write("a.jsonl", lines(*rows))
    assert made_of(path, 64)[1].notes() == [
        "training: columns not read: context, n, by; data.columns names those that are"
    ]
    data = DataConfig(dataset=str(path), val_fraction=1e-9, columns={"input": "context"})
    assert unread_columns(rows[0], data) == ["n"]
    assert made_of(path, 64, to_conversation=lambda row: (QUESTION, ANSWER))[1].notes() == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "completion": None},
            "a.jsonl:2: completion: must be a string, got null.",
        ),
        (
            {"messages": [*CHAT, CHAT[2]]},
            "a.jsonl:2: turn 4: a second assistant turn in a row. Join",
        ),
        ({"messages": [*CHAT, CHAT[1]]}, "a.jsonl:2: last turn: must be an assistant turn"),
        ({"prompt": "é", "completion": "b"}, "a.jsonl:2: position 0: the character 'é'"),
        ({"prompt": "\ud800", "completion": "b"}, "a.jsonl:2: the text has the lone surrogate"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_key(write, row, message):
    """E1, whether the mistake is in the row, in the order of its turns, or a character the
    tokenizer lacks."""
    data = DataConfig(dataset=str(write("a.jsonl", lines(pairs(1)[0], row))), val_fraction=1e-9)
    tokenizer = CharTokenizer("0123456789+? aBbe.rif\n", unknown="error")
    with pytest.raises(UserError) as refused:
        build_examples(
            data, "train", 0, make_template("plain", tokenizer), tokenizer, 32, train_on="response"
        )
    assert message in str(refused.value)


def test_rows_in_both_splits_are_counted(write):
    """E13."""
    train, _ = made_of(write("a.jsonl", lines(*pairs(6))), 32)
    val, _ = made_of(
        write("b.jsonl", lines({"prompt": "0+0?", "completion": "none"}, *pairs(9)[4:])), 32
    )
    assert count_shared_examples(train, val) == 2
    assert count_shared_prompts(train, val) == 3


# --- weights, odd rows ---


def conversation_of(*weights: int | None) -> dict[str, Any]:
    """A row with an answer for each weight."""
    turns = []
    for number, weight in enumerate(weights):
        turns += [
            {"role": "user", "content": f"q{number}"},
            {"role": "assistant", "content": f"a{number}", "weight": weight},
        ]
    return {"messages": turns}


def trained_text(example: Example, tokenizer: Any) -> str:
    return tokenizer.decode(example.ids[example.trained])


@pytest.mark.parametrize("template", ["instruction", "alpaca", "plain"])
def test_an_answer_of_weight_0_is_seen_and_not_trained(write, template):
    """The same tokens as with weight 1; of the targets, the first answer and its end are missing."""
    path = write("a.jsonl", lines(conversation_of(0, 1), conversation_of(1, None)))
    data = DataConfig(dataset=str(path), val_fraction=1e-9)
    tokenizer = ByteTokenizer()
    (some, every), _ = build_examples(
        data, "train", 0, make_template(template, tokenizer), tokenizer, 400, train_on="response"
    )
    assert some.ids.tolist() == every.ids.tolist()
    assert "a0" in trained_text(every, tokenizer)
    assert "a0" not in trained_text(some, tokenizer)
    second = np.flatnonzero(every.trained & ~some.trained)[-1] + 1
    assert some.trained[second:].tolist() == every.trained[second:].tolist()
    assert not some.trained[:second].any()


def test_with_train_on_all_an_answer_of_weight_0_is_not_trained(write):
    path = write("a.jsonl", lines(conversation_of(0, 1)))
    [example], _ = made_of(path, 64, train_on="all")
    # plain: q0, newline a0 EOS, q1, newline a1 EOS
    assert example.trained.tolist() == [False, True] + [False] * 4 + [True] * 6


def test_a_row_whose_answers_all_have_weight_0_is_skipped_and_named(write):
    path = write("a.jsonl", lines(conversation_of(0), conversation_of(1)))
    made, report = made_of(path, 64)
    assert len(made) == 1
    assert report.notes() == [
        "training: kept 1 of 2 rows",
        f"training: skipped 1 row: every answer has weight 0 ({path}:1). Give rows with an answer of weight 1.",
    ]


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_no_label_of_a_batch_is_an_answer_of_weight_0(write, packing):
    path = write("a.jsonl", lines(conversation_of(0, 1), conversation_of(1, 0)))
    made, _ = made_of(path, 32)
    rows = fill_rows(made, 32, packing)
    batch = collate_examples(
        rows, range(len(rows)), seq_len=32, pad_id=256, packed=packing == "packed"
    )
    labels = batch["labels"][batch["labels"] != IGNORE_INDEX].tolist()
    eos = ByteTokenizer().eos_id
    answers = [[*b"\na0", eos], [*b"\na1", eos]]
    assert sorted(labels) == sorted(answers[0] + answers[1])  # one answer of each row
    assert answers[0][:3] != labels[:3] or packing == "packed"


def test_bad_rows_are_skipped_up_to_the_limit_and_named(write):
    rows = [*pairs(3), {"prompt": "a", "completion": None}, {"prompt": "b"}, *pairs(9)[3:]]
    path = write("a.jsonl", lines(*rows))

    def read(n: int) -> tuple[list[Example], RowReport]:
        data = DataConfig(dataset=str(path), val_fraction=1e-9, skip_bad_rows=n)
        template = make_template("plain", ByteTokenizer())
        return build_examples(data, "train", 0, template, ByteTokenizer(), 32, train_on="response")

    with pytest.raises(UserError, match=r"a.jsonl:4: completion: must be a string, got null. Corr"):
        read(0)
    with pytest.raises(
        UserError,
        match=r"a.jsonl:5: .* missing; .*\. data.skip_bad_rows: 1 rows are already skipped\.$",
    ):
        read(1)
    made, report = read(2)
    assert [example.location for example in made] == [
        f"{path}:{n}" for n in (1, 2, 3, *range(6, 12))
    ]
    assert report.notes() == [
        "training: kept 9 of 11 rows",
        f"training: skipped 2 rows with a mistake (data.skip_bad_rows 2): "
        f"{path}:4: completion: must be a string, got null; "
        f"{path}:5: completion or response or answer or target: missing; the row has prompt",
    ]


def test_only_bad_rows_are_an_error(write):
    path = write("a.jsonl", lines({"prompt": "b"}))
    data = DataConfig(dataset=str(path), val_fraction=1e-9, skip_bad_rows=9)
    template = make_template("plain", ByteTokenizer())
    with pytest.raises(UserError, match="no training rows are left: skipped 1 row with a mistake"):
        build_examples(data, "train", 0, template, ByteTokenizer(), 32, train_on="response")


def test_keys_of_turns_that_are_not_read_are_named():
    """tools is a column of OpenAI's format; a weight means something for an answer only."""
    row = {
        "messages": [CHAT[1] | {"name": "ann", "weight": 1}, CHAT[2] | {"weight": 1, "n": 0}],
        "tools": [{"type": "function"}],
        "n": 0,
        "none": None,
    }
    assert unread_columns(row, DataConfig()) == [
        "messages[].name", "messages[].weight", "messages[].n", "tools", "n",
    ]  # fmt: skip
