"""The chat template that comes with a tokenizer: Jinja source, a program,
so it is rendered in a sandbox (sandbox.py).

    conversation ─▶ messages ─▶ rendered text, and where each answer is ─▶ ids, and which are trained

Two problems that the templates of templates.py do not have:

    Which characters are the answer?  {% generation %} blocks of the template say so. In a template
                                      without them, an answer is what rendering it adds to
                                      rendering the prompt before it.
    Which special tokens are real?    Only the ones that the template writes. One that a text spells
                                      is enclosed in two private characters before rendering
                                      (`_Guard`), and encoded as plain text.
"""

import re
from functools import partial
from itertools import islice

import numpy as np

from tinylm.common.errors import UserError
from tinylm.rows.conversation import Conversation, Turn
from tinylm.rows.sandbox import Sandbox
from tinylm.rows.templates import (
    Template,
    bos_ids,
    encode_answer,
    encode_without_space,
    prepends_space,
    require_answer,
    require_question,
    split_exchanges,
)
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokens.example_rows import Example

Message = dict[str, str]
AnswerSpans = list[tuple[int, int]]
"""where each answer is in the rendered text: start, and end with the token that ends it"""


class ChatTemplate(Template):
    """The tokenizer's own template."""

    name = "chat_template"

    def __init__(self, tokenizer: Tokenizer, *, has_tools: bool = False):
        self.has_tools = has_tools
        source = tokenizer.chat_template if isinstance(tokenizer, HFTokenizer) else None
        if source is None:
            raise _no_chat_template(tokenizer)
        assert isinstance(tokenizer, HFTokenizer)
        bos = bos_ids(tokenizer)
        variables = {
            "eos_token": tokenizer.eos,
            "pad_token": tokenizer.pad,
            "bos_token": tokenizer.special_names[bos[0]] if bos else None,
        }
        given = {name: value for name, value in variables.items() if value is not None}
        self._sandbox = Sandbox(source, given)
        # Longest first, so that no name hides a longer one that begins with it.
        names = sorted(tokenizer.special_names.values(), key=len, reverse=True)
        self._special = "|".join(map(re.escape, names))
        self._end_id = self._check(tokenizer)

    def encode(self, conversation: Conversation, tokenizer: Tokenizer) -> Example:
        require_answer(conversation)
        list(split_exchanges(conversation))  # our error, before the template's stranger one
        ids, trained = self._tokens(conversation, tokenizer, is_prompt=False)
        return Example(np.array(ids, dtype=np.int64), np.array(trained, dtype=bool))

    def prompt_ids(self, conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
        require_question(conversation)
        list(split_exchanges(conversation))
        return self._tokens(conversation, tokenizer, is_prompt=True)[0]

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self._end_id, tokenizer.eos_id)))

    def _check(self, tokenizer: Tokenizer) -> int:
        """Raise a UserError unless prompts are the beginning of what is trained; the id that ends
        an answer.
        """
        question, answer = Turn("user", "1"), Turn("assistant", "2")
        example = self.encode((question, answer), tokenizer)
        prompt = self.prompt_ids((question,), tokenizer)
        same_beginning = example.ids[: len(prompt)].tolist() == prompt
        if not same_beginning or example.trained.argmax() != len(prompt):
            raise _template_error("does not begin an answer where its prompt ends")
        return int(example.ids[np.flatnonzero(example.trained)[-1]])

    def _tokens(
        self, conversation: Conversation, tokenizer: Tokenizer, *, is_prompt: bool
    ) -> tuple[list[int], list[bool]]:
        """The ids of the conversation, with the start of an answer after it for a prompt, and
        which are trained.
        """
        assert isinstance(tokenizer, HFTokenizer)
        # protect what texts spell, and render
        guard = _Guard(self._special, [turn.full_text for turn in conversation])
        messages = [
            {"role": turn.role, "content": guard.enclose(turn.full_text)} for turn in conversation
        ]
        find_answers = self._marked if self._sandbox.marks_answers else self._compared
        text, answers = find_answers(messages, is_prompt)
        # encode prompt, answer, prompt, answer, ..., rest
        ids: list[int] = []
        trained: list[bool] = []
        position = 0
        is_trained = [turn.trained for turn in conversation if turn.role == "assistant"]
        for (start, end), train in zip(answers, is_trained, strict=True):
            prompt = guard.encode(text[position:start], tokenizer, first=position == 0)
            encode = partial(guard.encode, tokenizer=tokenizer)
            answer, by_model = encode_answer(text[start:end], encode, has_tools=self.has_tools)
            n_trained = _length_to_end_token(answer, tokenizer)
            ids += prompt + answer
            trained += [False] * len(prompt)
            trained += [train and own for own in by_model[:n_trained]]
            trained += [False] * (len(answer) - n_trained)
            position = end
        rest = guard.encode(text[position:], tokenizer, first=position == 0)
        return ids + rest, trained + [False] * len(rest)

    def _marked(self, messages: list[Message], is_prompt: bool) -> tuple[str, AnswerSpans]:
        """The rendered text, and its answers as the template marks them."""
        [(text, marked)] = self._sandbox.render([(messages, is_prompt)])
        spans = []
        for start, end in marked:
            # The mark may end before the token that ends the answer.
            is_ended = re.search(rf"(?:{self._special})\s*\Z", text[start:end])
            next_token = re.compile(self._special).match(text, end)
            spans.append((start, end if is_ended or not next_token else next_token.end()))
        n_answers = sum(message["role"] == "assistant" for message in messages)
        if len(spans) != n_answers:
            raise _template_error(f"marks {len(spans)} answers in a conversation with {n_answers}")
        return text, spans

    def _compared(self, messages: list[Message], is_prompt: bool) -> tuple[str, AnswerSpans]:
        """The rendered text, and its answers, found by rendering up to each answer and with it."""
        requests = []
        for position, message in enumerate(messages):
            if message["role"] == "assistant":
                requests += [(messages[:position], True), (messages[: position + 1], False)]
        n_ends = len(requests)
        if is_prompt:
            requests.append((messages, True))
        parts = [text for text, _ in self._sandbox.render(requests)]
        text = parts[-1]
        if not all(text.startswith(part) for part in parts):
            raise _template_error(
                "writes earlier turns differently when more follow, "
                "so their answers cannot be found",
                "Mark the answers in it with {% generation %}, or set data.template to chatml",
            )
        ends = [len(part) for part in parts[:n_ends]]
        return text, list(zip(ends[::2], ends[1::2], strict=True))


