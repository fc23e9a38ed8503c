"""Documents from files and from the hub, the split, token files: what is read, what is refused, what survives a crash."""

import gzip
import io
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.utils import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinylm import corpus, encode
from tinylm.config import DataConfig
from tinylm.corpus import find_split, is_held_out, shared_documents, train_documents, val_documents
from tinylm.encode import cached_token_file, encode_documents, source_fingerprint
from tinylm.errors import UserError
from tinylm.tokenfile import HEADER_BYTES, MAGIC, TokenFile, checked_tokens, is_token_file, token_dtype, write_token_file
from tinylm.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

ROOT = Path(__file__).parent.parent
BYTES = ByteTokenizer()
SEED = 1


def read(path: Path | str, **settings) -> list[str]:
    """Every document of a source, training and validation alike."""
    return list(find_split(DataConfig(dataset=str(path), **settings), "train", SEED).source.documents())


def refusal(path: Path | str, **settings) -> str:
    """The message with which a source is refused."""
    with pytest.raises(UserError) as caught:
        read(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes | str], Path]:
    """Writes a file into the test's folder."""

    def write(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# --- text files -------------------------------------------------------------------------------------------------------


def test_each_line_of_a_text_file_is_a_document_and_blank_lines_are_none(write):
    assert read(write("a.txt", "one\n\n  \t\n two \nthree")) == ["one", " two ", "three"]


def test_a_byte_order_mark_and_carriage_returns_are_no_text(write):
    """Only the pair \\r\\n ends a line; a \\r inside stays."""
    assert read(write("a.txt", b"\xef\xbb\xbfone\r\ntw\ro\r\n\r\nthree\r")) == ["one", "tw\ro", "three"]


def test_only_a_newline_ends_a_line(write):
    """str.splitlines would also cut at U+2028, U+0085, form feed, ...; NUL would end a C string."""
    line = "a\u2028b\x85c\x0cd\x00e\x1cf\ufeffg"
    assert read(write("a.txt", line + "\n")) == [line]


@given(lines=st.lists(st.text(alphabet=st.characters(exclude_characters="\n\r\ufeff", exclude_categories=["Cs"]))))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_lines_come_back(tmp_path, lines):
    (tmp_path / "a.txt").write_bytes("\n".join(lines).encode())
    assert read(tmp_path / "a.txt") == [line for line in lines if line and not line.isspace()]


def test_a_separator_divides_documents_of_many_lines(write):
    path = write("a.txt", "one\nmore\n<|endoftext|>\n\n<|endoftext|>two\n")
    assert read(path, document_separator="<|endoftext|>") == ["one\nmore", "two"]


def test_a_separator_of_line_ends_works_in_a_file_from_windows(write):
    path = write("a.txt", b"one\r\nmore\r\n\r\ntwo\r\n")
    assert read(path, document_separator="\n\n") == read(path, document_separator="\r\n\r\n") == ["one\nmore", "two"]


@given(texts=st.lists(st.text(alphabet="ab\n-", max_size=6), max_size=8), separator=st.text(alphabet="-\n", min_size=1, max_size=3), size=st.integers(1, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_separator_is_found_wherever_reading_pauses(tmp_path, texts, separator, size):
    """Oracle: the whole text split at once. The file counts as ended by a newline, as each of its lines is."""
    text = separator.join(texts)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    expected = [part.strip("\n") for part in (text if text.endswith("\n") or not text else text + "\n").split(separator) if part.strip()]
    limit, corpus.SEARCH_CHARACTERS = corpus.SEARCH_CHARACTERS, size
    try:
        assert read(tmp_path / "a.txt", document_separator=separator) == expected
    finally:
        corpus.SEARCH_CHARACTERS = limit


@pytest.mark.parametrize(
    ("content", "line", "byte", "offset"),
    [
        (b"ok\nb\xffd\n", 2, "ff", 4),
        (b"\xef\xbb\xbfa\x80", 1, "80", 4),
        (b"\xed\xa0\x80", 1, "ed", 0),
        (b"a\nb\n\xe2\x82", 3, "e2", 4),
        ("é".encode("utf-16"), 1, "ff", 0),
    ],
)
def test_bytes_that_are_not_utf8_are_named_with_their_offset(write, content, line, byte, offset):
    """Offsets count from the start of the file, its byte-order mark included; a surrogate in UTF-8 is no UTF-8."""
    path = write("a.txt", content)
    assert refusal(path) == f"{path}:{line}: not UTF-8 text: byte 0x{byte} at offset {offset}. Save the file as UTF-8."


def test_a_line_without_end_is_refused_before_it_fills_the_memory(write, monkeypatch):
    monkeypatch.setattr(corpus, "LINE_BYTES_LIMIT", 100)
    path = write("a.txt", "ok\n" + "x" * 1000)
    assert refusal(path) == f"{path}:2: a line of 100 bytes and more. Is it text? Cut it into documents."


# --- jsonl ------------------------------------------------------------------------------------------------------------


def test_jsonl_gives_the_text_field_of_each_row(write):
    rows = [{"text": "one", "n": 1}, {"text": "two\nlines"}, {"text": " "}, {"text": ""}, {"text": "é\x00"}]
    path = write("a.jsonl", "\r\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read(path) == ["one", "two\nlines", "é\x00"]
    body = write("b.jsonl", '{"body": "x", "text": 3}')
    assert read(body, text_field="body") == ["x"]


MEND = "Correct the row, or set data.text_field to the key that holds the text."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": 5}', f"text: expected a string, found a number. {MEND}"),
        ('{"text": 5.5}', f"text: expected a string, found a number. {MEND}"),
        ('{"text": null}', f"text: expected a string, found null. {MEND}"),
        ('{"text": true}', f"text: expected a string, found a boolean. {MEND}"),
        ('{"text": ["a"]}', f"text: expected a string, found a list. {MEND}"),
        ('{"text": {}}', f"text: expected a string, found an object. {MEND}"),
        ('{"body": "a", "n": 1}', f"text: missing; the row has body, n. {MEND}"),
        ("{}", f"text: missing; the row has no keys. {MEND}"),
        ('"text"', f'expected an object such as {{"text": "..."}}, found a string. {MEND}'),
        ('{"text": "a', "not JSON: Unterminated string starting at: line 1 column 10 (char 9). Each line is one object; correct the line."),
        ('{"text": "a"} {"text": "b"}', "not JSON: Extra data: line 1 column 15 (char 14). Each line is one object; correct the line."),
        (
            '{"text": "a\\ud800"}',
            "text: the text has the lone surrogate \\ud800 at position 1, which is half a character. Take it out, or write the whole character.",
        ),
        ("[" * 100_000, "not JSON: "),
        ('{"text": ' + "9" * 5000 + "}", "not JSON: "),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_key(write, row, message):
    path = write("data.jsonl", f'{{"text": "good"}}\n{row}\n{{"text": "good"}}\n')
    assert refusal(path).startswith(f"{path}:2: {message}")


def test_the_rows_before_a_bad_one_are_read(write):
    documents = find_split(DataConfig(dataset=str(write("a.jsonl", '{"text": "good"}\n3\n'))), "train", SEED).source.documents()
    assert next(documents) == "good"
    with pytest.raises(UserError, match="a.jsonl:2: "):
        next(documents)


# --- gz and parquet ---------------------------------------------------------------------------------------------------


def test_compressed_files_read_as_their_content(write):
    assert read(write("a.txt.gz", gzip.compress(b"one\ntwo\n"))) == ["one", "two"]
    assert read(write("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n'))) == ["one"]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-20], lambda data: data[:30] + b"\xff\xff\xff" + data[33:], lambda data: b"<html>"], ids=["cut", "changed", "other"]
)
def test_damaged_gzip_data_name_their_file(write, damage):
    path = write("a.txt.gz", damage(gzip.compress(b"".join(b"line %d of the text\n" % (i * i) for i in range(99)))))
    assert refusal(path).startswith(f"{path}: damaged or cut-off gzip data (")


def parquet(columns: dict[str, object], row_group_size: int = 2) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, row_group_size=row_group_size)
    return file.getvalue()


def test_parquet_gives_its_column_in_order(write):
    texts = ["one", "two\nlines", " ", "é\x00", "five"]
    path = write("a.parquet", parquet({"n": range(5), "text": texts}))
    assert read(path) == ["one", "two\nlines", "é\x00", "five"]
    assert read(write("b.parquet", parquet({"body": pa.array(texts, pa.large_string())})), text_field="body") == read(path)


def test_parquet_is_read_in_batches(write, monkeypatch):
    monkeypatch.setattr(corpus, "PARQUET_BATCH_ROWS", 3)
    assert read(write("a.parquet", parquet({"text": [str(i) for i in range(10)]}))) == [str(i) for i in range(10)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"], "n": [1]}, "text: no such column; there are body, n. Set data.text_field to the one that holds the text."),
        ({"text": ["a", None]}, f"row 2: text: expected a string, found null. {MEND}"),
        ({"text": [7]}, f"row 1: text: expected a string, found a number. {MEND}"),
        ({"text": [["a"]]}, f"row 1: text: expected a string, found a list. {MEND}"),
    ],
)
def test_a_bad_parquet_row_is_named(write, columns, message):
    path = write("a.parquet", parquet(columns))
    assert refusal(path) == f"{path}: {message}"


@pytest.mark.parametrize("keep", [0, 3, 100, -1, -10])
def test_a_cut_off_parquet_file_is_named(write, keep):
    path = write("a.parquet", parquet({"text": [f"line {i}" for i in range(50)]})[:keep])
    assert refusal(path).startswith(f"{path}: damaged or cut off, or not a parquet file: ")


def test_damage_inside_a_parquet_file_is_named(write):
    data = parquet({"text": [f"line {i}" for i in range(50)]}, row_group_size=50)
    path = write("a.parquet", data[:10] + b"\xff" * 60 + data[70:])
    assert refusal(path).startswith(f"{path}: damaged or cut off, or not a parquet file: ")


# --- folders, globs and what is not a file ----------------------------------------------------------------------------


def test_a_folder_is_read_to_its_bottom_in_sorted_order(write, tmp_path):
    for name, content in (("c/b.txt", "3"), ("c/a/x.jsonl", '{"text": "2"}'), ("a.txt", "1"), ("README.md", "no"), (".git/x.txt", "no"), ("c/.x.txt", "no")):
        write(f"corpus/{name}", content)
    assert read(tmp_path / "corpus") == ["1", "2", "3"]
    assert read(tmp_path / "corpus/**/*.txt") == ["1", "3"]
    assert read(tmp_path / "corpus/*/*.txt") == ["3"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(write):
    write("a1.txt", "glob")
    assert read(write("a[1].txt", "file")) == ["file"]


def special_files(folder: Path) -> dict[str, tuple[str, str]]:
    os.mkfifo(folder / "pipe.txt")
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    (folder / "dangling.txt").symlink_to(folder / "gone")
    (folder / "zero.txt").symlink_to("/dev/zero")
    (folder / "empty").mkdir()
    (folder / "notes.md").write_text("x", encoding="utf-8")
    return {
        "missing.txt": ("data.dataset: ", "not found. Give a file, a folder, a glob, or a Hugging Face name written owner/name."),
        "no/such/folder": ("data.dataset: ", "not found. Give a file, a folder, a glob, or a Hugging Face name written owner/name."),
        "*.jsonl": ("data.dataset: ", "no file of a kind with documents (.txt, .jsonl, .parquet, .txt.gz, .jsonl.gz) matches. Give the path of one."),
        "empty": ("data.dataset: ", "no file of a kind with documents (.txt, .jsonl, .parquet, .txt.gz, .jsonl.gz) in this folder. Give the path of one."),
        "notes.md": ("data.dataset: ", "not a kind of file with documents (.txt, .jsonl, .parquet, .txt.gz, .jsonl.gz). Convert it, or name it by its kind."),
        "pipe.txt": ("", "not a regular file. Give the path of a file on disk."),
        "zero.txt": ("", "not a regular file. Give the path of a file on disk."),
        "loop.txt": ("", "Too many levels of symbolic links. Give the path of a file that can be read."),
        "dangling.txt": ("", "not found. Give the path of a file that can be read."),
        "x" * 300 + ".txt": ("data.dataset: ", "not found. Give a file, a folder, a glob, or a Hugging Face name written owner/name."),
    }


def test_what_cannot_be_read_to_its_end_is_refused_at_once(tmp_path):
    start = time.monotonic()
    for name, (before, message) in special_files(tmp_path).items():
        assert refusal(tmp_path / name) == f"{before}{tmp_path / name}: {message}"
    assert refusal("/dev/zero") == "/dev/zero: not a regular file. Give the path of a file on disk."
    assert time.monotonic() - start < 2


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    assert refusal(tmp_path) == f"{tmp_path / 'pipe.txt'}: not a regular file. Give the path of a file on disk."


def test_a_folder_that_cannot_be_listed_is_not_passed_over(write, tmp_path, monkeypatch):
    """os.walk alone would leave out what it may not see, and train on the rest."""
    write("corpus/a.txt", "one")
    write("corpus/closed/b.txt", "two")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert refusal(tmp_path / "corpus") == f"{tmp_path / 'corpus/closed'}: Permission denied. Give a folder that can be read."


def test_a_folder_that_links_to_itself_ends(tmp_path, write):
    write("corpus/a.txt", "one")
    (tmp_path / "corpus/again").symlink_to(tmp_path / "corpus")
    assert read(tmp_path / "corpus") == ["one"]


def test_a_name_is_escaped_in_a_message():
    assert refusal("a\x1b]31m\n.txt").startswith(r"data.dataset: a\x1b]31m\n.txt: not found.")


# --- datasets of the hub ----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(write, monkeypatch) -> list[tuple]:
    """The hub, played by a local file that is read through `datasets`; gives the calls."""
    import datasets

    path = write("served/train.jsonl", "".join(json.dumps({"id": i, "text": f"document {i}" if i != 3 else " "}) + "\n" for i in range(50)))
    calls: list[tuple] = []
    load = datasets.load_dataset

    def serve(name: str, config: str | None, *, split: str, streaming: bool):
        calls.append((name, config, split, streaming))
        return load("json", data_files={split: str(path)}, split=split, streaming=streaming, cache_dir=str(path.parent / "cache"))

    monkeypatch.setattr("datasets.load_dataset", serve)
    monkeypatch.setattr(corpus, "require_hub", lambda what, mend: None)
    return calls


HUB_TEXTS = [f"document {i}" for i in range(50) if i != 3]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_is_read_in_its_order(hub, streaming):
    assert read("owner/name", dataset_config="en", split="validation", streaming=streaming) == HUB_TEXTS
    assert hub == [("owner/name", "en", "validation", streaming)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_stream_goes_on_exactly_where_it_stopped(hub, streaming):
    data = DataConfig(dataset="owner/name", streaming=streaming)
    whole = list(train_documents(data, SEED))
    assert 30 < len(whole) < 49
    for skip in (0, 1, 17, len(whole), len(whole) + 5):
        assert list(train_documents(data, SEED, skip=skip)) == whole[skip:]


def test_validation_from_another_split_of_the_hub(hub):
    data = DataConfig(dataset="owner/name", val_split="validation", train_docs=5, val_docs=2)
    assert list(train_documents(data, SEED)) == HUB_TEXTS[:5]
    assert list(val_documents(data, SEED)) == HUB_TEXTS[:2]
    assert [call[2] for call in hub] == ["train", "validation"]


@pytest.mark.parametrize(
    ("same", "mend"),
    [
        ({"val_split": "train"}, "Set data.val_split to another split, or leave it out."),
        ({"val_dataset": "owner/name"}, "Give another dataset, or set data.val_split in its place."),
    ],
)
def test_the_split_that_is_trained_on_does_not_validate(hub, same, mend):
    """The error is headed by the setting that the user gave."""
    with pytest.raises(UserError) as caught:
        val_documents(DataConfig(dataset="owner/name", **same), SEED)
    assert str(caught.value) == f"data.{next(iter(same))}: validation would be the training documents themselves. {mend}"


def test_holding_out_of_a_stream_needs_a_number_of_documents(hub):
    with pytest.raises(
        UserError, match="data.val_docs: holding documents out of a streamed dataset would read all of it. Set data.val_docs, for example 1000."
    ):
        val_documents(DataConfig(dataset="owner/name", streaming=True), SEED)
    assert len(list(val_documents(DataConfig(dataset="owner/name", streaming=True, val_docs=2), SEED))) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_row_of_the_hub_is_named(hub, streaming):
    assert refusal("owner/name", text_field="id", streaming=streaming) == f"owner/name (train): row 1: id: expected a string, found a number. {MEND}"
    assert "owner/name (train): " in refusal("owner/name", text_field="body", streaming=streaming)


def test_without_a_network_a_hub_name_fails_at_once_and_says_how_to_go_on(monkeypatch):
    def unreachable(address, timeout):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    message = refusal("owner/name")
    assert message.startswith("data.dataset: owner/name: nothing here has that name, and huggingface.co cannot be reached (Network is unreachable).")
    assert "Give a local file or folder as data.dataset." in message


def test_what_the_library_says_of_a_hub_dataset_is_passed_on(monkeypatch):
    def fail(*args, **kwargs):
        raise FileNotFoundError("Dataset 'owner/name' doesn't exist on the Hub")

    monkeypatch.setattr("datasets.load_dataset", fail)
    monkeypatch.setattr(corpus, "require_hub", lambda what, mend: None)
    assert refusal("owner/name").startswith("data.dataset: owner/name: Dataset 'owner/name' doesn't exist on the Hub. Check data.dataset_config")


NETWORK_ERRORS = [ConnectionResetError(104, "Connection reset by peer"), httpx.ReadTimeout("timed out"), httpx.RemoteProtocolError("server disconnected")]


@pytest.mark.parametrize("error", NETWORK_ERRORS, ids=lambda error: type(error).__name__)
def test_a_network_that_fails_inside_a_stream_is_one_line(monkeypatch, error):
    """The HTTP library's errors are no OSErrors, and the hub's library lets some of them through."""

    class Broken:
        column_names = None

        def __iter__(self):
            yield {"text": "one"}
            raise error

    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: Broken())
    monkeypatch.setattr(corpus, "require_hub", lambda what, mend: None)
    documents = find_split(DataConfig(dataset="owner/name", streaming=True), "train", SEED).source.documents()
    assert next(documents) == "one"
    with pytest.raises(UserError) as caught:
        next(documents)
    assert str(caught.value) == f"owner/name (train): reading stopped: {error}. Try again: a run resumes where it stopped."


def test_a_network_that_fails_before_the_first_row_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise httpx.ConnectError("no route")

    monkeypatch.setattr("datasets.load_dataset", fail)
    monkeypatch.setattr(corpus, "require_hub", lambda what, mend: None)
    assert refusal("owner/name").startswith("data.dataset: owner/name: no route. Check data.dataset_config and data.split")


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/name", "owner/" + "x" * 300 + ".txt"])
def test_a_name_that_is_too_long_is_refused_on_one_line(name, monkeypatch):
    """The operating system refuses to look for it, and Path.is_dir would pass that on."""

    def offline(what: str, mend: str) -> None:
        raise UserError(f"{what}: offline. {mend}")

    monkeypatch.setattr(corpus, "require_hub", offline)
    assert refusal(name).startswith(f"data.dataset: {name}: {'offline' if name.endswith('name') else 'not found'}. Give a ")


def test_a_token_file_whose_name_is_too_long_is_refused_on_one_line():
    with pytest.raises(UserError, match="x.bin: File name too long. Give the path of a file that can be read."):
        cached_token_file(DataConfig(dataset="x" * 300 + ".bin"), "train", BYTES, SEED)


@pytest.mark.parametrize("name", ["data/tiny_corpu", "data/x.txt", "./owner/name", "wikitext", "owner/name.bin", "a/b/c", "/a/b", "owner/name.jsonl.gz"])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(name, tmp_path, monkeypatch):
    """`data` is a folder here, so data/tiny_corpu is a path that was typed wrongly."""
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "require_hub", None)
    if is_token_file(name):
        with pytest.raises(UserError, match="owner/name.bin: not found"):
            TokenFile.open(name)
    else:
        assert refusal(name).startswith(f"data.dataset: {name}: not found.")


def test_what_is_here_is_never_asked_of_the_hub(write, tmp_path, monkeypatch):
    write("owner/name/a.txt", "one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "require_hub", None)
    assert read("owner/name") == ["one"]


@pytest.mark.parametrize("settings", [{"val_split": "test"}, {"split": "test"}, {"dataset_config": "en"}])
def test_files_here_have_no_splits(write, settings):
    assert "is on this machine, where files have no splits. Take split, val_split and dataset_config out." in refusal(write("a.txt", "x"), **settings)


def test_a_missing_library_is_named_with_its_pip_line(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal(write("a.parquet", b"")).endswith("a.parquet: reading it needs pyarrow. Install it: pip install datasets")


# --- the split --------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(write) -> Path:
    """1000 documents; the last 200 repeat the first 200."""
    return write("lines.txt", "".join(f"document {i % 800}\n" for i in range(1000)))


def test_no_document_is_in_both_splits_and_none_is_lost(lines):
    """Duplicates stand 800 lines apart and must fall on the same side."""
    data = DataConfig(dataset=str(lines))
    train, val = list(train_documents(data, SEED)), list(val_documents(data, SEED))
    assert set(train) & set(val) == set()
    assert sorted(train + val) == sorted(read(lines))


def test_the_fraction_held_out_is_the_one_asked_for():
    """n = 10000 draws at p = 0.1: standard deviation 30, so 5 of them are 150."""
    held = sum(is_held_out(f"text {i}", 0.1, SEED) for i in range(10_000))
    assert abs(held - 1000) < 150


def test_the_seed_decides_who_is_held_out(lines):
    data = DataConfig(dataset=str(lines))
    first, again, other = (list(val_documents(data, seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_limits_count_documents_of_their_split(lines):
    data = DataConfig(dataset=str(lines))
    few = data.model_copy(update={"train_docs": 7, "val_docs": 3})
    assert list(train_documents(few, SEED)) == list(train_documents(data, SEED))[:7]
    assert list(val_documents(few, SEED)) == list(val_documents(data, SEED))[:3]
    assert list(train_documents(few, SEED, skip=5)) == list(train_documents(data, SEED))[5:7]


def test_a_second_source_validates_and_the_first_is_all_for_training(write, lines):
    other = write("other.txt", "alpha\nbeta\n")
    data = DataConfig(dataset=str(lines), val_dataset=str(other))
    assert (len(list(train_documents(data, SEED))), list(val_documents(data, SEED))) == (1000, ["alpha", "beta"])


def test_documents_in_both_sources_are_counted(write):
    """Of the validation documents b (twice), c and x, the training source has b and c."""
    data = DataConfig(
        dataset=str(write("a.txt", "a\nb\nb\nc\n")), val_dataset=str(write("b.jsonl", '{"text": "b"}\n{"text": "b"}\n{"text": "c"}\n{"text": "x"}\n'))
    )
    assert shared_documents(data, SEED) == 2
    assert shared_documents(data.model_copy(update={"val_dataset": None}), SEED) == 0


@pytest.mark.parametrize("content", ["", "\n\n \n\t\n", "\n" * 1000])
def test_a_file_without_documents_is_an_error(write, content):
    path = write("a.txt", content)
    for documents in (train_documents, val_documents):
        with pytest.raises(UserError) as caught:
            list(documents(DataConfig(dataset=str(path)), SEED))
        assert str(caught.value) == f"{path}: no documents, only blank lines or nothing at all. Give a file with text."


def test_a_split_without_documents_is_an_error_with_counts(write):
    text = next(f"text {i}" for i in range(99) if not is_held_out(f"text {i}", 0.5, SEED))
    data = DataConfig(dataset=str(write("a.txt", f"{text}\n{text}\n")), val_fraction=0.5)
    assert list(train_documents(data, SEED)) == [text, text]
    assert list(train_documents(data, SEED, skip=9)) == []
    with pytest.raises(UserError) as caught:
        list(val_documents(data, SEED))
    counts = "validation got 0 of 2 documents (data.val_fraction 0.5)"
    assert str(caught.value) == f"{data.dataset}: {counts}. Give more documents, another data.val_fraction, or data.val_dataset."


def test_a_source_that_is_not_there_is_found_out_before_the_first_document():
    with pytest.raises(UserError, match="not found"):
        train_documents(DataConfig(dataset="missing.txt"), SEED)


# --- ids --------------------------------------------------------------------------------------------------------------


def test_each_document_is_cut_and_closed_by_eos():
    """`abc` is 97 98 99; EOS (258) comes after the cut, so a cut document still ends."""
    encoded = [tokens.tolist() for tokens in encode_documents(["abc", "é", "z"], BYTES, 2)]
    assert encoded == [[97, 98, 258], [0xC3, 0xA9, 258], [122, 258]]
    assert [tokens.tolist() for tokens in encode_documents(["abc"], BYTES, None)] == [[97, 98, 99, 258]]


@pytest.mark.parametrize("size", [1, 2, 256])
def test_a_document_that_cannot_be_encoded_is_named_by_its_number(size, monkeypatch):
    """The third of them, whatever the batches; a stream that goes on behind 10 documents counts those."""
    monkeypatch.setattr(encode, "BATCH_DOCUMENTS", size)
    tokenizer = CharTokenizer("abc", unknown="error")
    found = "the character 'Q' (U+0051) at position 1 is not among the 3 characters of the tokenizer"
    for named, place in (({}, "text: document 3"), ({"source": "a.txt: training", "first": 11}, "a.txt: training document 13")):
        with pytest.raises(UserError) as caught:
            list(encode_documents(["abc", "b", "aQ", "Q"], tokenizer, None, **named))
        assert str(caught.value) == f"{place}: {found}. Set tokenizer.unknown: unk, or train on text that has it."


@pytest.mark.parametrize("which", ["train", "val"])
def test_a_text_that_cannot_be_encoded_is_named_with_its_split(write, tmp_path, which):
    path, val = write("a.txt", "ab\nQ\n"), write("b.txt", "ab\nba\nQ\n")
    data = DataConfig(dataset=str(path), val_dataset=str(val), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError) as caught:
        cached_token_file(data, which, CharTokenizer("ab", unknown="error"), SEED)
    place = f"{path}: training document 2" if which == "train" else f"{val}: validation document 3"
    found = "the character 'Q' (U+0051) at position 0 is not among the 2 characters of the tokenizer"
    assert str(caught.value) == f"{place}: {found}. Set tokenizer.unknown: unk, or train on text that has it."
    assert not list((tmp_path / "cache").glob("*.bin"))


@pytest.mark.parametrize(("documents", "characters"), [(1, 10), (3, 10**6), (256, 5), (256, 10**6)])
def test_batches_do_not_change_the_tokens(documents, characters, monkeypatch):
    texts = [f"text {i} é" * (i % 4) for i in range(20)]
    expected = [[*BYTES.encode(text), BYTES.eos_id] for text in texts]
    monkeypatch.setattr(encode, "BATCH_DOCUMENTS", documents)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", characters)
    assert [tokens.tolist() for tokens in encode_documents(texts, BYTES, None)] == expected


@pytest.mark.parametrize(("text", "read_ahead"), [("short", 256), ("x" * 400_000, 3)])
def test_encoding_reads_no_more_than_one_batch_ahead(text, read_ahead):
    """256 documents or a million characters, whichever is first: a stream without end must give its first tokens soon."""
    read = count()
    next(encode_documents((text for _ in read), BYTES, None))
    assert next(read) == read_ahead


def test_two_bytes_hold_65536_ids_and_one_more_needs_four():
    assert [token_dtype(size).name for size in (260, 65536, 65537, 70000)] == ["uint16", "uint16", "uint32", "uint32"]


class Wide(Tokenizer):
    """70000 tokens, of which the first is 69999: cast to two bytes it would be 4463."""

    kind, vocab_size, eos_id, pad_id, special_names = "wide", 70_000, 65_536, 65_536, {65_536: "end"}

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.full(len(text), 69_999, dtype=np.int64) for text in texts]

    def token_bytes(self, id: int) -> bytes:
        return b"x"

    def to_plain(self) -> dict[str, str]:
        return {"kind": "wide"}


def test_ids_beyond_65535_are_kept(tmp_path):
    write_token_file(tmp_path / "a.bin", encode_documents(["ab", "c"], Wide(), None), Wide(), source="test")
    file = TokenFile.open(tmp_path / "a.bin")
    assert (file.header.dtype, file.tokens.tolist()) == ("uint32", [69_999, 69_999, 65_536, 69_999, 65_536])


@pytest.mark.parametrize("ids", [[70_000], [-1], [0, 260]])
def test_an_id_outside_the_vocabulary_is_never_wrapped(ids):
    with pytest.raises(ValueError, match="are outside the vocabulary of 260"):
        checked_tokens(np.array(ids), 260)
    with pytest.raises(ValueError, match="are outside the vocabulary of 70000"):
        checked_tokens(np.array([-5, 70_001]), 70_000)


# --- token files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """The documents `ab`, `é` and `c`: 3 + 3 + 2 tokens."""
    path = tmp_path / "train.bin"
    write_token_file(path, encode_documents(["ab", "é", "c"], BYTES, None), BYTES, source="test")
    return path


TOKENS = [97, 98, 258, 0xC3, 0xA9, 258, 99, 258]


def test_a_token_file_reads_as_it_was_written(token_file):
    file = TokenFile.open(token_file)
    assert (len(file), file.tokens.tolist(), file.tokens.ndim) == (8, TOKENS, 1)
    header = file.header
    assert (header.count, header.dtype, header.documents, header.text_bytes, header.eos_id, header.vocab_size) == (8, "uint16", 3, 5, 258, 260)
    assert (header.tokenizer, header.source) == (BYTES.fingerprint, "test")
    file.verify()
    file.require_tokenizer(BYTES)


def test_the_format_is_a_line_a_json_header_and_raw_numbers(token_file):
    """Read here with nothing of ours: what another program would do."""
    data = token_file.read_bytes()
    assert data.startswith(MAGIC) and data[4095:4096] == b"\n" and len(data) == 4096 + 2 * 8
    assert json.loads(data[len(MAGIC) : 4096])["count"] == 8
    assert np.frombuffer(data[4096:], dtype="<u2").tolist() == TOKENS


def test_tokens_cannot_be_written_to(token_file):
    with pytest.raises(ValueError, match="read-only"):
        TokenFile.open(token_file).tokens[0] = 1


def test_the_same_text_gives_the_same_bytes(token_file, tmp_path):
    write_token_file(tmp_path / "again.bin", encode_documents(["ab", "é", "c"], BYTES, None), BYTES, source="test")
    assert (tmp_path / "again.bin").read_bytes() == token_file.read_bytes()


def test_a_worker_process_gets_the_path_not_the_tokens(tmp_path):
    write_token_file(tmp_path / "a.bin", encode_documents(["x" * 100_000], BYTES, None), BYTES, source="test")
    file = TokenFile.open(tmp_path / "a.bin").between(10, 20)
    packed = pickle.dumps(file)
    assert len(packed) < 5000
    back = pickle.loads(packed)  # noqa: S301
    assert (back.tokens.tolist(), back.fingerprint, back.mend) == (file.tokens.tolist(), file.fingerprint, file.mend)


GIVE_TEXT = "Give the text that it was made from as data.dataset."


@pytest.mark.parametrize("size", [4096, 4097, 4096 + 15, 4096 + 17, 4096 + 160])
def test_a_token_file_of_the_wrong_size_is_refused(token_file, size):
    data = token_file.read_bytes()
    token_file.write_bytes((data + bytes(size))[:size])
    with pytest.raises(UserError) as caught:
        TokenFile.open(token_file)
    expected = "expected 4112 bytes (8 tokens of uint16 behind 4096 bytes of header)"
    assert str(caught.value) == f"{token_file}: {expected}, found {size}. {GIVE_TEXT}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a token file: it begins with b''."),
        (pickle.dumps({"x": 1}), "not a token file: it begins with b'"),
        (b"PK\x03\x04" + bytes(5000), "not a token file: it begins with b'PK"),
        (MAGIC + b'{"version": 1', "header: JSON: Invalid JSON"),
        (MAGIC + b"[]" + b" " * 5000, "header: JSON: "),
        (MAGIC + b"{}" + b" " * 5000, "header: version: Field required"),
        (MAGIC + b'{"version": 2}' + b" " * 5000, "header: version: Input should be 1. "),
    ],
)
def test_what_is_no_token_file_is_refused(tmp_path, content, message):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError) as caught:
        TokenFile.open(tmp_path / "a.bin")
    assert str(caught.value).startswith(f"{tmp_path / 'a.bin'}: {message}")
    assert str(caught.value).endswith(f". {GIVE_TEXT}")


@pytest.mark.parametrize(("key", "value"), [("count", 0), ("count", "8"), ("count", 2.5), ("dtype", "float64"), ("eos_id", -1), ("tokenizer", 3)])
def test_a_header_with_a_wrong_value_is_refused_and_names_it(token_file, key, value):
    data = token_file.read_bytes()
    header = json.loads(data[len(MAGIC) : 4096]) | {key: value}
    token_file.write_bytes((MAGIC + json.dumps(header).encode()).ljust(4095) + b"\n" + data[4096:])
    with pytest.raises(UserError, match=f"train.bin: header: {key}: "):
        TokenFile.open(token_file)


def test_a_pickle_named_bin_runs_nothing(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "a.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match="not a token file"):
        TokenFile.open(tmp_path / "a.bin")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["missing.bin", "pipe.bin", "."])
def test_a_token_file_that_cannot_be_opened_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.bin")
    with pytest.raises(UserError, match="not found|not a regular file"):
        TokenFile.open(tmp_path / name)


def test_every_flipped_bit_is_found(token_file):
    """In the tokens and in each field of the header; the spaces behind the JSON mean nothing."""
    data = token_file.read_bytes()
    for place in [*range(data.index(b"}") + 1), *range(HEADER_BYTES, len(data))]:
        token_file.write_bytes(data[:place] + bytes((data[place] ^ 1,)) + data[place + 1 :])
        with pytest.raises(UserError):
            TokenFile.open(token_file).verify()
    token_file.write_bytes(data)
    TokenFile.open(token_file).verify()


def test_tokens_of_another_tokenizer_are_refused(token_file):
    other = CharTokenizer("abc", unknown="error")
    with pytest.raises(UserError) as caught:
        TokenFile.open(token_file).require_tokenizer(other)
    assert str(caught.value) == (
        f"{token_file} was encoded with tokenizer {BYTES.fingerprint}, this run uses {other.fingerprint}. Set tokenizer to that one, or: {GIVE_TEXT}"
    )


def test_progress_counts_documents(tmp_path):
    seen: list[int] = []
    write_token_file(tmp_path / "a.bin", encode_documents(["a", "b", "c"], BYTES, None), BYTES, source="test", progress=seen.append)
    assert seen == [1, 2, 3]


# --- writing goes wrong -----------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    """What stands in a folder beside locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_the_file_is_synced_before_it_gets_its_name_and_the_folder_after(tmp_path, monkeypatch):
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "sync file"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(f"{Path(a).name} -> {Path(b).name}"), replace(a, b)))
    write_token_file(tmp_path / "a.bin", encode_documents(["a"], BYTES, None), BYTES, source="test")
    assert order == ["sync file", ".a.bin.tmp -> a.bin", "sync folder"]


def broken() -> Iterator[np.ndarray]:
    yield np.array([97, 258])
    raise UserError("the source broke")


def test_a_source_that_breaks_leaves_no_file_and_keeps_the_old_one(token_file, tmp_path):
    before = token_file.read_bytes()
    for path in (token_file, tmp_path / "new.bin"):
        with pytest.raises(UserError, match="the source broke"):
            write_token_file(path, broken(), BYTES, source="test")
    assert (names(tmp_path), token_file.read_bytes()) == (["train.bin"], before)


@pytest.mark.parametrize(("call", "reason"), [("fsync", "Input/output error"), ("replace", "Permission denied")])
def test_a_failed_sync_or_rename_is_a_failed_file(tmp_path, monkeypatch, call, reason):
    def fail(*args):
        raise OSError({"fsync": 5, "replace": 13}[call], reason)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError) as caught:
        write_token_file(tmp_path / "a.bin", encode_documents(["a"], BYTES, None), BYTES, source="test")
    assert str(caught.value) == f"{tmp_path / 'a.bin'}: the token file could not be written: {reason}. Make room, or choose another data.cache_dir."
    assert names(tmp_path) == []


