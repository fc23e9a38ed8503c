"""Training or validation: which documents of a source belong to a split,
decided by the text of each document.

    text ─▶ hash with the seed, as a number in [0, 1) ─▶ below val_fraction: validation, else training

So equal documents are in the same split, and a stream needs no memory of the documents before.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from tinylm.common.errors import UserError
from tinylm.text.sources import LocalFiles, TextSource

Which = Literal["train", "val"]
NAMES: dict[Which, str] = {"train": "training", "val": "validation"}
T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """The training or validation documents of a source."""

    which: Which
    text_source: TextSource
    held_out: tuple[float, int] | None
    """fraction and seed of the validation documents, if both splits come from this source"""
    limit: int | None
    """number of documents to read at most"""

    def documents(self) -> Iterator[str]:
        """The documents of the split.

        Raises:
            UserError: there are none.
        """
        return self.select(self.text_source.documents(), lambda text: text)

    def select(
        self, items: Iterable[T], text_of: Callable[[T], str], *, kind: str = "documents"
    ) -> Iterator[T]:
        """The items of the source, documents or rows, that are in the split by their text.

        Raises:
            UserError: there are none.
        """
        n_read = n_kept = 0
        for item in items:
            n_read += 1
            if self.has(text_of(item)):
                n_kept += 1
                yield item
                if n_kept == self.limit:
                    return
        if not n_kept:
            raise self.empty_error(n_read, kind)

    def has(self, text: str) -> bool:
        """Whether a document of the source is in this split, without regard to the limit."""
        return self.held_out is None or is_held_out(text, *self.held_out) == (self.which == "val")

    def _unseen_separator(self, n_read: int) -> str | None:
        """The separator of documents if it cannot have occurred, because there are
        as many documents as files.
        """
        source = self.text_source
        if not isinstance(source, LocalFiles) or n_read > len(source.paths):
            return None
        return source.separator

    def empty_error(self, n_read: int, kind: str = "documents") -> UserError:
        """The error to raise if none of the `n_read` documents or rows of the source is
        in the split.
        """
        if not n_read or self.held_out is None:
            content = "text" if kind == "documents" else kind
            problem = f"no {kind}, only blank lines or nothing at all"
            return UserError(self.text_source.name, problem, f"Give a file with {content}")
        separator = self._unseen_separator(n_read)
        if separator is not None:
            setting = "data.document_separator"
            problem = (
                f"'{separator}' does not occur in {self.text_source.name}, "
                "so each .txt file is one document"
            )
            fix = how_to_write(separator, setting)
            return UserError(setting, problem, f"Set {{}} to what divides documents{fix}", setting)
        found = f"got 0 of {n_read} {kind} (data.val_fraction {self.held_out[0]})"
        fix = f"Give more {kind}, another data.val_fraction, or data.val_dataset"
        return UserError(self.text_source.name, f"{NAMES[self.which]} {found}", fix)


def how_to_write(separator: str, setting: str) -> str:
    r"""How a shell must be given a separator that was typed with a backslash; "" for another one.

    >>> how_to_write("---", "data.document_separator")
    ''
    >>> print(how_to_write(r"\n\n", "--separator"))
    ; for the ends of lines write --separator=$'\n\n' (in YAML "\n\n")
    """
    if "\\" not in separator:
        return ""
    return f"; for the ends of lines write {setting}=$'{separator}' (in YAML \"{separator}\")"


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Whether a document is for validation: its hash with the seed is
    in the first `fraction` of all hashes.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
