"""From token ids to text that may be shown: stop strings, incomplete characters,
and why a text ends.

    token id ─▶ tokenizer.stream() ─▶ StopStringFilter ─▶ TokenOutput, TokenOutput, ... ─▶ Completion
                whole characters       no part of a stop string

Knows nothing of models: it gets token ids and their log-probabilities.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from tinylm.tokenizer.base import Tokenizer

FinishReason = Literal["stop", "length", "eos"]


@dataclass(frozen=True)
class Prompt:
    """The token ids that the model reads first."""

    ids: tuple[int, ...]
    truncated: int = 0
    """tokens cut off at its front because the context holds no more"""


@dataclass(frozen=True)
class TokenOutput:
    """One token of a text that is being generated."""

    text: str
    """the text that may be shown now: empty while a character is incomplete
    or a stop string could begin"""
    token_id: int
    log_prob: float
    """log-probability under the model itself, before temperature, filters and penalties; 0 for a
    token that a tool wrote: no other could come"""
    sample: int = 0
    """number of the text, from 0"""
    finish_reason: FinishReason | None = None
    """why the text ends with this token; None if it continues"""
    alternatives: tuple[tuple[int, float], ...] = ()
    """the most probable tokens and their log-probabilities, also under the model itself, the most
    probable first; as many as `Request.n_alternatives`, none for a tool's token"""
    by_tool: bool = False
    """whether a tool wrote it, not the model"""

    @property
    def probability(self) -> float:
        """The probability of the token under the model itself."""
        return math.exp(self.log_prob)


@dataclass(frozen=True)
class Completion:
    """A finished text that continues a prompt."""

    text: str
    ids: tuple[int, ...]
    """the generated tokens, including the EOS or the stop string that ended them"""
    log_prob: float
    """sum over `ids` of the log-probabilities under the model itself"""
    finish_reason: FinishReason
    prompt_tokens: int
    """tokens of the prompt that the model read"""
    truncated: int
    """tokens cut off at the front of the prompt because the context holds no more"""
    by_tool: tuple[bool, ...]
    """which of `ids` a tool wrote, not the model"""

    @classmethod
    def of(cls, prompt: Prompt, outputs: Sequence[TokenOutput]) -> "Completion":
        """The completion that consists of the outputs of one sample."""
        reason = outputs[-1].finish_reason
        assert reason is not None, "the decode loop gives every text a finish_reason"
        return cls(
            text="".join(output.text for output in outputs),
            ids=tuple(output.token_id for output in outputs),
            log_prob=sum(output.log_prob for output in outputs),
            finish_reason=reason,
            prompt_tokens=len(prompt.ids),
            truncated=prompt.truncated,
            by_tool=tuple(output.by_tool for output in outputs),
        )


class TextWriter:
    """One text being generated: turns its tokens into outputs and decides when it ends."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Iterable[str], end_ids: Collection[int], sample: int = 0
    ):
        self.end_ids = end_ids
        self.characters = tokenizer.stream()
        self.stop_filter = StopStringFilter(stops)
        self.sample = sample
        self.finish_reason: FinishReason | None = None

    def write(
        self, token_id: int, log_prob: float, *, last: bool, complete: bool = False
    ) -> TokenOutput:
        """The output of the next token; the text ends because of its length if it is the last,
        and like at a stop string if it is complete.
        """
        ends = token_id in self.end_ids
        # Bytes become whole characters; an ending token itself has no text.
        text = "" if ends else self.characters.feed(token_id)
        if ends or last or complete:
            text += self.characters.finish()
        # Hold back whatever could become a stop string.
        shown = self.stop_filter.feed(text)
        if self.stop_filter.stopped:
            self.finish_reason = "stop"
        elif ends or last or complete:
            self.finish_reason = "eos" if ends else "stop" if complete else "length"
            shown += self.stop_filter.rest()
        return TokenOutput(shown, token_id, log_prob, self.sample, self.finish_reason)


class StopStringFilter:
    """Passes text on up to the first stop string, and holds back what could still become one.

    >>> stops = StopStringFilter(["###"])
    >>> stops.feed("a#"), stops.feed("b##"), stops.feed("#c"), stops.stopped
    ('a', '#b', '', True)
    """

    def __init__(self, stops: Iterable[str]):
        self.stops = tuple(stops)
        self.held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The text that may be shown now that `text` was added."""
        if self.stopped:
            return ""
        self.held += text
        end = find_stop(self.held, self.stops)
        self.stopped = end is not None
        if end is None:
            end = len(self.held) - self._n_held_back()
        shown, self.held = self.held[:end], self.held[end:]
        return shown

    def rest(self) -> str:
        """The text that was held back, when no more text follows."""
        return "" if self.stopped else self.held

    def _n_held_back(self) -> int:
        """The length of the longest end of the text that is the beginning of a stop string."""
        longest = 0
        for stop in self.stops:
            for n in range(longest + 1, len(stop)):
                if self.held.endswith(stop[:n]):
                    longest = n
        return longest


def find_stop(text: str, stops: Iterable[str]) -> int | None:
    """Where the stop string that is completed first begins in `text`; None if there is none.

    The first to be complete, not the first to start: the answer must not depend on how the text was
    cut into tokens.

    >>> find_stop("abcd", ["abcd", "bc"]), find_stop("abcd", ["x"])
    (1, None)
    """
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1] if found else None
