r"""tokenizer.pattern: how a text is split into words before BPE, by a name or by a regular expression.

A text is split in two places: by the `regex` package while merges are learned, and by the
`tokenizers` library (Oniguruma) whenever a text is encoded. `pattern_problem` therefore splits one
text with both before a run starts. Knows nothing of merges; a process that counts words imports
this file, so it needs neither torch, numpy nor pydantic.
"""

from typing import TYPE_CHECKING

from tinylm.common.errors import catch_panics, first_line

if TYPE_CHECKING:
    import regex

NAMES = ("gpt2", "gpt4", "qwen2")
FIX = (
    f"Write {', '.join(NAMES)}, or a regular expression whose matches are the words, such as "
    r"' ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+'"
)
# CPU seconds for a text that is split by a custom regular expression. The named patterns
# split 5 MB in a second; a pattern that needs more than the sum of both backtracks without end.
SECONDS, SECONDS_PER_CHARACTER = 5.0, 1e-5
# What patterns tell apart (letters of several scripts and cases, marks, digits, signs, each kind of
# space and line end), then runs: a pattern that backtracks without end does so in one of them.
PROBE = (
    "Hello world, it's 12345 o'clock... I'LL pay $3.50 for naïve Cafe\u0301!\r\n\r\n\tif x_1 == 10:"
    '\n        return f(x)  # half \n \n  ½ x² <a href="b-c">/a/b.txt</a> camelCase HTTPServer '
    "東京タワーは333m。 Привет, мир! مرحبا ١٢٣ 👩\u200d🚀\u3000\x0b\x0c\x1c\x85\xa0\u2028\x00 end"
    + "".join(
        f"{run * 40}~{run * 40}\n" for run in ("a", "A", "é", "東", "1", " ", "\n", "!", "a ")
    )
)


def pattern_problem(pattern: str) -> str | None:
    r"""What is wrong with a pattern; None if it is a name, or a regular expression that splits a
    text alike in both libraries.

    >>> pattern_problem("gpt2"), pattern_problem(r"\p{L}+|\s+")
    (None, None)
    >>> pattern_problem("gpt5")
    'must be gpt2, gpt4, qwen2 or a regular expression, got gpt5'
    >>> pattern_problem("(a")
    'not a regular expression: missing ) at position 2'
    """
    import regex

    if pattern in NAMES:
        return None
    if pattern.isidentifier():
        return f"must be {', '.join(NAMES)} or a regular expression, got {pattern}"
    try:
        compiled = regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        return f"not a regular expression: {first_line(error)}"
    return _problem_in_words(pattern, compiled)


def isolated_words(compiled: "regex.Pattern[str]", text: str) -> list[str]:
    r"""The matches of a pattern, and what is between them as words of its own: together the text.

    >>> import regex
    >>> isolated_words(regex.compile(r"\d"), "ab12 c")
    ['ab', '1', '2', ' c']

    Raises:
        TimeoutError: it takes longer than any reasonable pattern.
    """
    words: list[str] = []
    end = 0
    timeout = SECONDS + SECONDS_PER_CHARACTER * len(text)
    for match in compiled.finditer(text, timeout=timeout):
        words += [text[end : match.start()], match[0]]
        end = match.end()
    words.append(text[end:])
    return [word for word in words if word]


def _problem_in_words(pattern: str, compiled: "regex.Pattern[str]") -> str | None:
    """Why the two libraries cannot split `PROBE` into the same words; None if they do."""
    from tokenizers import Regex, pre_tokenizers

    endless = f"{pattern} backtracks without end in a text of {len(PROBE)} characters"
    try:
        with catch_panics():
            pieces = pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(PROBE)
    except RuntimeError:  # Oniguruma stops after 10 million steps, on any machine
        return endless
    except Exception as error:  # the library raises plain Exception for what it cannot read
        return f"not a regular expression of the tokenizers library: {first_line(error)}"
    try:
        words = isolated_words(compiled, PROBE)
    except TimeoutError:
        return endless
    if any(match.start() == match.end() for match in compiled.finditer(PROBE)):
        return f"{pattern} matches the empty text, but a word has at least one character"
    for ours, (theirs, _) in zip(words, pieces, strict=False):
        if ours != theirs:
            return (
                f"{pattern} finds different words in the two libraries that split texts: "
                f"{ours!r:.40} in regex, {theirs!r:.40} in tokenizers"
            )
    return None