def test_a_cache_folder_that_cannot_be_made_is_an_error(write, lines):
    data = DataConfig(dataset=str(lines), cache_dir=str(write("file", "x")))
    with pytest.raises(UserError, match="the token file could not be written: .*choose another data.cache_dir"):
        cached_token_file(data, "train", BYTES, SEED)


def child(code: str, *arguments: object, **options) -> subprocess.Popen:
    """A Python process in the project's folder, with `data` and `BYTES` at hand."""
    head = "import sys, resource, time; from pathlib import Path; from tinylm import corpus, encode; from tinylm.config import DataConfig\n"
    head += "from tinylm.errors import UserError; from tinylm.tokenizer import ByteTokenizer; BYTES = ByteTokenizer(); args = sys.argv[1:]\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_nothing(tmp_path, write):
    """RLIMIT_FSIZE stops any file of the child at 64 KiB, as a full disk would."""
    source = write("source.txt", "some words and more of them\n" * 10_000)
    code = """resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try: encode.cached_token_file(DataConfig(dataset=args[0], cache_dir=args[1]), "train", BYTES, 1)
except UserError as error: print(error)"""
    out, err = child(code, source, tmp_path / "cache").communicate(timeout=60)
    assert (err, "the token file could not be written: File too large. Make room, or choose another data.cache_dir." in out) == ("", True)
    assert names(tmp_path / "cache") == []


