r"""Prompt templates: how a conversation is written as tokens, and which of them are trained.

Only the answers are trained, each with the one token that ends it; a model that never sees the end
of an answer never stops. With template `instruction` and the byte tokenizer (⏎ is a newline):

    turns     user "2+2?"                            assistant "4"
    text      ### Instruction: 2+2?⏎### Output:      4⏎<|sep|>
    trained   ....................................   ^^^^^^^^^^^    . masked (label -100)  ^ trained

In a conversation of several turns every answer is trained, not only the last one:

    user     assistant   user     assistant
    prompt   answer end  prompt   answer end
    ......   ^^^^^^^^^^  ......   ^^^^^^^^^^

Every template, whatever the texts are, guarantees that

    1. each answer is trained, and so is the token that ends it, unless its weight is 0; nothing
       else is, nor is what a tool wrote in an answer (data.tools, tool_calls.py);
    2. text from a user or a data set never becomes a special token:
       only the template's own markers are special;
    3. `prompt_ids`, which inference uses, are the very ids
       that training has shown before an answer.

In this file: `Template`, and the templates that are written out here (instruction, alpaca, chatml,
plain). The tokenizer's own template is in chat_template.py; `make_template` (template_factory.py)
chooses by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from tinylm.common.errors import UserError
from tinylm.rows.conversation import Conversation, Turn
from tinylm.rows.tool_calls import split_calls
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokens.example_rows import Example

# BOS as published tokenizers spell it. Their files' bos_token setting is not kept,
# but these names are.
KNOWN_BOS_TOKENS = ("<s>", "<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>")


@dataclass(frozen=True)
class Exchange:
    """A question, preceded by a system turn if there is one, and its answer; None if the answer is
    to be generated.
    """

    question: Conversation
    answer: Turn | None
    first: bool
    """whether it opens the conversation"""


def split_exchanges(conversation: Conversation) -> Iterator[Exchange]:
    """The conversation as pairs of question and answer.

    Raises:
        UserError: turns do not alternate between user and assistant,
            after at most one system turn at the start.
    """
    start = 0
    for position, turn in enumerate(conversation):
        previous = conversation[position - 1].role if position else None
        where = f"turn {position + 1}"
        if turn.role == "system" and position:
            raise UserError(
                where, "only the first turn can be a system turn", "Move it, or remove it"
            )
        if turn.role == previous:
            raise UserError(
                where, f"a second {turn.role} turn in a row", "Join the two, or remove the row"
            )
        if turn.role == "assistant" and previous != "user":
            raise UserError(
                where,
                "an assistant turn must follow a user turn",
                "Begin with a user turn, or remove the row",
            )
        if turn.role == "assistant":
            yield Exchange(conversation[start:position], turn, first=start == 0)
            start = position + 1
    if start < len(conversation):
        yield Exchange(conversation[start:], None, first=start == 0)


def require_answer(conversation: Conversation) -> None:
    """Raise a UserError unless the conversation ends with an answer to train on."""
    if not conversation or conversation[-1].role != "assistant":
        raise UserError(
            "last turn",
            "must be an assistant turn, or there is nothing to train on",
            "Add the answer, or remove the row",
        )


def require_question(conversation: Conversation) -> None:
    """Raise a ValueError unless the conversation ends with a question to answer."""
    if not conversation or conversation[-1].role != "user":
        raise ValueError("a prompt must end with a user turn")


class Template(ABC):
    """How conversations are written as tokens."""

    name: str

    @abstractmethod
    def encode(self, conversation: Conversation, tokenizer: Tokenizer) -> Example:
        """The tokens of a conversation that ends with an answer, and which of them are trained.

        Raises:
            UserError: the turns are in an order that cannot be written,
                or the tokenizer cannot encode a text.
        """

    @abstractmethod
    def prompt_ids(self, conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
        """The tokens of a conversation that ends with a question, up to where the answer begins."""

    @abstractmethod
    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The tokens that end an answer: first the one that training appends, then EOS if it is
        another one.
        """


# --- templates written out here ---


