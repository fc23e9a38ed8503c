"""Unigram language model tokenization (Kudo 2018), learned by the `tokenizers` library.

Every token has a probability, and a word is divided into the tokens of highest product. Learning begins
with all frequent substrings of the words and removes those that are missed least, where BPE begins
with bytes and joins. The words and the 256 bytes are those of BPE here, so any text can be encoded and
the special tokens, files and checkpoints are the same; only the model in tokenizer.json is another.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from tinylm.common.errors import UserError, catch_panics, first_line
from tinylm.tokenizer.bpe_files import LearnedVocabulary, check_request, word_splitter
from tinylm.tokenizer.pretokenize import BYTE_OF_CHARACTER, Pretokenizer

if TYPE_CHECKING:
    from tokenizers.models import Model

# Bytes that the library puts back into a vocabulary get its lowest score plus 0, 1e-4, 2e-4, ... in
# the order of a hash table: it differs from run to run.
LOW_BAND = 256 * 1e-4 + 1e-6
DIGITS = 6


@dataclass(frozen=True)
class Unigram(LearnedVocabulary):
    """Tokens in visible form with their log probabilities, the most probable first."""

    pieces: tuple[tuple[str, float], ...]
    pretokenizer: Pretokenizer

    def tokens(self) -> list[str]:
        return [piece for piece, _ in self.pieces]

    def model(self) -> "Model":
        from tokenizers import models

        return models.Unigram(list(self.pieces), None, False)


def learn_unigram(texts: Iterable[str], vocab_size: int, pretokenizer: Pretokenizer) -> Unigram:
    """A vocabulary of `vocab_size` tokens learned from texts; smaller if they have few substrings.

    Raises:
        UserError: as `check_request`, or there is no text, or the library cannot learn from it.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, trainers

    check_request(vocab_size, pretokenizer)
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = word_splitter(pretokenizer)
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - len(pretokenizer.special_tokens),
        initial_alphabet=sorted(BYTE_OF_CHARACTER),
        special_tokens=[],
        show_progress=False,
    )
    stretches = (one for text in texts for one in pretokenizer.stretches(text) if one)
    first = next(stretches, None)
    if first is None:
        raise UserError("tokenizer", "the text has no words to learn from", "Give a file with text")
    try:
        with catch_panics():
            backend.train_from_iterator(chain([first], stretches), trainer)
    except RuntimeError as error:
        problem = f"the tokenizers library cannot learn from the text: {first_line(error)}"
        raise UserError("tokenizer.kind", problem, "Set tokenizer.kind: bpe") from None
    return Unigram(_in_order(json.loads(backend.to_str())["model"]["vocab"]), pretokenizer)


def _in_order(vocabulary: list[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """The pieces in an order that the text alone decides, as the library's does not: it adds numbers in
    the order of its threads, and bytes in that of a hash table.
    """
    lowest = min(score for _, score in vocabulary)
    pieces = []
    for piece, score in vocabulary:
        is_put_back = len(piece) == 1 and score < lowest + LOW_BAND
        pieces.append((piece, round(lowest if is_put_back else score, DIGITS)))
    return tuple(sorted(pieces, key=lambda pair: (-pair[1], pair[0])))
