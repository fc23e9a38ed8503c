r"""Constrained output: text that is valid by a JSON schema, or that a regular expression matches.

    Constraint ─▶ Grammars.start ─▶ Matcher ─▶ allowed ─▶ the engine masks the logits, draws a token
                  compiled once     a text      ▲                                      │
                                                └───────────── advance ◀───────────────┘

llguidance, an optional package, decides which bytes may come next, so it needs the bytes of every
token; a character may be split between tokens. The text ends when the grammar is complete: after
the last brace of an object, or where EOS is allowed and the model chooses it.

Of a tokenizer in the style of SentencePiece, the first token of a text has other bytes than later
ones: "▁the" is "the" and then " the". llguidance gets two tables for such a tokenizer:

    ids 0 to V - 1      bytes of a token that follows another
    ids V to 2V - 1     bytes of a token that begins the text

Whitespace between the parts of JSON is at most a space, or a line end and an indentation: a small
model would not stop writing spaces. Knows nothing of models.
"""


# V vocabulary

import json
import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from tinylm.common.errors import UserError, require_package
from tinylm.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

JSON_WHITESPACE = r"( |\n {0,16})?"
# Limits for hostile input, with llguidance's own limits of work: 20 ms to read a grammar, 15 ms a
# token. A state of the lexer is 1 to 2 kB.
MAX_CHARACTERS = 2**18
MAX_LEXER_STATES = 50_000
# Compiled constraints that are kept for the next text.
N_KEPT = 64
# Texts of random tokens that must be the sum of their tokens' bytes.
N_PROBES, PROBE_LENGTH = 50, 6


@dataclass(frozen=True)
class Constraint:
    """What a text must be: valid by a JSON schema, or matched as a whole by a regular expression.

    >>> Constraint.json_schema({"type": "integer"}).source
    '{"type": "integer"}'
    """

    kind: Literal["json_schema", "regex"]
    source: str
    where: str | tuple[str, ...] = field(default="constraint", compare=False)
    """the flag, file or field that it is from, for errors"""

    @classmethod
    def json_schema(
        cls, schema: str | Mapping[str, Any], where: str | tuple[str, ...] = "json_schema"
    ) -> "Constraint":
        """Text that is one JSON value, valid by this schema; {"type": "object"} is any object."""
        return cls("json_schema", schema if isinstance(schema, str) else json.dumps(schema), where)

    @classmethod
    def regex(cls, pattern: str, where: str | tuple[str, ...] = "regex") -> "Constraint":
        """Text that this regular expression matches from beginning to end.

        The syntax is that of Rust: no look-around, no references to groups.
        """
        return cls("regex", pattern, where)

    def grammar(self) -> str:
        """The grammar in the form of llguidance, checked without a tokenizer.

        Raises:
            UserError: llguidance is not installed, or the constraint is not valid, not supported,
            impossible, or too large.
        """
        require_package("llguidance")
        from llguidance import LLMatcher

        if len(self.source) > MAX_CHARACTERS:
            problem = f"must have at most {MAX_CHARACTERS:,} characters, got {len(self.source):,}"
            raise UserError(self.where, problem, "Shorten it")
        # The model chooses its tokens: it is not forced to those that llguidance would choose.
        head = '%llguidance {"no_forcing": true}\n'
        try:
            if self.kind == "regex":
                lark = _part(LLMatcher.grammar_from_regex(self.source), "lark_grammar")
            else:
                schema = json.loads(self.source)
                if schema is True:  # any value
                    schema = {}
                if not isinstance(schema, dict):
                    raise ValueError("it must be an object in braces")
                options = {"whitespace_pattern": JSON_WHITESPACE}
                compiled = LLMatcher.grammar_from_json_schema(schema, defaults=options)
                lark = f"start: %json {json.dumps(_part(compiled, 'json_schema'))}"
        except RecursionError:
            raise self._invalid("it is nested too deeply") from None
        except ValueError as error:  # not JSON, or not a schema
            raise self._invalid(str(error)) from None
        grammar = LLMatcher.grammar_from_lark(head + lark)
        error = LLMatcher.validate_grammar(grammar, limits=_limits())
        if error and not error.startswith("WARNING"):
            raise self._invalid(error)
        return grammar

    @property
    def name(self) -> str:
        """Its kind, for people."""
        return "JSON schema" if self.kind == "json_schema" else "regular expression"

    def _invalid(self, message: str) -> UserError:
        problem = f"not a supported {self.name}: {_reason(message)}"
        return UserError(self.where, problem, "Change it")


def _part(grammar: str, name: str) -> Any:
    """The one grammar in what llguidance returns."""
    return json.loads(grammar)["grammars"][0][name]


def _reason(message: str) -> str:
    r"""The reason in a message of llguidance, which may show the place on several lines.

    >>> _reason('at 1(8): invalid regex "[" (in regex): parse error:\n [\n ^\nerror: unclosed class')
    'unclosed class'
    >>> _reason("Unsatisfiable schema: schema is false\n  and more")
    'Unsatisfiable schema: schema is false'
    """
    lines = message.splitlines()
    for line in lines:
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    place = r'^at \d+\(\d+\): (invalid regex ".*" \(in \w+\): |failed to compile JSON schema: )?'
    return re.sub(place, "", lines[0]).removesuffix(" <non-verbose/>")


