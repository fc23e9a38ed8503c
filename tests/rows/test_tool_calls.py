"""Tool calls in rows: what is masked, which rows are calls, and messages with the role tool."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rows.test_templates import hf_tokenizer, render
from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig
from tinylm.eval.tasks.gsm8k import GSM8K
from tinylm.rows.calculator import MAX_LENGTH
from tinylm.rows.columns import parse_conversation, unread_columns
from tinylm.rows.conversation import Conversation, Turn
from tinylm.rows.sft import build_examples
from tinylm.rows.template_factory import make_template
from tinylm.rows.tool_calls import answer_to_call, calls_in, split_calls
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.byte_char import ByteTokenizer, CharTokenizer

TOOLS = DataConfig(tools="calculator")
ANSWER = "It is 4*6=<<4*6=24>>24, and <<24-1=23>>23."
CALL = {"function": {"name": "calculator", "arguments": '{"expression": "4*6"}'}}


# --- what is masked -------------------------------------------------------------------------------


def spans(conversation: Conversation, template: str, tokenizer: Tokenizer) -> list[str]:
    """The trained parts of a conversation, as text."""
    example = make_template(template, tokenizer, tools="calculator").encode(conversation, tokenizer)
    marks = zip(example.ids.tolist(), example.trained.tolist(), strict=True)
    groups = itertools.groupby(marks, key=lambda mark: mark[1])
    return [render([i for i, _ in group], tokenizer) for trained, group in groups if trained]


@pytest.mark.parametrize(
    ("template", "tokenizer", "first", "end"),
    [
        ("instruction", ByteTokenizer(), " ", "\n<|sep|>"),
        ("plain", ByteTokenizer(), "\n", "<|eos|>"),
        ("alpaca", hf_tokenizer(), "", "</s>"),
        ("chatml", hf_tokenizer(), "", "<|im_end|>"),
    ],
)
def test_the_result_is_not_trained_and_all_else_of_an_answer_is(template, tokenizer, first, end):
    """From behind = to >>; the same text in a question is a question."""
    question = Turn("user", "What is <<1+1=2>>?")
    parts = spans((question, Turn("assistant", ANSWER)), template, tokenizer)
    assert parts == [f"{first}It is 4*6=<<4*6=", "24, and <<24-1=", f"23.{end}"]
    assert spans((question, Turn("assistant", ANSWER, trained=False)), template, tokenizer) == []


@pytest.mark.parametrize("template", ["instruction", "chatml"])
def test_the_ids_of_bytes_do_not_depend_on_the_tool_and_prompts_have_the_calls_of_training(
    template,
):
    """A byte is a token, so that the cuts at = and >> change no id; an earlier answer in a prompt is
    what training showed.
    """
    tokenizer = hf_tokenizer()
    with_tool = make_template(template, tokenizer, tools="calculator")
    turns = (Turn("user", "a"), Turn("assistant", ANSWER), Turn("user", "b"))
    plain = make_template(template, tokenizer).prompt_ids(turns, tokenizer)
    assert with_tool.prompt_ids(turns, tokenizer) == plain
    whole = with_tool.encode((*turns, Turn("assistant", "c")), tokenizer)
    assert whole.ids[: len(plain)].tolist() == plain


@given(st.text("<>=1+ a\n"))
def test_the_parts_of_a_text_are_the_text(text):
    """Every part of the tool follows an open call, which generation would answer."""
    parts = list(split_calls(text))
    assert "".join(part.text for part in parts) == text
    for before, part in zip(parts, parts[1:], strict=False):
        if part.by_tool:
            assert part.text.endswith(">>") and answer_to_call(before.text) is not None


@pytest.mark.parametrize(
    "text",
    ["cout << x = 1 >> y", "<<=5>>", "<<2+3=5", "<<2+3>>", "<<2+3=\n5>>", "<<two=2>>",
     f"<<{'1' * (MAX_LENGTH + 1)}=1>>"],
)  # fmt: skip
def test_what_is_no_call(text):
    assert calls_in(text) == [] and [part.text for part in split_calls(text)] == [text]


def test_the_notes_of_gsm8k_are_calls():
    """The built-in rows: all their notes, with the calculator's results."""
    answers = [row["answer"] for row in GSM8K.smoke]
    found = [calls_in(answer) for answer in answers]
    assert [len(calls) for calls in found] == [answer.count("<<") for answer in answers]
    assert all(call.is_right for calls in found for call in calls)


def test_a_tokenizer_without_the_characters_is_an_error():
    with pytest.raises(UserError) as error:
        make_template("instruction", CharTokenizer("abc", unknown="error"), tools="calculator")
    assert str(error.value) == (
        "data.tools: the tokenizer (char) cannot write -0123456789.error>>. Remove data.tools, or "
        "use another tokenizer."
    )


