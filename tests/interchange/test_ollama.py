"""The Modelfile beside a GGUF file: its template, executed as Ollama would, gives the text that the model was tuned
with. There is no Ollama here; a reader of its file format and of Go's templates are in this folder.
"""

import re

import pytest

from tests.interchange.conftest import quick
from tests.interchange.go_template import execute
from tinylm.checkpoint import format as checkpoint_format
from tinylm.interchange.gguf import export_gguf
from tinylm.interchange.ollama import chat_pieces, go_literal
from tinylm.rows.conversation import Turn
from tinylm.rows.template_factory import make_template
from tinylm.tokenizer.factory import tokenizer_from_plain

CONVERSATIONS = [
    [("user", "2+2?")],
    [("system", "Be short."), ("user", "a {{b}}\nc")],
    [("user", "2+2?"), ("assistant", "4"), ("user", 'and """3+3"""?')],
    [
        ("system", "Be\n\nshort."),
        ("user", "1"),
        ("assistant", "2\n3"),
        ("user", "4"),
        ("assistant", "5"),
        ("user", "naïve 東京?"),
    ],
]
LLAMA3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n\\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"
)
# Qwen's: a system turn of its own if there is none; Mistral's: none at all.
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nHi \"you\"<|im_end|>' }}{% endif %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
SHOUTED = LLAMA3.replace("m['content']", "m['content']|upper")


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Commands and their values as ollama/parser/parser.go reads them: a value ends with its line, unless it began
    with quotes that are not closed there.
    """
    commands, lines = [], text.split("\n")
    while lines:
        name, _, value = lines.pop(0).partition(" ")
        if name == "PARAMETER":
            key, _, value = value.partition(" ")
            name = f"{name} {key}"
        for quote in ('"""', '"'):
            if value.startswith(quote):
                while len(value) < 2 * len(quote) or not value.endswith(quote):
                    value += "\n" + lines.pop(0)
                value = value[len(quote) : -len(quote)]
                break
        if name:
            commands.append((name, value))
    return commands


def with_chat_template(bpe, source: str):
    return tokenizer_from_plain(bpe("gpt2").to_plain() | {"chat_template": source})


def text_of(template, conversation, tokenizer) -> str:
    """The text that the template writes, special tokens by name."""
    ids = template.prompt_ids(conversation, tokenizer)
    names = tokenizer.special_names
    parts, run = [], []
    for id in [*ids, None]:
        if id is None or id in names:
            parts.append(tokenizer.decode(run))
            parts.append(names.get(id, ""))
            run = []
        else:
            run.append(id)
    return "".join(parts)


TEMPLATES = ["instruction", "alpaca", "chatml", "plain", "chat_template"]


@pytest.mark.slow
@pytest.mark.parametrize("name", quick(TEMPLATES, *TEMPLATES[:4]))
def test_the_template_of_a_modelfile_writes_what_was_trained(name, save, bpe, tmp_path):
    tokenizer = with_chat_template(bpe, DEFAULT_SYSTEM + LLAMA3)
    path = save(tokenizer, stage="sft", config={"data": {"template": name}})
    export_gguf(path, tmp_path / "a b.gguf")
    commands = dict(read_modelfile((tmp_path / "a b.Modelfile").read_text(encoding="utf-8")))
    assert commands["FROM"] == "./a b.gguf"
    template = make_template(name, tokenizer)
    for turns in CONVERSATIONS:
        conversation = tuple(Turn(role, text) for role, text in turns)
        messages = [{"role": turn.role, "content": turn.text} for turn in conversation]
        expected = text_of(template, conversation, tokenizer)
        assert execute(commands["TEMPLATE"], messages) == expected


@pytest.mark.slow
def test_a_modelfile_has_the_stops_the_context_the_system_text_and_the_sampling(save, tmp_path):
    config = {
        "data": {"template": "chatml"},
        "sampling": {"stop": ["\n\n", "### User"], "top_k": 5, "temperature": 0.5},
    }
    path = save(stage="sft", config=config, sliding_window=40)
    checkpoint_format.write(path, checkpoint_format.read(path) | {"system": 'Say "yes"\nor "no"'})
    export_gguf(path, tmp_path / "a.gguf")
    commands = read_modelfile((tmp_path / "a.Modelfile").read_text(encoding="utf-8"))
    assert [value for name, value in commands if name == "PARAMETER stop"] == [
        "<|im_end|>",
        "<|endoftext|>",
        "\n\n",
        "### User",
    ]
    found = dict(commands)
    assert found["SYSTEM"] == 'Say "yes"\nor "no"'
    assert found["PARAMETER num_ctx"] == "40"
    parameters = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")
    assert [found[f"PARAMETER {name}"] for name in parameters] == ["0.5", "5", "1", "0", "1"]


@pytest.mark.slow
def test_a_base_model_continues_the_prompt(save, tmp_path):
    export_gguf(save(), tmp_path / "a.gguf")
    commands = dict(read_modelfile((tmp_path / "a.Modelfile").read_text(encoding="utf-8")))
    assert execute(commands["TEMPLATE"], [{"role": "user", "content": "Once"}]) == "Once"
    assert commands["PARAMETER stop"] == "<|endoftext|>"
    assert "SYSTEM" not in commands


def test_an_answer_that_begins_as_the_model_wrote_it_keeps_its_one_space(bpe):
    """Ollama sends a model's answer back as it was: with the space after `### Output:`."""
    template, tokenizer = make_template("instruction", bpe("gpt2")), bpe("gpt2")
    pieces = chat_pieces(lambda turns: text_of(template, turns, tokenizer))
    for answer in ("4", " 4"):
        turns = [("user", "2+2?"), ("assistant", answer), ("user", "?")]
        text = execute(
            pieces.go_template(), [{"role": role, "content": text} for role, text in turns]
        )
        assert text.startswith("### Instruction: 2+2?\n### Output: 4\n<|endoftext|>### Instr")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "is_expressed"),
    [(NO_SYSTEM + LLAMA3, True), (SHOUTED, False)],
)
def test_a_template_that_does_more_than_go_can_is_none(source, is_expressed, bpe):
    tokenizer = with_chat_template(bpe, source)
    template = make_template("chat_template", tokenizer)
    pieces = chat_pieces(lambda turns: text_of(template, turns, tokenizer))
    assert (pieces is not None) == is_expressed
    if pieces is not None:
        assert (pieces.system is None) == (NO_SYSTEM in source)


@pytest.mark.slow
def test_a_template_that_cannot_be_written_is_left_to_ollama(save, bpe, tmp_path, caplog):
    caplog.set_level("INFO", "tinylm")
    tokenizer = with_chat_template(bpe, SHOUTED)
    path = save(tokenizer, stage="sft", config={"data": {"template": "chat_template"}})
    checkpoint_format.write(path, checkpoint_format.read(path) | {"system": 'a"""\nb'})
    export_gguf(path, tmp_path / "a.gguf")
    assert not re.search("TEMPLATE|SYSTEM", (tmp_path / "a.Modelfile").read_text(encoding="utf-8"))
    assert caplog.messages == [
        "note: the chat template cannot be written as Ollama's; it uses its own if it knows the one in the file",
        "note: the system text cannot be written in a Modelfile",
    ]


def test_text_that_ollama_would_read_otherwise_is_a_string_of_go():
    """Actions, the quotes of a Modelfile, and characters that it drops."""
    text = 'a {{ b """ c\u00a0d\u200de\r\n"f"\U000e0001'
    written = go_literal(text)
    assert '"""' not in written
    assert all(character.isprintable() or character == "\n" for character in written)
    assert execute(written, [{"content": ""}]) == text