def _limits() -> Any:
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)


class Grammars:
    """Constraints, compiled for a tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._table: _Table | None = None
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()

    def compile(self, constraint: Constraint) -> "LLMatcher":
        """A matcher at the beginning of a text; the last ones are kept.

        Raises:
            UserError: as `Constraint.grammar`, or this tokenizer cannot be constrained or has no
            token for the beginning.
        """
        if constraint in self._compiled:
            self._compiled.move_to_end(constraint)
            return self._compiled[constraint]
        grammar = constraint.grammar()
        from llguidance import LLMatcher

        if self._table is None:
            self._table = _make_table(self._tokenizer, constraint.where)
        matcher = LLMatcher(self._table.tokens, grammar, log_level=0, limits=_limits())
        if matcher.is_error():  # what shows only with the tokens, such as too much work
            raise constraint._invalid(matcher.get_error())
        Matcher(constraint, matcher, self._table, [self._table.eos_id]).allowed()
        self._compiled[constraint] = matcher
        if len(self._compiled) > N_KEPT:
            self._compiled.popitem(last=False)
        return matcher

    def start(self, constraint: Constraint, end_ids: Collection[int]) -> "Matcher":
        """The matcher of a new text, which one of `end_ids` ends; raises as `compile`."""
        matcher = self.compile(constraint).deep_copy()
        return Matcher(constraint, matcher, self._table, end_ids)


class Matcher:
    """One text under a constraint: which tokens may come next, and whether it is complete."""

    def __init__(
        self,
        constraint: Constraint,
        matcher: "LLMatcher",
        table: "_Table",
        end_ids: Collection[int],
    ):
        self._where = constraint.where
        self._matcher, self._table = matcher, table
        self._end_ids = list(end_ids)
        self._n_tokens = 0

    def allowed(self) -> np.ndarray:
        """Which tokens (V,) may come next.

        Raises:
            UserError: no token of the tokenizer can, or the grammar has become too complex.
        """
        mask = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) != 0
        if self._matcher.is_error():
            raise self._failed()
        n_ids, eos_id = self._table.n_ids, self._table.eos_id
        may_end = mask[eos_id]
        start = self._offset()
        mask = mask[start : start + n_ids].copy()
        mask[self._end_ids] = may_end
        if not mask.any():
            raise self._failed()
        return mask

    def advance(self, token_id: int) -> None:
        """Add a token that was allowed; one that ends the text changes nothing."""
        if token_id not in self._end_ids:
            self._matcher.consume_token(token_id + self._offset())
            self._n_tokens += 1

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def _offset(self) -> int:
        """Where the table of the next token begins."""
        return self._table.n_ids if self._n_tokens == 0 and self._table.is_double else 0

    def _failed(self) -> UserError:
        n, message = self._n_tokens, self._matcher.get_error()
        if not message or message.startswith("NoExtension"):
            problem = f"after {n} tokens, no token of the tokenizer can follow"
            fix = "Change the constraint, or use a tokenizer that has all bytes"
            return UserError(self._where, problem, fix)
        problem = f"too complex after {n} tokens: {_reason(message)}"
        return UserError(self._where, problem, "Simplify it")


class _Table(NamedTuple):
    """The bytes of all tokens, as llguidance wants them."""

    tokens: "LLTokenizer"
    n_ids: int
    eos_id: int
    is_double: bool


def _make_table(tokenizer: Tokenizer, where: str | tuple[str, ...]) -> _Table:
    """The table of a tokenizer.

    Raises:
        UserError: the bytes of a token depend on more than whether it begins the text.
    """
    from llguidance import LLTokenizer

    ids = range(tokenizer.vocab_size)
    later = [tokenizer.token_bytes(id) for id in ids]
    first = [tokenizer.first_token_bytes(id) for id in ids]
    _check_table(tokenizer, first, later, where)
    is_double = first != later
    table = _Tokens(tokenizer, [*later, *first] if is_double else later)
    return _Table(LLTokenizer(table), len(later), tokenizer.eos_id, is_double)


def _check_table(
    tokenizer: Tokenizer, first: list[bytes], later: list[bytes], where: str | tuple[str, ...]
) -> None:
    """Compare texts of random tokens with the bytes of the tables."""
    chance = np.random.default_rng(0)
    ids = [id for id in range(len(later)) if id not in tokenizer.special_names]
    for _ in range(N_PROBES if ids else 0):
        probe = chance.choice(ids, PROBE_LENGTH).tolist()
        expected = first[probe[0]] + b"".join(later[id] for id in probe[1:])
        if not _is_utf8(expected):
            continue  # half a character decodes to U+FFFD
        if tokenizer.decode(probe).encode() != expected:
            problem = (
                "not supported with this tokenizer: the text of its tokens depends on their "
                "neighbors"
            )
            raise UserError(where, problem, "Use another model")


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


class _Tokens:
    """The attributes that `LLTokenizer` reads. It tokenizes nothing: no tokens are forced."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes]):
        self.eos_token_id = tokenizer.eos_id
        self.tokens = tokens
        special = list(tokenizer.special_names)
        if len(tokens) > tokenizer.vocab_size:
            special += [tokenizer.vocab_size + id for id in special]
        self.special_token_ids = special