@dataclass(frozen=True)
class WrittenTemplate(Template):
    """A template of three parts: prompt, answer, and the token that ends the answer."""

    name: str
    prompt: Callable[[Exchange, Tokenizer], Sequence[str | int]]
    """texts, and ids of markers, before the answer"""
    answer: Callable[[Exchange, Turn], str]
    """the answer as it is trained"""
    end_id: Callable[[Tokenizer], int]
    has_tools: bool = False
    """whether answers have calls of the calculator, whose results are not trained"""

    def encode(self, conversation: Conversation, tokenizer: Tokenizer) -> Example:
        require_answer(conversation)
        ids: list[int] = []
        trained: list[bool] = []
        for exchange in split_exchanges(conversation):
            assert exchange.answer is not None, "only the last question can be without an answer"
            # the prompt: seen, not trained
            prompt = self._prompt_ids(exchange, tokenizer)
            ids += prompt
            trained += [False] * len(prompt)
            # the answer and the token that ends it: trained, unless its weight is 0
            encode = partial(encode_text, tokenizer=tokenizer)
            text = self.answer(exchange, exchange.answer)
            answer, by_model = encode_answer(text, encode, has_tools=self.has_tools)
            ids += [*answer, self.end_id(tokenizer)]
            trained += [own and exchange.answer.trained for own in (*by_model, True)]
        return Example(np.array(ids, dtype=np.int64), np.array(trained, dtype=bool))

    def prompt_ids(self, conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
        require_question(conversation)
        *answered, last = split_exchanges(conversation)
        history: list[int] = []
        if answered:
            history = self.encode(conversation[: -len(last.question)], tokenizer).ids.tolist()
        return history + self._prompt_ids(last, tokenizer)

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self.end_id(tokenizer), tokenizer.eos_id)))

    def _prompt_ids(self, exchange: Exchange, tokenizer: Tokenizer) -> list[int]:
        ids = bos_ids(tokenizer) if exchange.first else []
        for number, part in enumerate(self.prompt(exchange, tokenizer)):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += encode_text(part, tokenizer, first=exchange.first and number == 0)
        return ids


def _instruction(exchange: Exchange, tokenizer: Tokenizer) -> list[str | int]:
    text = ""
    for turn in exchange.question:
        text += f"### {'System' if turn.role == 'system' else 'Instruction'}: {turn.text}\n"
        text += f"### Input: {turn.input}\n" if turn.input else ""
    return [f"{text}### Output:"]


# Taori et al. 2023, "Stanford Alpaca": the words that models tuned on its data have seen.
_ALPACA_TASK = "Below is an instruction that describes a task"
_ALPACA_RESPONSE = "Write a response that appropriately completes the request."
_ALPACA_START = f"{_ALPACA_TASK}. {_ALPACA_RESPONSE}"
_ALPACA_START_INPUT = (
    f"{_ALPACA_TASK}, paired with an input that provides further context. {_ALPACA_RESPONSE}"
)


def _alpaca(exchange: Exchange, tokenizer: Tokenizer) -> list[str | int]:
    *system, user = exchange.question
    start = _ALPACA_START_INPUT if user.input else _ALPACA_START
    if system:
        start = system[0].text
    text = f"{start}\n\n" if exchange.first else "\n\n"
    text += f"### Instruction:\n{user.text}\n\n"
    text += f"### Input:\n{user.input}\n\n" if user.input else ""
    return [f"{text}### Response:\n"]


IM_START, IM_END = "<|im_start|>", "<|im_end|>"


def _chatml(exchange: Exchange, tokenizer: Tokenizer) -> list[str | int]:
    start, end = marker_id(tokenizer, IM_START), marker_id(tokenizer, IM_END)
    parts: list[str | int] = [] if exchange.first else ["\n"]
    for turn in exchange.question:
        parts += [start, f"{turn.role}\n{turn.full_text}", end, "\n"]
    return [*parts, start, "assistant\n"]


def _plain(exchange: Exchange, tokenizer: Tokenizer) -> list[str | int]:
    return ["\n".join(turn.full_text for turn in exchange.question)]


def _plain_answer(exchange: Exchange, answer: Turn) -> str:
    """The answer on a new line, unless the data have whitespace between question and answer.

    The newline belongs to the answer: the end of a prompt must not depend on an answer
    that is not known yet.
    """
    separated = exchange.question[-1].full_text[-1:].isspace() or answer.text[:1].isspace()
    return answer.text if separated else f"\n{answer.text}"


def _eos_id(tokenizer: Tokenizer) -> int:
    return tokenizer.eos_id


def _sep_id(tokenizer: Tokenizer) -> int:
    """`<|sep|>`, which the byte tokenizer has to separate examples; EOS with other tokenizers."""
    for id, name in tokenizer.special_names.items():
        if name == "<|sep|>":
            return id
    return tokenizer.eos_id


