"""An Ollama Modelfile for a GGUF file: its template, the texts that end an answer, and settings.

    Template.prompt_ids ─▶ text with marks in place of the turns ─ cut ─▶ ChatPieces ─▶ Go template

Ollama takes templates in Go's language, ours are Python or Jinja, so the pieces between the turns
are found by writing a few conversations, and compared with what the template writes for others.
The Modelfile's own syntax has no escapes (ollama/parser/parser.go); those of Go are used instead.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby

from tinylm.checkpoint.load import Loaded
from tinylm.common.errors import UserError
from tinylm.config.schema import SamplingConfig
from tinylm.interchange.hf_tokenizer import end_ids
from tinylm.rows.conversation import Conversation, Turn
from tinylm.rows.template_factory import make_template
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.hf import HFTokenizer

logger = logging.getLogger(__name__)

BASE_TEMPLATE = "{{ .Prompt }}"
Write = Callable[[Conversation], str]
"""the text of a conversation, up to where the next answer begins"""


@dataclass(frozen=True)
class ChatPieces:
    """What a template writes around the turns of a conversation."""

    first: str
    """before a user turn that opens the conversation"""
    prompt: str
    """after the last user turn, where the model continues"""
    answer: str
    """between a user turn and the answer that follows it"""
    next: str
    """between an answer and the next user turn"""
    system: tuple[str, str] | None
    """before and after a system turn; None if the template has none"""

    def text(self, conversation: Conversation) -> str:
        """The text of a conversation that ends with a user turn."""
        parts = []
        for number, turn in enumerate(conversation):
            if turn.role == "system":
                before, after = self.system or ("", "")
                parts += [before, turn.text, after]
            elif turn.role == "user":
                is_last = number == len(conversation) - 1
                parts += [self.first if number == 0 else "", turn.text]
                parts.append(self.prompt if is_last else "")
            else:
                parts += [self.answer, turn.text, self.next]
        return "".join(parts)

    def go_template(self) -> str:
        """The same in Go's language, as Ollama executes it.

        An answer that the model wrote begins with what `answer` has after `prompt`, such as a
        space; it is not written twice.
        """
        answer = go_literal(self.answer)
        start = self.answer.removeprefix(self.prompt)
        if start and self.answer.startswith(self.prompt):
            found = f'(printf "%.{len(start)}s" .Content)'
            written = f"{{{{ if ne {found} {go_string(start)} }}}}{go_literal(start)}{{{{ end }}}}"
            answer = go_literal(self.prompt) + written
        before, after = self.system or ("", "")
        system = f"{go_literal(before)}{{{{ .Content }}}}{go_literal(after)}" if self.system else ""
        is_last = "eq (len (slice $.Messages $i)) 1"
        return (
            "{{ range $i, $_ := .Messages }}"
            f'{{{{ if eq .Role "system" }}}}{system}'
            '{{ else if eq .Role "user" }}'
            f"{{{{ if eq $i 0 }}}}{go_literal(self.first)}{{{{ end }}}}"
            f"{{{{ .Content }}}}{{{{ if {is_last} }}}}{go_literal(self.prompt)}{{{{ end }}}}"
            f"{{{{ else }}}}{answer}{{{{ .Content }}}}"
            f"{{{{ if not ({is_last}) }}}}{go_literal(self.next)}{{{{ end }}}}"
            "{{ end }}{{ end }}"
        )


def chat_pieces(write: Write) -> ChatPieces | None:
    """The pieces of a template; None if it does more than put pieces around turns."""
    system, user, answer, last = "xSYSTEMx", "xUSERx", "xANSWERx", "xLASTx"
    turns = _turns(user, answer, last)
    try:
        first, prompt = _cut(write(turns[:1]), user)
        _, middle, next, _ = _cut(write(turns), user, answer, last)
        around = None
        with suppress(UserError):  # many templates of published models refuse a system turn
            before, after, _ = _cut(write((Turn("system", system), turns[0])), system, user)
            around = before, after
        pieces = ChatPieces(first, prompt, middle, next, around)
        for other in (_turns("A b"), _turns("A b", "C.", "Dé?"), _turns("A", "b", "c", "d", "e")):
            for opening in [(), (Turn("system", "E f."),)] if around else [()]:
                if pieces.text((*opening, *other)) != write((*opening, *other)):
                    return None
    except (UserError, ValueError):
        return None
    return pieces


def _turns(*texts: str) -> Conversation:
    """Turns of a user and an assistant, one after the other."""
    return tuple(
        Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)
    )


def _cut(text: str, *marks: str) -> Iterator[str]:
    """What is before, between and after the marks, each of which must be there once, in order;
    else a ValueError.
    """
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError(f"{mark} is not in the text once")
        before, _, text = text.partition(mark)
        yield before
    yield text


def go_literal(text: str) -> str:
    """Text outside of the actions of a Go template in a Modelfile.

    >>> go_literal("a {{b}}")
    'a {{ "{{" }}b}}'
    """
    parts = []
    rest = text
    while rest:
        special = next((s for s in ("{{", '"""') if rest.startswith(s)), "")
        if not special and not _is_kept(rest[0]):
            special = rest[0]
        parts.append(f"{{{{ {go_string(special)} }}}}" if special else rest[0])
        rest = rest[len(special or rest[0]) :]
    return "".join(parts)


