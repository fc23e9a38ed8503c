"""A learned BPE vocabulary: its ids, its files, and the requests for one that are refused.

Ids are the 256 bytes, then one per merge, then the special tokens. The files are GPT-2's vocab.json
and merges.txt, and the tokenizer.json and tokenizer_config.json of Hugging Face; hf_files.py reads
them. Knows nothing of learning (bpe_fast.py).
"""

import json
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

WELL_KNOWN_PAD = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>")
FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class Bpe:
    """The merges in the order they were learned, and how texts were split into words."""

    merges: tuple[tuple[bytes, bytes], ...]
    pretokenizer: Pretokenizer

    @property
    def vocab_size(self) -> int:
        return smallest_vocabulary(self.pretokenizer) + len(self.merges)

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
        tokens = [bytes([byte]) for byte in range(256)]
        tokens += [left + right for left, right in self.merges]
        ids = {gpt2_form(token): id for id, token in enumerate(tokens)}
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
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        merges = [(gpt2_form(left), gpt2_form(right)) for left, right in self.merges]
        backend = Backend(models.BPE(self.vocabulary(), merges))
        if self.pretokenizer.expression == PATTERNS["gpt2"]:
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        else:
            words = pre_tokenizers.Split(Regex(self.pretokenizer.expression), "isolated")
            as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            backend.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(list(self.pretokenizer.special_tokens))
        return backend

    def save(self, folder: Path, setting: str = "the output folder") -> None:
        """Write `FILES` into the new folder `folder`, all or none;
        `load_hf_tokenizer` and AutoTokenizer read them.

        Raises:
            UserError: `folder` cannot be written; the message names `setting`, which it comes from.
        """
        with writing(folder, setting), atomic_path(folder) as temporary:
            self.write_files(temporary)

    def write_files(self, folder: Path) -> None:
        """Create `folder` and write `FILES` into it."""
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos,
            "clean_up_tokenization_spaces": False,
        }
        if self.pad:
            settings["pad_token"] = self.pad
        merges = [f"{gpt2_form(left)} {gpt2_form(right)}\n" for left, right in self.merges]
        texts = (
            json.dumps(self.vocabulary(), ensure_ascii=False),
            "".join(["#version: 0.2\n", *merges]),
            json.dumps(settings, ensure_ascii=False, indent=2) + "\n",
            self.backend().to_str(pretty=True),
        )
        folder.mkdir()
        for name, text in zip(FILES, texts, strict=True):
            (folder / name).write_text(text, encoding="utf-8", newline="\n")


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