def _no_chat_template(tokenizer: Tokenizer) -> UserError:
    fix = "Set data.template to instruction"
    if isinstance(tokenizer, HFTokenizer):
        files = "tokenizer_config.json or chat_template.jinja"
        fix += f" or chatml, or tokenizer.path to a folder whose {files} has one"
    problem = f"the tokenizer ({tokenizer.kind}) has no chat template"
    return UserError(("data.template", "chat_template"), problem, fix)


def _template_error(problem: str, fix: str = "") -> UserError:
    fix = fix or "Correct the template, or set data.template to chatml or instruction"
    return UserError("data.template", f"the tokenizer's chat template {problem}", fix)


def _length_to_end_token(answer: list[int], tokenizer: Tokenizer) -> int:
    """How many tokens of an answer are trained: up to its last special token,
    not the newline after that.
    """
    positions = [n for n, id in enumerate(answer, start=1) if id in tokenizer.special_names]
    if not positions:
        raise _template_error(
            "has no special token after an answer, so a model trained with it would not stop"
        )
    return positions[-1]


class _Guard:
    """Marks the special tokens that a text spells, so that they are not taken for the template's:
    puts two private characters around each.
    """

    def __init__(self, special: str, texts: list[str]):
        used = set("".join(texts))
        # The private use plane has more characters than any text uses.
        free = (c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in used)
        self._open, self._close = islice(free, 2)
        self._names = re.compile(special)
        enclosed = f"{self._open}({special}){self._close}"
        self._parts = re.compile(f"{enclosed}|[{self._open}{self._close}]")

    def enclose(self, text: str) -> str:
        return self._names.sub(lambda name: f"{self._open}{name.group()}{self._close}", text)

    def encode(self, text: str, tokenizer: HFTokenizer, *, first: bool = False) -> list[int]:
        """The ids of rendered text: enclosed names are text, other special tokens are special."""
        ids: list[int] = []
        for number, part in enumerate(self._parts.split(text)):
            if not part:  # None: a private character whose partner the template has cut off
                continue
            # split() returns text, enclosed name, text, ...
            encode = tokenizer.encode if number % 2 else tokenizer.encode_markup
            is_first = first and not ids
            if prepends_space(tokenizer) and not is_first:
                ids += encode_without_space(part, encode)
            else:
                ids += encode(part)
        return ids