# name, prompt, answer, the token that ends the answer
WRITTEN = {
    template.name: template
    for template in (
        WrittenTemplate(
            "instruction", _instruction, lambda _, answer: f" {answer.text}\n", _sep_id
        ),
        WrittenTemplate("alpaca", _alpaca, lambda _, answer: answer.text, _eos_id),
        WrittenTemplate(
            "chatml",
            _chatml,
            lambda _, answer: answer.text,
            lambda tokenizer: marker_id(tokenizer, IM_END),
        ),
        WrittenTemplate("plain", _plain, _plain_answer, _eos_id),
    )
}


@dataclass(frozen=True)
class AnswerApart(Template):
    """A template for training an encoder-decoder, whose decoder writes the last answer as a text of
    its own: without the newline or space that separates an answer from its prompt in one text.

        plain          Summarize: ... ⏎It rains.</s>
        encoder        Summarize: ...</s>
        decoder        It rains.</s>
    """

    of_one_text: Template

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.of_one_text.name

    def encode(self, conversation: Conversation, tokenizer: Tokenizer) -> Example:
        whole = self.of_one_text.encode(conversation, tokenizer)
        *before, last = conversation
        prompt = self.prompt_ids(tuple(before), tokenizer)
        answer = [*tokenizer.encode(last.text), self.stop_ids(tokenizer)[0]]
        ids = np.array([*prompt, *answer], dtype=np.int64)
        trained = [*whole.trained[: len(prompt)], *([last.trained] * len(answer))]
        return Example(ids, np.array(trained, dtype=bool))

    def prompt_ids(self, conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
        return self.of_one_text.prompt_ids(conversation, tokenizer)

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        return self.of_one_text.stop_ids(tokenizer)


# --- text to ids ---


def marker_id(tokenizer: Tokenizer, name: str) -> int:
    """The id of a special token.

    Raises:
        UserError: the tokenizer does not have it.
    """
    for id, special in tokenizer.special_names.items():
        if special == name:
            return id
    raise UserError(
        "data.template",
        f"chatml needs the special token {name}, which the tokenizer ({tokenizer.kind}) does not "
        "have",
        f"Set tokenizer.special_tokens=[{IM_START},{IM_END}] to add it, or data.template=instruction",
    )


def bos_ids(tokenizer: Tokenizer) -> list[int]:
    """The BOS token that published tokenizers expect at the start of a text;
    [] for other tokenizers.
    """
    if not isinstance(tokenizer, HFTokenizer):
        return []
    ids = {name: id for id, name in tokenizer.special_names.items()}
    return next(([ids[name]] for name in KNOWN_BOS_TOKENS if name in ids), [])


def encode_text(text: str, tokenizer: Tokenizer, *, first: bool = False) -> list[int]:
    """The ids of one part of a conversation.

    SentencePiece-style tokenizers prepend a space to every text they encode. Only the first part of
    a conversation keeps it: the parts are one text, cut where markers or masks begin.
    """
    if first or not prepends_space(tokenizer):
        return tokenizer.encode(text)
    return encode_without_space(text, tokenizer.encode)


def encode_answer(
    text: str, encode: Callable[[str], list[int]], *, has_tools: bool
) -> tuple[list[int], list[bool]]:
    """The ids of an answer, and which of them the model wrote: not the results of tool calls."""
    if not has_tools:
        ids = encode(text)
        return ids, [True] * len(ids)
    ids, by_model = [], []
    for part in split_calls(text):
        new = encode(part.text) if part.text else []
        ids += new
        by_model += [not part.by_tool] * len(new)
    return ids, by_model


@lru_cache(maxsize=8)
def prepends_space(tokenizer: Tokenizer) -> bool:
    """Whether a text alone has other ids than the same text after a newline."""
    if not isinstance(tokenizer, HFTokenizer):
        return False
    joined, newline, alone = tokenizer.encode_batch(["\na", "\n", "a"])
    return joined != newline + alone


def encode_without_space(text: str, encode: Callable[[str], list[int]]) -> list[int]:
    """The ids of `text` after a newline, without those of the newline, so that no space is
    prepended to it.
    """
    newline, joined = encode("\n"), encode(f"\n{text}")
    if joined[: len(newline)] == newline:
        return joined[len(newline) :]
    return encode(text)  # the newline merged into the text's first token
