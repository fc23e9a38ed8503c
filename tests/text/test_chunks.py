"""A corpus in chunks: raw files are cut between words, everything else between documents."""

import os

import pytest

from tests.tokenizer.conftest import random_text
from tinylm.common.errors import UserError
from tinylm.common.processes import limit_processes
from tinylm.text import chunks
from tinylm.text.chunks import part_borders, word_chunks
from tinylm.text.documents import TextChunk, text_chunks
from tinylm.text.named_sources import sources_named
from tinylm.tokenizer.pretokenize import PATTERNS, Pretokenizer, count_words


def texts_of(path: object, processes: int = 1, docs: int | None = None) -> list[str]:
    """The texts of all chunks of a file or folder."""
    source = sources_named([str(path)])
    return [text for chunk in word_chunks(source, processes, docs) for text in chunk.texts()]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_raw_file_is_cut_between_words(write, monkeypatch, pattern):
    """The words of the ten parts are the words of the whole."""
    monkeypatch.setattr(chunks, "PART_BYTES", 13_001)
    monkeypatch.setattr(chunks, "WINDOW_BYTES", 200)
    text = random_text(130_000)
    path = write("a.txt", text)
    borders = part_borders(path)
    assert (borders[0], borders[-1], len(borders)) == (0, path.stat().st_size, 11)
    parts = texts_of(path, processes=2)
    assert len(parts) == 10
    assert count_words(parts, Pretokenizer(pattern)) == count_words([text], Pretokenizer(pattern))


def test_without_a_place_between_words_a_part_ends_after_a_line_or_not_at_all(write, monkeypatch):
    """Three lines of 13 bytes in parts of 10: each line is a part."""
    monkeypatch.setattr(chunks, "PART_BYTES", 10)
    monkeypatch.setattr(chunks, "WINDOW_BYTES", 8)
    assert part_borders(write("a.txt", "東京東京\n" * 3)) == [0, 13, 26, 39]
    assert part_borders(write("b.txt", "x" * 100)) == [0, 100]


def test_other_files_are_read_by_document(write):
    """The text of the rows, without the JSON around it."""
    path = write("a.jsonl", '{"text": "low low"}\n{"text": "low"}\n')
    assert texts_of(path) == ["low low", "low"]
    assert texts_of(path, docs=1) == ["low low"]


def test_a_byte_order_mark_is_not_text(write):
    assert texts_of(write("a.txt", b"\xef\xbb\xbflow")) == ["low"]


def test_line_ends_of_windows_are_counted_as_they_are_encoded(write):
    """Documents lose the \\r of their line ends, so a merge with it would be a token that no text ever has."""
    assert texts_of(write("a.txt", "how are you\r\nwell\r\n")) == ["how are you\nwell\n"]


def test_bytes_that_are_not_utf8_are_named_with_their_offset(write):
    """E3: the offset counts from the start of the file, across its parts."""
    path = write("a.txt", b"a b\n" * 500_000 + b"a\xffb")
    with pytest.raises(UserError) as caught:
        texts_of(path)
    assert str(caught.value) == (
        f"{path}: not UTF-8 text: byte 0xff at offset 2000001. Save the file as UTF-8."
    )


def test_a_pipe_that_a_glob_matches_is_not_read(tmp_path):
    """E8: reading it would wait forever."""
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"a\.txt: not a regular file"):
        texts_of(tmp_path / "*.txt")


def test_an_error_in_reading_comes_after_the_documents_before_it():
    def documents():
        yield "one"
        raise UserError("a.jsonl:2", "not JSON", "Correct the line")

    (chunk,) = text_chunks(documents())
    texts = chunk.texts()
    assert next(texts) == "one"
    with pytest.raises(UserError, match="a.jsonl:2: not JSON"):
        next(texts)


@pytest.mark.parametrize(("min_size", "processes"), [(6, 4), (7, 1)])
def test_one_process_is_used_for_a_small_corpus(min_size, processes):
    """Two chunks of three characters; all chunks are returned, those that were measured too."""
    both = [TextChunk(["abc"]), TextChunk(["def"])]
    kept, used = limit_processes(both, 4, min_size)
    assert (list(kept), used) == (both, processes)