# --- rows -----------------------------------------------------------------------------------------


def test_the_calls_of_a_split_are_counted(tmp_path: Path):
    """Two calls of three rows are right; 24.00 is 24, and 7 is not 5."""
    answers = ("<<4*6=24.00>>24", "<<2+3=7>>7", "no call")
    rows = [{"prompt": "x", "completion": answer} for answer in answers]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = DataConfig(dataset=str(path), val_dataset=str(path), tools="calculator")
    template = make_template("instruction", ByteTokenizer(), tools="calculator")
    given_rows = {"template": template, "tokenizer": ByteTokenizer(), "train_on": "response"}
    _, report = build_examples(data, "train", 0, seq_len=64, **given_rows)
    assert report.notes() == [
        "training: 2 calls of the calculator, 1 with another result than it gives"
    ]
    path.write_text(json.dumps(rows[2]) + "\n", encoding="utf-8")
    _, report = build_examples(data, "train", 0, seq_len=64, **given_rows)
    assert report.notes() == [
        "training: 0 calls of the calculator in 1 row, as <<6*4=24>>: data.tools has no effect"
    ]


def messages(*items: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "How many?"}, *items]}


def assistant(content: Any, *calls: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls) or None, **more}


def tool(content: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": "a"}


@pytest.mark.parametrize(
    ("items", "text"),
    [
        ([assistant("It is ", CALL), tool("24"), assistant("24.")], "It is <<4*6=24>>24."),
        ([assistant(None, CALL), tool("24"), assistant("So 24.")], "<<4*6=24>>So 24."),
        (
            [assistant(None, CALL), tool([{"type": "text", "text": "24"}]), assistant("a", CALL),
             tool("24"), assistant([{"type": "text", "text": "b"}])],
            "<<4*6=24>>a<<4*6=24>>b",
        ),
        ([assistant("It is ", CALL), tool("24")], "It is <<4*6=24>>"),
        ([assistant("It is <<4*6=24>>24.")], "It is <<4*6=24>>24."),
    ],
)  # fmt: skip
def test_tool_messages_are_calls_in_one_answer(items, text):
    """Content parts and a message that is the call alone too; nothing is left unread."""
    row = messages(*items)
    assert parse_conversation(row, TOOLS) == (Turn("user", "How many?"), Turn("assistant", text))
    assert unread_columns(row, TOOLS) == []


def test_weight_and_system_stay_those_of_the_row():
    """Weight 0 of all messages of a turn; the column `system` and a second question."""
    row = messages(
        *(assistant("", CALL, weight=0), tool("24"), assistant("24.", weight=0)),
        *({"role": "user", "content": "Sure?"}, assistant("Yes.")),
    )
    found = parse_conversation(row | {"system": "Be brief."}, TOOLS)
    assert [turn.role for turn in found] == ["system", "user", "assistant", "user", "assistant"]
    assert found[2] == Turn("assistant", "<<4*6=24>>24.", trained=False)


OTHER = {"function": {"name": "search", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (
            [assistant("a", CALL), assistant("b")],
            "messages[2]: must be the result of the call before it, a tool message.",
        ),
        ([assistant("a", CALL)], "messages[1]: the call has no result."),
        (
            [assistant("a"), tool("24")],
            "messages[2]: a tool message must follow a message with a call.",
        ),
        (
            [assistant("a", CALL), tool("2 > 1")],
            "messages[2]: the result of a call must be one line without < and >.",
        ),
        (
            [assistant("a", CALL), tool("24"), assistant("b", weight=0)],
            "messages[3].weight: must be that of the message before the call.",
        ),
        (
            [assistant("a", CALL, CALL), tool("24")],
            "messages[1].tool_calls: must be a list of one call. Write a message for each call.",
        ),
        (
            [assistant("a", OTHER), tool("24")],
            "messages[1].tool_calls[0].function: must call the function calculator. "
            "Remove rows with other tools.",
        ),
        (
            [assistant("a", {"function": {"name": "calculator", "arguments": "{"}}), tool("24")],
            "messages[1].tool_calls[0].function.arguments: is not JSON.",
        ),
        (
            [
                assistant(
                    "a", {"function": {"name": "calculator", "arguments": {"expression": "x"}}}
                )
            ],
            'messages[1].tool_calls[0].function.arguments: must be {"expression": TEXT} with digits '
            "and +-*/().% only.",
        ),
    ],
)
def test_what_is_no_call_of_the_calculator_is_an_error(items, message):
    with pytest.raises(UserError) as error:
        parse_conversation(messages(*items), TOOLS)
    assert str(error.value).startswith(message)