def test_after_a_kill_the_file_is_made_again_and_equals_an_undisturbed_one(tmp_path, write):
    """The child is killed while half a file is written; its name never appears, and its remains are overwritten."""
    source = write("source.txt", "".join(f"line {i}\n" for i in range(5000)))
    code = """def slow(n):
    if n == 3000: print("half", flush=True); time.sleep(60)
encode.cached_token_file(DataConfig(dataset=args[0], cache_dir=args[1]), "train", BYTES, 1, progress=slow)"""
    process = child(code, source, tmp_path / "cache")
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    remains = names(tmp_path / "cache")
    assert len(remains) == 1 and remains[0].endswith(".bin.tmp")
    files = [cached_token_file(DataConfig(dataset=str(source), cache_dir=str(tmp_path / name)), "train", BYTES, 1) for name in ("cache", "clean")]
    assert files[0].path.read_bytes() == files[1].path.read_bytes()
    assert names(tmp_path / "cache") == [files[0].path.name]


@pytest.mark.slow
def test_two_processes_make_one_file(tmp_path, write):
    """Both start with an empty cache; one encodes, the other waits and takes the same file."""
    source = write("source.txt", "".join(f"line {i}\n" for i in range(50_000)))
    code = """made = []
file = encode.cached_token_file(DataConfig(dataset=args[0], cache_dir=args[1]), "train", BYTES, 1, progress=made.append)
print(file.fingerprint, bool(made))"""
    outputs = [process.communicate(timeout=60) for process in [child(code, source, tmp_path / "cache") for _ in range(2)]]
    assert [err for _, err in outputs] == ["", ""]
    (first, made_first), (second, made_second) = (out.split() for out, _ in outputs)
    assert first == second
    assert {made_first, made_second} == {"True", "False"}


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts other units elsewhere")
@pytest.mark.parametrize(
    ("name", "content", "n"), [("long.txt", b"x" * 50_000_000, 1), ("empty.txt", b"\n" * 1_000_000 + b"end", 1)], ids=["50 MB line", "1e6 empty lines"]
)
def test_odd_files_are_read_in_bounded_memory(write, name, content, n):
    """One document of 50 MB is held a few times (bytes, text, a copy being made): less than 300 MB in all."""
    path = write(name, content)
    code = """before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
n = sum(1 for _ in corpus.find_split(DataConfig(dataset=args[0]), "train", 1).source.documents())
print(n, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"""
    out, err = child(code, path).communicate(timeout=60)
    documents, megabytes = map(int, out.split())
    assert (err, documents) == ("", n)
    assert megabytes < (300 if name == "long.txt" else 5)


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(lines: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(dataset=str(lines), cache_dir=str(tmp_path / "cache"))


def expected_tokens(documents: Iterator[str]) -> list[int]:
    return [id for document in documents for id in (*BYTES.encode(document), BYTES.eos_id)]


@pytest.mark.parametrize("which", ["train", "val"])
def test_the_cached_file_has_the_tokens_of_its_split(data, which):
    documents = {"train": train_documents, "val": val_documents}[which](data, SEED)
    assert cached_token_file(data, which, BYTES, SEED).tokens.tolist() == expected_tokens(documents)


def test_a_file_that_is_there_is_used(data, monkeypatch):
    first = cached_token_file(data, "train", BYTES, SEED)
    monkeypatch.setattr(encode, "encode_documents", None)
    again = cached_token_file(data, "train", BYTES, SEED)
    assert (again.path, again.fingerprint) == (first.path, first.fingerprint)


@pytest.mark.parametrize(
    "change",
    [{"val_fraction": 0.2}, {"train_docs": 5}, {"max_doc_len": 3}, {"text_field": "body"}, {"document_separator": "\n1"}, {"val_dataset": "other.txt"}],
)
def test_every_setting_that_changes_the_tokens_changes_the_name(data, change):
    assert cached_token_file(data, "train", BYTES, SEED).path != cached_token_file(data.model_copy(update=change), "train", BYTES, SEED).path


def test_seed_text_and_tokenizer_change_the_name_and_the_place_of_the_text_does_not(data, lines, tmp_path):
    path = cached_token_file(data, "train", BYTES, SEED).path
    assert cached_token_file(data, "train", BYTES, SEED + 1).path != path
    assert cached_token_file(data, "train", CharTokenizer("document 0123456789", unknown="error"), SEED).path != path
    moved = tmp_path / "moved.txt"
    lines.rename(moved)
    data = data.model_copy(update={"dataset": str(moved)})
    assert cached_token_file(data, "train", BYTES, SEED).path == path
    moved.write_bytes(moved.read_bytes().replace(b"799", b"798"))
    assert cached_token_file(data, "train", BYTES, SEED).path != path


@pytest.mark.parametrize(
    ("place", "found"), [(5000, "its content is not what was written (checksum)"), (0, "not a token file"), (30, "header: "), (None, "expected ")]
)
def test_damage_in_the_cache_is_found_and_mended_by_deleting_the_file(data, place, found):
    """A byte changed in the tokens, the first line or the header, and a file that is too long."""
    whole = cached_token_file(data, "train", BYTES, SEED)
    path, tokens = whole.path, whole.tokens.tolist()
    with open(path, "ab" if place is None else "r+b") as file:
        if place is not None:
            file.seek(place)
        file.write(b"\x01")
    with pytest.raises(UserError) as caught:
        cached_token_file(data, "train", BYTES, SEED)
    assert str(caught.value).startswith(f"{path}: {found}")
    assert str(caught.value).endswith(". Delete it: it is made again from the text.")
    path.unlink()
    assert cached_token_file(data, "train", BYTES, SEED).tokens.tolist() == tokens


def test_a_cache_whose_name_is_too_long_is_refused_on_one_line(data, tmp_path):
    data = data.model_copy(update={"cache_dir": str(tmp_path / ("x" * 300))})
    with pytest.raises(UserError, match="the token file could not be written: File name too long. Make room, or choose another data.cache_dir."):
        cached_token_file(data, "train", BYTES, SEED)


def test_a_source_fingerprint_is_its_content(write, tmp_path):
    def fingerprint(name: str, which: str = "train", **settings) -> str:
        return source_fingerprint(DataConfig(dataset=str(tmp_path / name), **settings), which)

    write("a.txt", "one\n"), write("b.txt", "one\n"), write("c.txt", "One\n"), write("d.jsonl", "one\n")
    assert fingerprint("a.txt") == fingerprint("b.txt") == fingerprint("c.txt", "val", val_dataset=str(tmp_path / "b.txt"))
    assert len({fingerprint(name) for name in ("a.txt", "c.txt", "d.jsonl", "?.txt")}) == 4
    hub = [DataConfig(dataset="o/n"), DataConfig(dataset="o/m"), DataConfig(dataset="o/n", dataset_config="en"), DataConfig(dataset="o/n", split="test")]
    assert len({source_fingerprint(data, "train") for data in hub}) == 4


# --- a token file as the dataset --------------------------------------------------------------------------------------


@pytest.fixture
def given_file(tmp_path: Path) -> Path:
    """100 documents of 1 to 9 letters."""
    path = tmp_path / "given.bin"
    write_token_file(path, encode_documents([str(i) * (1 + i % 4) for i in range(100)], BYTES, None), BYTES, source="test")
    return path


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_the_end_of_a_token_file_validates_from_the_start_of_a_document_on(given_file, fraction):
    data = DataConfig(dataset=str(given_file), val_fraction=fraction)
    train, val = (cached_token_file(data, which, BYTES, SEED) for which in ("train", "val"))
    whole = TokenFile.open(given_file)
    assert train.tokens.tolist() + val.tokens.tolist() == whole.tokens.tolist()
    assert train.tokens[-1] == BYTES.eos_id
    assert abs(len(val) - fraction * len(whole)) <= 9
    assert len({train.fingerprint, val.fingerprint, whole.fingerprint}) == 3


@pytest.mark.parametrize("block", [1, 2, 7])
def test_the_border_does_not_depend_on_how_much_is_looked_at_together(given_file, block, monkeypatch):
    expected = [len(cached_token_file(DataConfig(dataset=str(given_file), val_fraction=f), "val", BYTES, SEED)) for f in (0.001, 0.3, 0.999)]
    monkeypatch.setattr(encode, "BLOCK", block)
    assert [len(cached_token_file(DataConfig(dataset=str(given_file), val_fraction=f), "val", BYTES, SEED)) for f in (0.001, 0.3, 0.999)] == expected


def test_a_second_token_file_validates_whole(given_file, token_file):
    data = DataConfig(dataset=str(given_file), val_dataset=str(token_file))
    assert cached_token_file(data, "val", BYTES, SEED).tokens.tolist() == TOKENS
    assert len(cached_token_file(data, "train", BYTES, SEED)) == len(TokenFile.open(given_file))


def test_text_may_validate_a_token_file_and_the_other_way_round(given_file, lines, tmp_path):
    settings = {"cache_dir": str(tmp_path / "cache")}
    data = DataConfig(dataset=str(given_file), val_dataset=str(lines), **settings)
    assert cached_token_file(data, "val", BYTES, SEED).header.documents == 1000
    data = DataConfig(dataset=str(lines), val_dataset=str(given_file), max_doc_len=4, **settings)
    assert cached_token_file(data, "val", BYTES, SEED).header.documents == 100
    assert cached_token_file(data, "train", BYTES, SEED).header.documents == 1000
    assert shared_documents(data, SEED) == 0


def test_one_document_cannot_be_divided(tmp_path):
    write_token_file(tmp_path / "a.bin", encode_documents(["only one"], BYTES, None), BYTES, source="test")
    with pytest.raises(UserError, match="one document only, so none can be held out. Set data.val_dataset to a second token file"):
        cached_token_file(DataConfig(dataset=str(tmp_path / "a.bin")), "train", BYTES, SEED)


TEXT_SETTINGS = {
    "streaming": True, "dataset_config": "en", "split": "test", "val_split": "test", "train_docs": 3, "max_doc_len": 3,
    "text_field": "body", "document_separator": "\n\n", "val_docs": 3,
}  # fmt: skip


@pytest.mark.parametrize("setting", TEXT_SETTINGS)
def test_settings_that_a_token_file_cannot_follow_are_refused(given_file, setting):
    """Whichever split is asked for first, and before a stream is read: training would only say it in its first step."""
    data = DataConfig(dataset=str(given_file), **{setting: TEXT_SETTINGS[setting]})
    expected = f"data.{setting}: does not apply to the token file data.dataset. Take it out, or: {GIVE_TEXT}"
    train, val = (partial(cached_token_file, data, which, BYTES, SEED) for which in ("train", "val"))
    for ask in (train, val, partial(train_documents, data, SEED)):
        with pytest.raises(UserError) as caught:
            ask()
        assert str(caught.value) == expected


def test_settings_of_text_are_refused_for_a_token_file_only_where_no_text_follows_them(given_file, write, tmp_path):
    """The text that validates a token file has its own key and separator, but is not streamed; a val_dataset is named as such."""
    text = write("val.jsonl", '{"body": "one"}\n')
    data = DataConfig(dataset=str(given_file), val_dataset=str(text), text_field="body", val_docs=1, cache_dir=str(tmp_path / "cache"))
    assert cached_token_file(data, "val", BYTES, SEED).tokens.tolist() == [*b"one", BYTES.eos_id]
    with pytest.raises(UserError, match="data.streaming: does not apply to the token file data.dataset"):
        cached_token_file(data.model_copy(update={"streaming": True}), "val", BYTES, SEED)
    with pytest.raises(UserError) as caught:
        cached_token_file(DataConfig(dataset=str(text), text_field="body", val_dataset=str(given_file), val_docs=1), "train", BYTES, SEED)
    mend = "Take it out, or: Give the text that it was made from as data.val_dataset."
    assert str(caught.value) == f"data.val_docs: does not apply to the token file data.val_dataset. {mend}"


def test_a_given_token_file_is_checked_before_use(given_file):
    with pytest.raises(UserError, match=f"given.bin was encoded with tokenizer {BYTES.fingerprint}, this run uses"):
        cached_token_file(DataConfig(dataset=str(given_file)), "train", CharTokenizer("ab", unknown="error"), SEED)
    with open(given_file, "r+b") as file:
        file.seek(4200)
        file.write(b"\xff")
    for key in ("dataset", "val_dataset"):
        with pytest.raises(UserError) as caught:
            cached_token_file(DataConfig(**{key: str(given_file)}), "val", BYTES, SEED)
        mend = f"Give the text that it was made from as data.{key}."
        assert str(caught.value) == f"{given_file}: its content is not what was written (checksum). {mend}"


def test_a_token_file_has_no_documents_to_read_again(given_file):
    for documents in (train_documents, val_documents):
        with pytest.raises(UserError, match="data.dataset: .*given.bin is a token file, whose documents cannot be read again"):
            documents(DataConfig(dataset=str(given_file)), SEED)
    assert source_fingerprint(DataConfig(dataset=str(given_file)), "train") == TokenFile.open(given_file).header.sha256
