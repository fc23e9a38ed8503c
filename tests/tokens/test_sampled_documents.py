"""Every n-th training document, over several files."""

from pathlib import Path

import numpy as np

from tests.conftest import write_token_file
from tinylm.tokenizer.byte_char import ByteTokenizer
from tinylm.tokens.sampled_documents import sample_files, sample_rows
from tinylm.tokens.token_file import TokenFile


def sampled(folder: Path, files: list[list[str]], most: int) -> tuple[int, list[tuple[str, str]]]:
    """The interval, and the chosen documents with the names of their files."""
    tokenizer = ByteTokenizer()
    opened = []
    for number, texts in enumerate(files):
        path = folder / f"{number}.bin"
        write_token_file(path, texts, tokenizer)
        opened.append((f"{number}", TokenFile.open(path)))
    sample_interval, documents = sample_files(opened, most)
    return sample_interval, [(name, tokenizer.decode(ids[:-1].tolist())) for name, ids in documents]


def test_of_files_of_one_document_each_every_third_is_chosen(tmp_path: Path) -> None:
    """7 documents of 10 tokens with EOS, 30 of them at most: 3 documents."""
    files = [[f"document{n}"] for n in range(7)]
    assert sampled(tmp_path, files, 30) == (
        3,
        [("0", "document0"), ("3", "document3"), ("6", "document6")],
    )
    assert sampled(tmp_path, files, 70) == (1, [(f"{n}", f"document{n}") for n in range(7)])


def test_documents_are_numbered_across_files(tmp_path: Path) -> None:
    """Of documents 0 to 8 of 4 tokens, numbers 0, 3 and 6 are chosen: 0 of a, 1 of b and 2 of c."""
    files = [["a.0", "a.1"], ["b.0", "b.1"], ["c.0", "c.1", "c.2", "c.3", "c.4"]]
    assert sampled(tmp_path, files, 12) == (3, [("0", "a.0"), ("1", "b.1"), ("2", "c.2")])


def test_the_sample_is_at_most_the_limit_and_so_reaches_the_last_file(tmp_path: Path) -> None:
    """88 tokens, every second document is long: interval 2 has 80 tokens, interval 3 has 42."""
    long, short = "x" * 19, "y"
    files = [[long, short], [long, short], [long, short], [long, short]]
    assert sampled(tmp_path, files, 60) == (3, [("0", long), ("1", short), ("3", long)])


def test_of_a_long_first_document_it_alone_is_chosen() -> None:
    rows = [("a:1", np.arange(50)), ("a:2", np.arange(3)), ("a:3", np.arange(3))]
    sample_interval, documents = sample_rows(rows, 20)
    assert (sample_interval, [where for where, _ in documents]) == (3, ["a:1"])
