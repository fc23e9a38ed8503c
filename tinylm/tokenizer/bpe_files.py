"""A learned vocabulary: its ids, its files, and the requests for one that are refused.

`LearnedVocabulary` is what BPE and Unigram (unigram.py) share. The ids of BPE are the 256 bytes, then
one per merge, then the special tokens. Its files are GPT-2's vocab.json
and merges.txt, and the tokenizer.json and tokenizer_config.json of Hugging Face; hf_files.py reads
them. Knows nothing of learning (bpe_fast.py).
"""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinylm.common.errors import UserError
from tinylm.common.files import atomic_path, writing
from tinylm.config import split_pattern
from tinylm.config.schema import COUNT_LIMIT
from tinylm.tokenizer.added import check_names
from tinylm.tokenizer.hf_files import WELL_KNOWN_EOS
from tinylm.tokenizer.pretokenize import PATTERNS, Pretokenizer, gpt2_form

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import Model
    from tokenizers.pre_tokenizers import PreTokenizer

WELL_KNOWN_PAD = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>")


class LearnedVocabulary(ABC):
    """Tokens that were learned from words of bytes: their ids, in their order, then the special tokens."""

    pretokenizer: Pretokenizer

    @abstractmethod
    def tokens(self) -> list[str]:
        """The tokens in GPT-2's visible form, in the order of their ids, without the special ones."""

    @abstractmethod
    def model(self) -> "Model":
        """The model of the `tokenizers` library."""

    def more_files(self) -> dict[str, str]:
        """Files beside tokenizer.json and tokenizer_config.json, and their texts."""
        return {}

    @property
    def vocab_size(self) -> int:
        return len(self.tokens()) + len(self.pretokenizer.special_tokens)

    @property
    def eos(self) -> str:
        """The special token that ends a text: a well-known one, else the first."""
        special = self.pretokenizer.special_tokens
        return next((name for name in WELL_KNOWN_EOS if name in special), special[0])

    @property
    def pad(self) -> str | None:
        """The special token for padding, if there is a well-known one."""
        special = self.pretokenizer.special_tokens
        return next((name for name in WELL_KNOWN_PAD if name in special), None)

    def vocabulary(self) -> dict[str, int]:
        """The tokens in GPT-2's visible form, and their ids.

        Raises:
            UserError: a special token is written like another token.
        """
        ids = {token: id for id, token in enumerate(self.tokens())}
        for name in self.pretokenizer.special_tokens:
            if name in ids:
                raise UserError(
                    ("special token", name),
                    "another token is written the same way in the files",
                    "Choose another name",
                )
            ids[name] = len(ids)
        return ids

    def backend(self) -> "Backend":
        """The same tokenizer in the `tokenizers` library."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders

        self.vocabulary()  # no special token is another token
        backend = Backend(self.model())
        backend.pre_tokenizer = word_splitter(self.pretokenizer)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(list(self.pretokenizer.special_tokens))
        return backend

    def save(self, folder: Path, setting: str = "the output folder") -> None:
        """Write the files into the new folder `folder`, all or none;
        `load_hf_tokenizer` and AutoTokenizer read them.

        Raises:
            UserError: `folder` cannot be written; the message names `setting`, which it comes from.
        """
        with writing(folder, setting), atomic_path(folder) as temporary:
            self.write_files(temporary)

    def write_files(self, folder: Path) -> None:
        """Create `folder` and write the files into it."""
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos,
            "clean_up_tokenization_spaces": False,
        }
        if self.pad:
            settings["pad_token"] = self.pad
        texts = self.more_files() | {
            "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2) + "\n",
            "tokenizer.json": self.backend().to_str(pretty=True),
        }
        folder.mkdir()
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")


@dataclass(frozen=True)
class Bpe(LearnedVocabulary):
    """The merges in the order they were learned, and how texts were split into words."""

    merges: tuple[tuple[bytes, bytes], ...]
    pretokenizer: Pretokenizer

    def tokens(self) -> list[str]:
        tokens = [bytes([byte]) for byte in range(256)]
        tokens += [left + right for left, right in self.merges]
        return [gpt2_form(token) for token in tokens]

    def model(self) -> "Model":
        from tokenizers import models

        merges = [(gpt2_form(left), gpt2_form(right)) for left, right in self.merges]
        return models.BPE(self.vocabulary(), merges)

    def more_files(self) -> dict[str, str]:
        merges = [f"{gpt2_form(left)} {gpt2_form(right)}\n" for left, right in self.merges]
        return {
            "vocab.json": json.dumps(self.vocabulary(), ensure_ascii=False),
            "merges.txt": "".join(["#version: 0.2\n", *merges]),
        }


def word_splitter(pretokenizer: Pretokenizer) -> "PreTokenizer":
    """How the `tokenizers` library splits a text into words, and these into bytes."""
    from tokenizers import Regex, pre_tokenizers

    if pretokenizer.expression == PATTERNS["gpt2"]:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = pre_tokenizers.Split(Regex(pretokenizer.expression), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([words, as_bytes])


def smallest_vocabulary(pretokenizer: Pretokenizer) -> int:
    """The size without any merge."""
    return 256 + len(pretokenizer.special_tokens)


def check_request(vocab_size: int, pretokenizer: Pretokenizer) -> None:
    """Raise a UserError for a vocabulary that is not possible, before the text is read."""
    special = pretokenizer.special_tokens
    if not special:
        raise UserError(
            "special tokens",
            "must be at least one, which ends a text",
            "Name one, such as <|endoftext|>",
        )
    check_names(special)
    if problem := split_pattern.pattern_problem(pretokenizer.pattern):
        raise UserError("tokenizer.pattern", problem, split_pattern.FIX)
    smallest = smallest_vocabulary(pretokenizer)
    n_special = f"{len(special)} special token{'s' if len(special) > 1 else ''}"
    if vocab_size < smallest:
        raise UserError(
            "tokenizer.vocab_size",
            f"must be at least {smallest} (256 bytes and {n_special}), got {vocab_size}",
            "Raise it",
        )
    if vocab_size > COUNT_LIMIT:
        raise UserError(
            "tokenizer.vocab_size",
            f"must be at most {COUNT_LIMIT}, got {vocab_size}",
            "Lower it, for example to 32000",
        )
