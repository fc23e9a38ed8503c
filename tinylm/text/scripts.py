"""Which scripts and languages a text is in, at a glance."""

import unicodedata
from collections import Counter
from collections.abc import Mapping

from tinylm.text.shingles import words_of

# The most frequent words of a language that few other languages here have.
FUNCTION_WORDS = {
    "English": "the of and to is that it was for with",
    "German": "der die und das nicht ist ein mit von zu",
    "French": "le les et des est une dans que pour pas",
    "Spanish": "el los y que las por una con para del",
    "Italian": "il di che e un per non una sono della",
    "Portuguese": "o que os uma para com do da em no",
    "Dutch": "de het een van en dat niet op te zijn",
    "Swedish": "och att det som en på är av för inte",
}
_WORDS = {name: frozenset(words.split()) for name, words in FUNCTION_WORDS.items()}
# Words that are looked at, and the share of function words that decides.
FIRST_WORDS, LEAST_SHARE = 200, 0.08


def language_of(text: str) -> str:
    """The language whose function words are most frequent at the start of a text, or "unknown": a
    guess for texts of some sentences, among the eight of `FUNCTION_WORDS`.

    >>> language_of("The cat sat on the mat, and it was glad."), language_of("Kissa istui matolla.")
    ('English', 'unknown')
    """
    words = words_of(text[: 10 * FIRST_WORDS])[:FIRST_WORDS]
    counts = {name: sum(word in known for word in words) for name, known in _WORDS.items()}
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] >= max(LEAST_SHARE * len(words), 1) else "unknown"


def scripts_of(characters: Mapping[str, int]) -> Counter[str]:
    """How many characters are letters of each script, digits, spaces, punctuation and others.

    Args:
        characters: how often each character occurs.

    >>> scripts_of(Counter("Go, Рим 9!")).most_common()
    [('Cyrillic', 3), ('Latin', 2), ('punctuation', 2), ('spaces', 2), ('digits', 1)]
    """
    found: Counter[str] = Counter()
    for character, count in sorted(characters.items()):
        found[_script(character)] += count
    return Counter(dict(sorted(found.items())))


def _script(character: str) -> str:
    category = unicodedata.category(character)
    if character.isspace():
        return "spaces"
    if category[0] in "LM":
        return unicodedata.name(character, "other").split()[0].split("-")[0].capitalize()
    if category[0] == "N":
        return "digits"
    if category[0] in "PS":
        return "punctuation"
    return "control and others"
