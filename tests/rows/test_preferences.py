"""Preferences from rows of many shapes, and the rows that are skipped or truncated (FAULTS: D9)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig
from tinylm.rows.conversation import Turn
from tinylm.rows.preferences import (
    Preference,
    PreferencePair,
    build_pairs,
    parse_preference,
)
from tinylm.rows.skipped_rows import RowReport
from tinylm.rows.template_factory import make_template
from tinylm.tokenizer.byte_char import ByteTokenizer

ROOT = Path(__file__).parents[2]
TOKENIZER = ByteTokenizer()
QUESTION = Turn("user", "2+2?")
EXPECTED = Preference((QUESTION,), "4", "5")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def shared(side: str, text: str | None) -> dict[str, str | None]:
    return {"from": side, "value": text}


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, {}),
        ({"question": "2+2?", "chosen": "4", "rejected": "5", "id": 7}, {}),
        ({"instruction": "2+2?", "input": "", "output": "4", "chosen": "4", "rejected": "5"}, {}),
        (
            {"frage": "2+2?", "gut": "4", "schlecht": "5"},
            {"columns": {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}},
        ),
        ({"prompt": [user("2+2?")], "chosen": "4", "rejected": "5"}, {}),
        ({"prompt": [user("2+2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]}, {}),
        ({"prompt": "2+2?", "chosen": [assistant("4")], "rejected": [assistant("5")]}, {}),
        (
            {
                "prompt": "2+2?",
                "chosen": [user("2+2?"), assistant("4")],
                "rejected": [user("2+2?"), assistant("5")],
            },
            {},
        ),
        (
            {"chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")]},
            {},
        ),
        (
            {
                "chosen": [shared("human", "2+2?"), shared("gpt", "4")],
                "rejected": [shared("human", "2+2?"), shared("gpt", "5")],
            },
            {},
        ),
        (
            {
                "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4",
                "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5",
            },
            {},
        ),
    ],
)
def test_every_published_shape_gives_the_same_preference(row, settings):
    assert parse_preference(row, DataConfig(**settings)) == EXPECTED


def test_a_null_answer_is_empty_in_either_format():
    for turns in (
        [user("2+2?"), {"role": "assistant", "content": None}],
        [shared("human", "2+2?"), shared("gpt", None)],
    ):
        assert parse_preference({"chosen": turns, "rejected": turns}, DataConfig()).chosen == ""


def test_an_input_is_kept_apart_from_its_instruction():
    row = {"instruction": "add", "input": "2 and 2", "chosen": "4", "rejected": "5"}
    assert parse_preference(row, DataConfig()).prompt == (Turn("user", "add", "2 and 2"),)


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be brief.", "question": "2+2?", "chosen": "4", "rejected": "5"},
        {
            "system": "Be brief.",
            "chosen": [user("2+2?"), assistant("4")],
            "rejected": [user("2+2?"), assistant("5")],
        },
    ],
)
def test_the_column_system_is_the_first_turn_of_the_prompt(row):
    prompt = parse_preference(row, DataConfig()).prompt
    assert prompt == (Turn("system", "Be brief."), QUESTION)


def test_parts_of_text_are_joined_in_a_preference_too():
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    history = {"role": "user", "content": parts}
    row = {"chosen": [history, assistant("4")], "rejected": [history, assistant("5")]}
    assert parse_preference(row, DataConfig()) == EXPECTED


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (
            assistant("4") | {"weight": 0},
            "chosen[1].weight: must be 1, since a preference is between two last answers, got 0. Corr",
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]},
            "chosen[1].tool_calls: tool calls are not supported. Remove rows with tool calls",
        ),
    ],
)
def test_a_last_answer_that_cannot_be_compared_is_an_error(last, message):
    row = {"chosen": [user("2+2?"), last], "rejected": [user("2+2?"), assistant("5")]}
    with pytest.raises(UserError) as refused:
        parse_preference(row, DataConfig())
    assert message in str(refused.value)


def test_bad_pairs_are_skipped_up_to_the_limit_and_unread_columns_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5", "score": 3},
        {"prompt": "2+2?", "chosen": "4"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = DataConfig(dataset=str(path), val_fraction=1e-9, skip_bad_rows=1)
    template = make_template("plain", TOKENIZER)
    found, report = build_pairs(data, "train", 0, template, TOKENIZER, 64)
    assert [pair.chosen.location for pair in found] == [f"{path}:1"]
    assert report.notes() == [
        "training: kept 1 of 2 rows",
        f"training: skipped 1 row with a mistake (data.skip_bad_rows 1): {path}:2: rejected: "
        "missing; the row has prompt, chosen",
        "training: columns not read: score; data.columns names those that are",
    ]


def test_dialogues_are_split_after_their_common_turns():
    """The common start of both answers is not part of the prompt; consecutive turns of one side
    are joined; "Assistant:" in an answer is text."""
    history = "\n\nHuman: hi\n\nHuman: there\n\nAssistant: hello\n\nHuman: sum?\n\nAssistant: "
    preference = parse_preference(
        {"chosen": f"{history}It is 4. Assistant: ok", "rejected": f"{history}It is 5.\n"},
        DataConfig(),
    )
    assert preference.prompt == (
        Turn("user", "hi\n\nthere"),
        Turn("assistant", "hello"),
        Turn("user", "sum?"),
    )
    assert (preference.chosen, preference.rejected) == ("It is 4. Assistant: ok", "It is 5.")


def test_a_dialogue_without_a_last_answer_has_an_empty_answer():
    """As in hh-rlhf, where the shorter dialogue may end within the common part."""
    history = "\n\nHuman: sum?\n\nAssistant:"
    assert parse_preference(
        {"chosen": f"{history} 4", "rejected": history}, DataConfig()
    ) == Preference((Turn("user", "sum?"),), "4", "")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "chosen": "b"},
            "rejected: missing; the row has prompt, chosen. Add it, or set data.columns: {rejected: "
            "its name in the data}.",
        ),
        (
            {"prompt": "a", "chosen": 1, "rejected": "b"},
            "chosen: must be a string, got a number. Correct the row, or remove it.",
        ),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "prompt: must not be empty."),
        (
            {"prompt": None, "chosen": "b", "rejected": "c"},
            "prompt: must be a string, got null.",
        ),
        (
            {"prompt": [], "chosen": "b", "rejected": "c"},
            "prompt: an answer must follow a user turn. Add the question, or remove the row.",
        ),
        (
            {"chosen": [assistant("b")], "rejected": [assistant("c")]},
            "prompt or question: missing; the row has chosen, rejected.",
        ),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": "c"},
            "rejected: must be a list of turns, got a string. Write both answers as text, or both",
        ),
        ({"chosen": [], "rejected": []}, "chosen: must be a list of turns, got an empty list."),
        (
            {"chosen": [user("a")], "rejected": [user("a")]},
            "chosen[0].role: the last turn must be the assistant's, got user. Add the answer",
        ),
        (
            {"chosen": [user(""), assistant("b")], "rejected": [user(""), assistant("c")]},
            "chosen[0].content: must not be empty.",
        ),
        (
            {"chosen": ["b"], "rejected": ["c"]},
            "chosen[0]: must be an object with role and content, got a string.",
        ),
        (
            {
                "chosen": [assistant("a"), assistant("b")],
                "rejected": [assistant("a"), assistant("c")],
            },
            "chosen: an answer must follow a user turn.",
        ),
        (
            {"chosen": "b", "rejected": "c"},
            'chosen, rejected: the row has no prompt, and as dialogues ("\\n\\nHuman: '
            '...\\n\\nAssistant: ...") they have no common question.',
        ),
        (
            {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
            "chosen: an answer must follow a user turn.",
        ),
    ],
)
def test_a_row_that_is_not_a_preference_is_named_by_its_key(row, message):
    with pytest.raises(UserError) as refused:
        parse_preference(row, DataConfig())
    assert message in str(refused.value)


def test_no_row_of_the_tiny_preferences_is_skipped():
    """40 rows of four shapes, none of them skipped."""
    data = DataConfig(dataset=str(ROOT / "data" / "tiny_preferences.jsonl"))
    read = [
        build_pairs(data, which, 0, make_template("instruction", TOKENIZER), TOKENIZER, 256)
        for which in ("train", "val")
    ]
    assert sum(len(made) for made, _ in read) == 40
    assert [report.notes() for _, report in read] == [[], []]


# --- pairs ----------------------------------------------------------------------------------------


@pytest.fixture
def made_of(tmp_path: Path) -> Callable[..., tuple[list[PreferencePair], RowReport]]:
    """The pairs of rows in p.jsonl, in the template plain, whose answers begin with a newline."""

    def made_of(*rows: Any, seq_len: int = 64) -> tuple[list[PreferencePair], RowReport]:
        path = tmp_path / "p.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = DataConfig(dataset=str(path), val_fraction=1e-9)
        return build_pairs(data, "train", 0, make_template("plain", TOKENIZER), TOKENIZER, seq_len)

    return made_of


def pair_row(prompt: str = "q", chosen: str = "good", rejected: str = "bad") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_the_answer_and_the_token_that_ends_it_are_trained_and_nothing_else(made_of):
    [pair], _ = made_of(pair_row("q?", "yes", "no"))
    for example, answer in ((pair.chosen, b"\nyes"), (pair.rejected, b"\nno")):
        assert bytes(example.ids[:-1].tolist()) == b"q?" + answer
        assert example.ids[-1] == TOKENIZER.eos_id
        assert example.trained.tolist() == [False] * 2 + [True] * (len(answer) + 1)


def test_earlier_answers_are_not_trained(made_of):
    """In supervised fine-tuning they are; here they belong to the prompt."""
    history = [user("a"), assistant("b"), user("c")]
    [pair], _ = made_of(
        {"chosen": [*history, assistant("yes")], "rejected": [*history, assistant("no")]}
    )
    assert TOKENIZER.decode(pair.chosen.ids[pair.chosen.trained]) == "\nyes"
    assert TOKENIZER.decode(pair.rejected.ids[pair.rejected.trained]) == "\nno"


def test_each_reason_for_skipping_a_row_is_reported_with_places(made_of, tmp_path):
    """D9: equal answers, empty or null ones, prompts that leave no room, conversations that differ
    before the answer. The rest is trained on."""
    parted = {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]}
    dialogues = {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: e",
    }
    rows = [
        pair_row(),
        pair_row(chosen="bad"),
        pair_row(rejected=" \n"),
        {"prompt": "q", "chosen": None, "rejected": "a"},
        parted,
        dialogues,
    ]
    rows += [
        pair_row("q" * 100),
        pair_row(chosen="a" * 90, rejected="a" * 91),
        *[pair_row(chosen="bad")] * 3,
    ]
    made, report = made_of(*rows)
    assert [pair.chosen.location for pair in made] == [f"{tmp_path / 'p.jsonl'}:1"]
    at = [f"{tmp_path / 'p.jsonl'}:{line}" for line in range(12)]
    assert report.notes() == [
        "training: kept 1 of 11 rows",
        f"training: skipped 4 rows: the two answers are equal ({at[2]}, {at[9]}, {at[10]} and 1 "
        f"more). Give pairs in which one answer is better.",
        f"training: skipped 2 rows: an answer is empty ({at[3]}, {at[4]}). Give pairs with two answers.",
        f"training: skipped 2 rows: the two conversations differ before the last answer ({at[5]}, "
        f"{at[6]}). Give pairs of answers to the same prompt.",
        f"training: skipped 1 row: the prompt fills the context of 64 tokens ({at[7]}). Raise "
        f"training.seq_len, or shorten the prompts.",
        f"training: skipped 1 row: the two answers differ only after the context of 64 tokens "
        f"({at[8]}). Raise training.seq_len.",
    ]


def test_nothing_but_skipped_rows_is_an_error(made_of):
    """D9: a run on no rows has no gradient."""
    with pytest.raises(
        UserError,
        match=r"^data.dataset: no training rows are left: skipped 2 rows: the two answers are equal "
        r"\(.*:1, .*:2\). Give pairs in which one answer is better.$",
    ):
        made_of(pair_row(chosen="bad"), pair_row(chosen="bad"))


def test_a_long_answer_is_cut_and_a_prompt_may_just_leave_room_for_one_token(made_of):
    """In a context of 8 inputs, 9 tokens: the last is only a target. A prompt of 8 leaves room for
    one target; of 9, for none.

    After white space an answer begins without a line end.
    """
    rows = [
        pair_row("q" * 4, "a" * 3, "b" * 9),
        pair_row("q" * 7 + " ", "aa", "bb"),
        pair_row("q" * 8 + " "),
        pair_row("q" * 2, "a", "b"),
    ]
    made, report = made_of(*rows, seq_len=8)
    assert [[len(example.ids) for example in pair[:2]] for pair in made] == [[9, 9], [9, 9], [5, 5]]
    assert [[int(example.trained.sum()) for example in pair[:2]] for pair in made] == [
        [5, 5],
        [1, 1],
        [3, 3],
    ]
    assert made[0].rejected.ids[-1] != TOKENIZER.eos_id == made[0].chosen.ids[-1]
    assert (report.kept, report.truncated) == (3, 2)
    assert report.notes()[2] == "training: 2 of 3 rows lost their end to the context of 8 tokens"


def test_a_bad_row_is_named_with_file_line_and_key(made_of, tmp_path):
    with pytest.raises(UserError, match=r"p.jsonl:2: chosen: must be a string, got a number"):
        made_of(pair_row(), {"prompt": "a", "chosen": 1, "rejected": "b"})
