r"""The only place that knows how a conversation is written for a model: prompt templates.

    Conversation    turns of a system, a user and an assistant, in their order
    Template        writes one as tokens and says which of them are trained           `make_template`
                    instruction, alpaca, chatml, plain: written out below
                    chat_template: the tokenizer's own, run in a process apart (sandbox.py)

Every template keeps three promises, whatever the texts are. Each answer is trained, and so is the one token behind it that
ends it: a model that never sees its answers end never stops. Everything else is not trained. And no text that a user or
a data set brings becomes a special token: only the template's own markers are special. What `prompt_ids` gives to ask a
model is, token for token, what training has shown it before an answer.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Literal

import numpy as np

from tinylm.common.errors import UserError
from tinylm.rows.sandbox import Sandbox
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokens.packing import Example

Role = Literal["system", "user", "assistant"]
# How published tokenizers spell the token that opens a text; their files' bos_token is not kept, these names are.
KNOWN_BOS_TOKENS = ("<s>", "<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>")


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: Role
    text: str
    input: str = ""
    """what an instruction is to be applied to, where the data keep the two apart (Alpaca's input)"""

    @property
    def full_text(self) -> str:
        """Text and input together, for templates that have no place of its own for the input."""
        return f"{self.text}\n\n{self.input}" if self.input else self.text


Conversation = tuple[Turn, ...]
# Stages of training after which a model is asked in the template that its config names.
CHAT_STAGES = ("sft", "dpo")


@dataclass(frozen=True)
class Exchange:
    """A question, with what a system said before it, and its answer; None where that is still to come."""

    question: Conversation
    answer: Turn | None
    first: bool


def split_exchanges(conversation: Conversation) -> Iterator[Exchange]:
    """The conversation as questions and answers.

    Raises:
        UserError: turns do not alternate between user and assistant, after at most one of a system at the start.
    """
    start = 0
    for place, turn in enumerate(conversation):
        before = conversation[place - 1].role if place else None
        if turn.role == "system" and place:
            raise UserError(
                f"turn {place + 1}: system: only the first turn can be the system's. Move it to the start, or take it out."
            )
        if turn.role == before:
            raise UserError(
                f"turn {place + 1}: a second {turn.role} turn in a row. Join the two, or take the row out."
            )
        if turn.role == "assistant" and before != "user":
            raise UserError(
                f"turn {place + 1}: assistant: no user turn stands before it. Begin with the user's, or take the row out."
            )
        if turn.role == "assistant":
            yield Exchange(conversation[start:place], turn, first=start == 0)
            start = place + 1
    if start < len(conversation):
        yield Exchange(conversation[start:], None, first=start == 0)


class Template(ABC):
    """How conversations are written as tokens."""

    name: str

    @abstractmethod
    def encode(self, conversation: Conversation, tokenizer: Tokenizer) -> Example:
        """The tokens of a conversation that ends with an answer, and which of them are trained.

        Raises:
            UserError: the turns are in no order that the template can write, or the tokenizer cannot write a text.
        """

    @abstractmethod
    def prompt_ids(self, conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
        """The tokens of a conversation that ends with a question, up to where its answer begins."""

    @abstractmethod
    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The tokens that end an answer: first the one that training puts there, then the end of a text if it is another."""


def make_template(name: str, tokenizer: Tokenizer) -> Template:
    """The template that data.template calls `name`.

    Raises:
        UserError: the tokenizer lacks what it needs.
    """
    if name == "chat_template":
        return ChatTemplate(tokenizer)
    if name == "chatml":
        _marker(tokenizer, IM_START), _marker(tokenizer, IM_END)
    return WRITTEN[name]


# --- templates that are written here ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class WrittenTemplate(Template):
    """A template made of what stands before an answer, the answer, and the token that ends it."""

    name: str
    question: Callable[[Exchange, Tokenizer], Sequence[str | int]]
    """texts and markers before the answer"""
    answer: Callable[[Exchange, Turn], str]
    """the answer as it is trained"""
    close: Callable[[Tokenizer], int]

    def encode(self, conversation: Conversation, tokenizer: Tokenizer) -> Example:
        ids: list[int] = []
        trained: list[bool] = []
        _require_answer(conversation)
        for exchange in split_exchanges(conversation):
            assert exchange.answer is not None, "only the last question can be without an answer"
            question = self._question_ids(exchange, tokenizer)
            answer = [
                *_text_ids(self.answer(exchange, exchange.answer), tokenizer),
                self.close(tokenizer),
            ]
            ids += question + answer
            trained += [False] * len(question) + [True] * len(answer)
        return Example(np.array(ids, dtype=np.int64), np.array(trained, dtype=bool))

    def prompt_ids(self, conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
        _require_question(conversation)
        *told, last = split_exchanges(conversation)
        before = (
            self.encode(conversation[: -len(last.question)], tokenizer).ids.tolist() if told else []
        )
        return before + self._question_ids(last, tokenizer)

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self.close(tokenizer), tokenizer.eos_id)))

    def _question_ids(self, exchange: Exchange, tokenizer: Tokenizer) -> list[int]:
        ids = _opening(tokenizer) if exchange.first else []
        for number, piece in enumerate(self.question(exchange, tokenizer)):
            ids += (
                [piece]
                if isinstance(piece, int)
                else _text_ids(piece, tokenizer, opens=exchange.first and number == 0)
            )
        return ids


def _require_question(conversation: Conversation) -> None:
    if not conversation or conversation[-1].role != "user":
        raise ValueError("a prompt ends with the user's turn")


def _require_answer(conversation: Conversation) -> None:
    if not conversation or conversation[-1].role != "assistant":
        raise UserError(
            "the last turn is not the assistant's, so there is nothing to learn from it. Add the answer, or take the turn out."
        )


def _opening(tokenizer: Tokenizer) -> list[int]:
    """The token that published tokenizers want at the start of a text, if this is one of those."""
    names = (
        {name: id for id, name in tokenizer.special_names.items()}
        if isinstance(tokenizer, HFTokenizer)
        else {}
    )
    return next(([names[name]] for name in KNOWN_BOS_TOKENS if name in names), [])


def _text_ids(text: str, tokenizer: Tokenizer, *, opens: bool = False) -> list[int]:
    """The ids of a text; where it does not open the conversation, without the space that some tokenizers put before a text."""
    return (
        tokenizer.encode(text)
        if opens or not _opens_with_space(tokenizer)
        else _without_opening_space(text, tokenizer.encode)
    )


@lru_cache(maxsize=8)
def _opens_with_space(tokenizer: Tokenizer) -> bool:
    """Whether the ids of a text are others behind a line end than alone."""
    if not isinstance(tokenizer, HFTokenizer):
        return False
    behind, newline, alone = tokenizer.encode_batch(["\na", "\n", "a"])
    return behind != newline + alone


def _without_opening_space(text: str, encode: Callable[[str], list[int]]) -> list[int]:
    """The ids that `text` has behind a line end, where the ids of the line end are among them."""
    newline, both = encode("\n"), encode(f"\n{text}")
    return both[len(newline) :] if both[: len(newline)] == newline else encode(text)


def _marker(tokenizer: Tokenizer, name: str) -> int:
    """The id of the special token that is spelled so."""
    for id, special in tokenizer.special_names.items():
        if special == name:
            return id
    mend = "Set data.template to instruction, or use a tokenizer that has it"
    raise UserError(
        f"data.template: chatml needs the special token {name}, and the tokenizer ({tokenizer.kind}) has none. {mend}."
    )


def _eos(tokenizer: Tokenizer) -> int:
    return tokenizer.eos_id


def _sep(tokenizer: Tokenizer) -> int:
    """The token between examples that S0's byte tokenizer has; the end of a text where there is none."""
    return next(
        (id for id, name in tokenizer.special_names.items() if name == "<|sep|>"), tokenizer.eos_id
    )


def _instruction(exchange: Exchange, tokenizer: Tokenizer) -> list[str | int]:
    text = ""
    for turn in exchange.question:
        text += f"### {'System' if turn.role == 'system' else 'Instruction'}: {turn.text}\n"
        text += f"### Input: {turn.input}\n" if turn.input else ""
    return [f"{text}### Output:"]


# Taori et al. 2023, "Stanford Alpaca": the words that models tuned on its data have seen.
_ALPACA_TASK = "Below is an instruction that describes a task"
_ALPACA_OPENING = f"{_ALPACA_TASK}. Write a response that appropriately completes the request."
_ALPACA_OPENING_INPUT = f"{_ALPACA_TASK}, paired with an input that provides further context. Write a response that appropriately completes the request."


def _alpaca(exchange: Exchange, tokenizer: Tokenizer) -> list[str | int]:
    *system, user = exchange.question
    opening = system[0].text if system else _ALPACA_OPENING_INPUT if user.input else _ALPACA_OPENING
    text = f"{opening}\n\n" if exchange.first else "\n\n"
    given = f"### Input:\n{user.input}\n\n" if user.input else ""
    return [f"{text}### Instruction:\n{user.text}\n\n{given}### Response:\n"]


IM_START, IM_END = "<|im_start|>", "<|im_end|>"


def _chatml(exchange: Exchange, tokenizer: Tokenizer) -> list[str | int]:
    start, end = _marker(tokenizer, IM_START), _marker(tokenizer, IM_END)
    pieces: list[str | int] = [] if exchange.first else ["\n"]
    for turn in exchange.question:
        pieces += [start, f"{turn.role}\n{turn.full_text}", end, "\n"]
    return [*pieces, start, "assistant\n"]


def _plain(exchange: Exchange, tokenizer: Tokenizer) -> list[str | int]:
    return ["\n".join(turn.full_text for turn in exchange.question)]


def _plain_answer(exchange: Exchange, answer: Turn) -> str:
    """The answer on a line of its own, unless the data bring white space between it and the question.

    The line end belongs to the answer: what a prompt ends with must not depend on an answer that is not known yet.
    """
    apart = exchange.question[-1].full_text[-1:].isspace() or answer.text[:1].isspace()
    return answer.text if apart else f"\n{answer.text}"


WRITTEN = {
    template.name: template
    for template in (
        WrittenTemplate(
            "instruction", _instruction, lambda exchange, answer: f" {answer.text}\n", _sep
        ),
        WrittenTemplate("alpaca", _alpaca, lambda exchange, answer: answer.text, _eos),
        WrittenTemplate(
            "chatml",
            _chatml,
            lambda exchange, answer: answer.text,
            lambda tokenizer: _marker(tokenizer, IM_END),
        ),
        WrittenTemplate("plain", _plain, _plain_answer, _eos),
    )
}


# --- the tokenizer's own template -------------------------------------------------------------------------------------


class ChatTemplate(Template):
    """The chat template that came with a tokenizer: text in Jinja, which is a program, so it runs in a process apart.

    Where answers stand is what the template marks with {% generation %}; in a template without those marks it is what
    rendering an answer adds to rendering the prompt before it. Special tokens that the template writes are special;
    those that a text spells are enclosed in two characters that no text has, and encoded as text.
    """

    name = "chat_template"

    def __init__(self, tokenizer: Tokenizer):
        source = tokenizer.chat_template if isinstance(tokenizer, HFTokenizer) else None
        if source is None:
            mend = "Set data.template to instruction"
            if isinstance(tokenizer, HFTokenizer):
                mend += " or chatml, or tokenizer.path to a folder whose tokenizer_config.json or chat_template.jinja has one"
            raise UserError(
                f"data.template: chat_template: the tokenizer ({tokenizer.kind}) has no chat template. {mend}."
            )
        assert isinstance(tokenizer, HFTokenizer)
        opening = _opening(tokenizer)
        variables = {
            "eos_token": tokenizer.eos,
            "pad_token": tokenizer.pad,
            "bos_token": tokenizer.special_names[opening[0]] if opening else None,
        }
        self._sandbox = Sandbox(
            source, {name: value for name, value in variables.items() if value is not None}
        )
        self._special = "|".join(
            re.escape(name)
            for name in sorted(tokenizer.special_names.values(), key=len, reverse=True)
        )
        question, answer = Turn("user", "1"), Turn("assistant", "2")
        probe, prompt = (
            self.encode((question, answer), tokenizer),
            self.prompt_ids((question,), tokenizer),
        )
        if probe.ids[: len(prompt)].tolist() != prompt or probe.trained.argmax() != len(prompt):
            raise UserError(
                f"{_THE_TEMPLATE} begins an answer elsewhere than its prompt ends. {_OTHER_TEMPLATE}."
            )
        self._close = int(probe.ids[np.flatnonzero(probe.trained)[-1]])

    def encode(self, conversation: Conversation, tokenizer: Tokenizer) -> Example:
        _require_answer(conversation)
        list(
            split_exchanges(conversation)
        )  # a template would say stranger things about turns in another order
        ids, trained = self._tokens(conversation, tokenizer, prompt=False)
        return Example(np.array(ids, dtype=np.int64), np.array(trained, dtype=bool))

    def prompt_ids(self, conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
        _require_question(conversation)
        list(split_exchanges(conversation))
        return self._tokens(conversation, tokenizer, prompt=True)[0]

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self._close, tokenizer.eos_id)))

    def _tokens(
        self, conversation: Conversation, tokenizer: Tokenizer, *, prompt: bool
    ) -> tuple[list[int], list[bool]]:
        """The tokens of the conversation, with the opening of an answer behind it for a prompt, and which are trained."""
        assert isinstance(tokenizer, HFTokenizer)
        guard = _Guard(self._special, [turn.full_text for turn in conversation])
        messages = [
            {"role": turn.role, "content": guard.enclose(turn.full_text)} for turn in conversation
        ]
        text, answers = (
            self._marked(messages, prompt)
            if self._sandbox.marks_answers
            else self._compared(messages, prompt)
        )
        ids: list[int] = []
        trained: list[bool] = []
        place = 0
        for start, end in answers:
            question = guard.encode(text[place:start], tokenizer, opens=place == 0)
            answer = guard.encode(text[start:end], tokenizer)
            learned = _closed(answer, tokenizer)
            ids += question + answer
            trained += (
                [False] * len(question) + [True] * learned + [False] * (len(answer) - learned)
            )
            place = end
        rest = guard.encode(text[place:], tokenizer, opens=place == 0)
        return ids + rest, trained + [False] * len(rest)

    def _marked(
        self, messages: list[dict[str, str]], prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text and where its answers stand, as the template itself says."""
        [(text, marked)] = self._sandbox.render([(messages, prompt)])
        answers = []
        for start, end in marked:
            closed = re.search(rf"(?:{self._special})\s*\Z", text[start:end])
            behind = re.compile(self._special).match(
                text, end
            )  # the mark may stop short of what ends the answer
            answers.append((start, end if closed or not behind else behind.end()))
        if len(answers) != sum(message["role"] == "assistant" for message in messages):
            raise UserError(
                f"{_THE_TEMPLATE} marks {len(answers)} answers in a conversation that has another number. {_OTHER_TEMPLATE}."
            )
        return text, answers

    def _compared(
        self, messages: list[dict[str, str]], prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text and where its answers stand, found by rendering the conversation up to each answer and with it."""
        answered = [
            place for place, message in enumerate(messages) if message["role"] == "assistant"
        ]
        requests = [
            request
            for place in answered
            for request in ((messages[:place], True), (messages[: place + 1], False))
        ]
        parts = [text for text, _ in self._sandbox.render(requests + [(messages, True)] * prompt)]
        text = parts[-1]
        if not all(text.startswith(part) for part in parts):
            mend = "Mark the answers in it with {% generation %}, or set data.template: chatml"
            raise UserError(
                f"{_THE_TEMPLATE} writes earlier turns in another way when more follow, so their answers cannot be found. {mend}."
            )
        ends = [len(part) for part in parts[: 2 * len(answered)]]
        return text, list(zip(ends[::2], ends[1::2], strict=True))


_THE_TEMPLATE = "data.template: the tokenizer's chat template"
_OTHER_TEMPLATE = "Correct the template, or set data.template to chatml or instruction"


def _closed(answer: list[int], tokenizer: Tokenizer) -> int:
    """How many tokens of an answer are trained: up to the special token that ends it, not the line end behind that."""
    places = [place for place, id in enumerate(answer, start=1) if id in tokenizer.special_names]
    if not places:
        raise UserError(
            f"{_THE_TEMPLATE} puts no special token behind an answer, and a model tuned with it would not stop. {_OTHER_TEMPLATE}."
        )
    return places[-1]


class _Guard:
    """Keeps what texts spell apart from what a template writes: two private characters around each special token's name."""

    def __init__(self, special: str, texts: list[str]):
        used = set("".join(texts))
        # The private use plane has more characters than any text uses.
        self._open, self._close = islice(
            (c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in used), 2
        )
        self._names = re.compile(special)
        self._pieces = re.compile(
            f"{self._open}({special}){self._close}|[{self._open}{self._close}]"
        )

    def enclose(self, text: str) -> str:
        return self._names.sub(lambda name: f"{self._open}{name.group()}{self._close}", text)

    def encode(self, text: str, tokenizer: HFTokenizer, *, opens: bool = False) -> list[int]:
        """The ids of rendered text: enclosed names are text, other special tokens are special."""
        ids: list[int] = []
        for number, piece in enumerate(self._pieces.split(text)):
            if piece:  # None for a character whose partner the template has cut off
                encode = tokenizer.encode if number % 2 else tokenizer.encode_markup
                apart = _opens_with_space(tokenizer) and (ids or not opens)
                ids += _without_opening_space(piece, encode) if apart else encode(piece)
        return ids