def go_string(text: str) -> str:
    r"""A string in Go's language.

    >>> print(go_string('a"\n\u00a0'))
    "a\"\n\u00a0"
    """
    escaped = []
    for character in text:
        code = ord(character)
        if character in '"\\\n\r\t':
            escaped.append(json.dumps(character)[1:-1])
        elif character.isprintable():
            escaped.append(character)
        else:
            escaped.append(f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
    return f'"{"".join(escaped)}"'


def _is_kept(character: str) -> bool:
    """Whether Ollama keeps a character of a Modelfile: it drops those that cannot be printed."""
    return character.isprintable() or character in "\n\t"


# --- the file ---


def modelfile(loaded: Loaded, file: str, *, context: int) -> str:
    """The Modelfile for the GGUF file named `file`, which must be in the same folder."""
    lines = [f"FROM ./{file}"]
    name = template_of(loaded)
    template = BASE_TEMPLATE
    if name is not None:
        pieces = _pieces_of(name, loaded.tokenizer)
        template = pieces.go_template() if pieces else ""
    if template:
        lines.append(f"TEMPLATE {_quoted(template)}")
    else:
        logger.info(
            "note: the chat template cannot be written as Ollama's; "
            "it uses its own if it knows the one in the file"
        )
    if name is not None and loaded.system is not None:
        if '"""' in loaded.system or not all(map(_is_kept, loaded.system)):
            logger.info("note: the system text cannot be written in a Modelfile")
        else:
            lines.append(f'SYSTEM """{loaded.system}"""')
    lines.append(f"PARAMETER num_ctx {context}")
    ends = [loaded.tokenizer.special_names[id] for id in end_ids(loaded.tokenizer, name)]
    for stop in dict.fromkeys((*ends, *loaded.config.sampling.stop)):
        lines.append(f"PARAMETER stop {_quoted(stop)}")
    for setting, value in sampling_parameters(loaded.config.sampling).items():
        lines.append(f"PARAMETER {setting} {value:g}")
    return "\n".join(lines) + "\n"


def template_of(loaded: Loaded) -> str | None:
    """The name of the template that the model was tuned with, here or by its authors;
    None for a base model.
    """
    if loaded.template is not None:
        return loaded.template
    tokenizer = loaded.tokenizer
    has_own = isinstance(tokenizer, HFTokenizer) and tokenizer.chat_template is not None
    return "chat_template" if has_own else None


def _pieces_of(name: str, tokenizer: Tokenizer) -> ChatPieces | None:
    try:
        template = make_template(name, tokenizer)
    except UserError:  # one of its authors that ours cannot train
        return None
    return chat_pieces(lambda turns: _text_of(template.prompt_ids(turns, tokenizer), tokenizer))


def _text_of(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text of ids in which special tokens have their names."""
    names = tokenizer.special_names
    parts = []
    for name, group in groupby(ids, names.get):
        run = list(group)
        parts.append(tokenizer.decode(run) if name is None else name * len(run))
    return "".join(parts)


def sampling_parameters(sampling: SamplingConfig) -> dict[str, float]:
    """Our settings of sampling under Ollama's names."""
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or 0,  # 0 is off
        "top_p": sampling.top_p or 1.0,
        "min_p": sampling.min_p or 0.0,
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }


def _quoted(text: str) -> str:
    """A value in a Modelfile: up to the quotes that end its last line."""
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
