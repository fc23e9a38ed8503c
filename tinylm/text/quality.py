"""Rules for the text of a document: a rule is a question, and a document to which one answer is
yes is removed.

`gopher` has the rules and numbers of Rae et al. 2021 (appendix A1.1, table A1); two of them are for
English. `basic` asks only what is wrong in any language and at any length.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tinylm.text.shingles import words_of

STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
BULLETS = ("\u2022", "\u2023", "\u25e6", "-", "*")
# Shares of repetition say something of a text that has at least as many words, or lines.
MIN_WORDS, MIN_LINES = 50, 5


@dataclass(frozen=True)
class Measured:
    """A document, and what several rules look at."""

    text: str

    @cached_property
    def lower_words(self) -> list[str]:
        return words_of(self.text)

    @cached_property
    def words(self) -> list[str]:
        """Divided at white space, with their punctuation."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """The lines that are not blank, without white space around them."""
        return [line for part in self.text.split("\n") if (line := part.strip())]

    def share_of_words(self, has: Callable[[str], bool]) -> float:
        """The share of the words that have a property; 0 without words."""
        return sum(map(has, self.words)) / max(len(self.words), 1)

    def share_of_lines(self, has: Callable[[str], bool]) -> float:
        """The share of the lines that have a property; 0 without lines."""
        return sum(map(has, self.lines)) / max(len(self.lines), 1)

    @cached_property
    def repeated_lines(self) -> float:
        """The share of the lines that occurred before; 0 for few lines."""
        if len(self.lines) < MIN_LINES:
            return 0.0
        return 1 - len(set(self.lines)) / len(self.lines)

    @cached_property
    def repeated_characters(self) -> float:
        """The share of the characters of all lines that are in lines which occurred before; 0 for
        few lines.
        """
        if len(self.lines) < MIN_LINES:
            return 0.0
        return 1 - sum(map(len, set(self.lines))) / sum(map(len, self.lines))

    def top_ngram(self, n: int) -> float:
        """The share of the characters of all words that are in the most frequent run of n words;
        0 for few words.
        """
        words = self.lower_words
        if len(words) < MIN_WORDS:
            return 0.0
        runs = Counter(zip(*(words[start:] for start in range(n)), strict=False))
        run, count = runs.most_common(1)[0]
        return count * sum(map(len, run)) / max(sum(map(len, words)), 1) if count > 1 else 0.0

    @cached_property
    def broken(self) -> float:
        """The share of characters that stand for lost ones, or control the terminal."""
        n_control = sum(ord(c) < 32 and c not in "\t\n\f\r" for c in set(self.text))
        if not n_control and "\ufffd" not in self.text:
            return 0.0
        n_broken = sum(c == "\ufffd" or (ord(c) < 32 and c not in "\t\n\f\r") for c in self.text)
        return n_broken / len(self.text)


@dataclass(frozen=True)
class Rule:
    """A reason to remove a document."""

    name: str
    what: str
    """why, for the report"""
    fails: Callable[[Measured], bool]


def _mean_length(text: Measured) -> float:
    return sum(map(len, text.words)) / max(len(text.words), 1)


def _has_letter(word: str) -> bool:
    return any(map(str.isalpha, word))


_BROKEN = Rule("broken", "over 1% are U+FFFD or control characters", lambda t: t.broken > 0.01)
_REPEATED = (
    Rule(
        "repeated_text",
        "over 20% of the text is in repeated lines",
        lambda t: t.repeated_characters > 0.2,
    ),
    Rule("top_2gram", "one run of 2 words is over 20% of it", lambda t: t.top_ngram(2) > 0.2),
    Rule("top_3gram", "one run of 3 words is over 18% of it", lambda t: t.top_ngram(3) > 0.18),
    Rule("top_4gram", "one run of 4 words is over 16% of it", lambda t: t.top_ngram(4) > 0.16),
)
_BASIC = (
    _BROKEN,
    Rule(
        "no_letters",
        "under half of the words have a letter",
        lambda t: t.share_of_words(_has_letter) < 0.5,
    ),
    *_REPEATED,
)
_GOPHER = (
    _BROKEN,
    Rule("few_words", "under 50 words", lambda t: len(t.words) < 50),
    Rule("many_words", "over 100,000 words", lambda t: len(t.words) > 100_000),
    Rule(
        "word_length",
        "words of under 3 or over 10 characters in the mean",
        lambda t: not 3 <= _mean_length(t) <= 10,
    ),
    Rule(
        "symbols",
        "over one # or ... for 10 words",
        lambda t: (
            t.text.count("#") + t.text.count("...") + t.text.count("\u2026") > 0.1 * len(t.words)
        ),
    ),
    Rule(
        "bullets",
        "over 90% of the lines begin with a bullet",
        lambda t: t.share_of_lines(lambda line: line.startswith(BULLETS)) > 0.9,
    ),
    Rule(
        "ellipses",
        "over 30% of the lines end with ...",
        lambda t: t.share_of_lines(lambda line: line.endswith(("...", "\u2026"))) > 0.3,
    ),
    Rule(
        "no_letters",
        "under 80% of the words have a letter",
        lambda t: t.share_of_words(_has_letter) < 0.8,
    ),
    Rule(
        "stop_words",
        "under 2 of 8 English function words",
        lambda t: len(STOP_WORDS.intersection(t.lower_words)) < 2,
    ),
    Rule("repeated_lines", "over 30% of the lines are repeated", lambda t: t.repeated_lines > 0.3),
    *_REPEATED,
)
RuleSet = Literal["none", "basic", "gopher"]
RULES: dict[RuleSet, tuple[Rule, ...]] = {"none": (), "basic": _BASIC, "gopher": _GOPHER}


def first_failure(measured: Measured, rules: Sequence[Rule]) -> Rule | None:
    """The first rule that a document fails; None if it passes all."""
    return next((rule for rule in rules if rule.fails(measured)), None)
