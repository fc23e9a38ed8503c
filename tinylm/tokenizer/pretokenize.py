r"""What byte-pair encoding sees of a text: words, which no token crosses, and bytes, written as visible characters.

Reading order: the patterns of words; where a text can be cut and keeps its words; `Rules` and `count_texts`; what a
process does when a corpus is counted. This file knows nothing of merges or ids, and it imports little on purpose:
it is all that a counting process loads.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import regex

from tinylm.text.chunks import RawChunk, TextChunk

# What a merge may not cross: the words of GPT-2 (Radford et al. 2019), and those of GPT-4 as tiktoken's cl100k_base has them,
# which keep numbers to three digits and ignore the case of contractions. Both leave no character out, and tokenizers and
# tiktoken find the same words; so does the library regex, but for the letters that Unicode added last.
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}

# Where a text can be cut and keeps its words under both patterns: before a space behind a word, behind a single line end,
# and before punctuation behind a letter. Letters are named one by one, because libraries differ in the newest ones.
_CUT = r"(?<=\S)(?=[ \t])|(?<=\S\n)(?=\S)|(?<=[a-z\u4e00-\u9fa5])(?=[!-/\u3001\u3002\uff0c])"
LAST_CUT = regex.compile(f"(?r){_CUT}")


def _printable_bytes() -> dict[str, bytes]:
    """GPT-2's way of writing bytes in a vocabulary file: a character for each byte (Radford et al. 2019).

    The visible characters of Latin-1 stand for themselves, and the other 68 bytes, in their order, for U+0100 and on.
    """
    visible = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): bytes((byte,)) for byte in visible} | {
        chr(256 + n): bytes((byte,)) for n, byte in enumerate(hidden)
    }


BYTE_OF_CHARACTER = _printable_bytes()
SPECIAL = ("<|endoftext|>", "<|pad|>")


@dataclass(frozen=True)
class Rules:
    """How a text falls into words: the name of a pattern, and the special tokens, which belong to no word."""

    pattern: str = "gpt2"
    special: tuple[str, ...] = SPECIAL

    def words(self, text: str) -> Iterator[list[str]]:
        """The words of each stretch between special tokens; of special tokens that overlap the longest counts.

        >>> list(Rules().words("Hello world's<|endoftext|>  end"))
        [['Hello', ' world', "'s"], [' ', ' end']]
        """
        word, special = _compiled(self)
        for stretch in special.split(text) if special else (text,):
            yield word.findall(stretch)


@lru_cache
def _compiled(rules: Rules) -> tuple[regex.Pattern[str], regex.Pattern[str] | None]:
    longest_first = sorted(rules.special, key=len, reverse=True)
    special = regex.compile("|".join(map(regex.escape, longest_first))) if rules.special else None
    return regex.compile(PATTERNS[rules.pattern]), special


def count_texts(texts: Iterable[str], rules: Rules) -> Counter[str]:
    """How often each word stands in `texts`."""
    counts: Counter[str] = Counter()
    for text in texts:
        for words in rules.words(text):
            counts.update(words)
    return counts


@dataclass(frozen=True)
class CountWords:
    """What a process does with each job: its size and its words."""

    rules: Rules

    def __call__(self, job: RawChunk | TextChunk) -> tuple[int, Counter[str]]:
        return job.size, count_texts(job.texts(), self.rules)
