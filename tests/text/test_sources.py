"""Documents from files and from the hub, the split, token files: what is read, what is refused, what
survives a crash.
"""

import gzip
import io
import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.utils import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import overlap_of, val_documents
from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig
from tinylm.text import documents, hub_dataset, parquet_files
from tinylm.text.data_source import find_split, train_documents
from tinylm.text.sources import TOKEN_FILES, is_held_out
from tinylm.tokenizer.byte_char import ByteTokenizer
from tinylm.tokens.token_file import TokenFile

ROOT = Path(__file__).parents[2]
BYTES = ByteTokenizer()
SEED = 1


def read(path: Path | str, **settings) -> list[str]:
    """Every document of a source, training and validation alike."""
    return list(
        find_split(DataConfig(dataset=str(path), **settings), "train", SEED).text_source.documents()
    )


def refusal(path: Path | str, **settings) -> str:
    """The message with which a source is refused."""
    with pytest.raises(UserError) as caught:
        read(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- text files -------------------------------------------------------------------------------------------------------


def test_each_line_of_a_text_file_is_a_document_and_blank_lines_are_none(write):
    assert read(write("a.txt", "one\n\n  \t\n two \nthree")) == ["one", " two ", "three"]


def test_a_byte_order_mark_and_carriage_returns_are_no_text(write):
    """Only the pair \\r\\n ends a line; a \\r inside stays."""
    assert read(write("a.txt", b"\xef\xbb\xbfone\r\ntw\ro\r\n\r\nthree\r")) == [
        "one",
        "tw\ro",
        "three",
    ]


def test_only_a_newline_ends_a_line(write):
    """str.splitlines would also cut at U+2028, U+0085, form feed, ...; NUL would end a C string."""
    line = "a\u2028b\x85c\x0cd\x00e\x1cf\ufeffg"
    assert read(write("a.txt", line + "\n")) == [line]


@pytest.mark.slow
@given(
    lines=st.lists(
        st.text(alphabet=st.characters(exclude_characters="\n\r\ufeff", exclude_categories=["Cs"]))
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_lines_come_back(tmp_path, lines):
    (tmp_path / "a.txt").write_bytes("\n".join(lines).encode())
    assert read(tmp_path / "a.txt") == [line for line in lines if line and not line.isspace()]


def test_a_separator_divides_documents_of_many_lines(write):
    path = write("a.txt", "one\nmore\n<|endoftext|>\n\n<|endoftext|>two\n")
    assert read(path, document_separator="<|endoftext|>") == ["one\nmore", "two"]


def test_a_separator_of_line_ends_works_in_a_file_from_windows(write):
    path = write("a.txt", b"one\r\nmore\r\n\r\ntwo\r\n")
    assert (
        read(path, document_separator="\n\n")
        == read(path, document_separator="\r\n\r\n")
        == ["one\nmore", "two"]
    )


@pytest.mark.slow
@given(
    texts=st.lists(st.text(alphabet="ab\n-", max_size=6), max_size=8),
    separator=st.text(alphabet="-\n", min_size=1, max_size=3),
    size=st.integers(1, 9),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_separator_is_found_wherever_reading_pauses(tmp_path, texts, separator, size):
    """Oracle: the whole text split at once. The file counts as ended by a newline, as each of its lines is."""
    text = separator.join(texts)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    expected = [
        part.strip("\n")
        for part in (text if text.endswith("\n") or not text else text + "\n").split(separator)
        if part.strip()
    ]
    with (
        mock.patch.object(documents, "SEARCH_CHARACTERS", size),
        mock.patch.object(documents, "BLOCK_BYTES", size),
    ):
        assert read(tmp_path / "a.txt", document_separator=separator) == expected


@pytest.mark.parametrize(
    ("content", "line", "byte", "offset"),
    [
        (b"ok\nb\xffd\n", 2, "ff", 4),
        (b"\xef\xbb\xbfa\x80", 1, "80", 4),
        (b"\xed\xa0\x80", 1, "ed", 0),
        (b"a\nb\n\xe2\x82", 3, "e2", 4),
    ],
)
def test_bytes_that_are_not_utf8_are_named_with_their_offset(write, content, line, byte, offset):
    """Offsets count from the start of the file, its byte-order mark included; a surrogate in UTF-8 is no UTF-8."""
    path = write("a.txt", content)
    expected = (
        f"{path}:{line}: not UTF-8 text: byte 0x{byte} at offset {offset}. Save the file as UTF-8."
    )
    assert refusal(path) == expected
    for size in (1, 2, 3, 100):
        with mock.patch.object(documents, "BLOCK_BYTES", size):
            assert refusal(path, document_separator="--") == expected


def test_text_between_separators_has_neither_a_byte_order_mark_nor_carriage_returns(write):
    path = write("a.txt", b"\xef\xbb\xbfone\r\nmore\r\r\n--two\xef\xbb\xbf\r--three\r")
    for size in (1, 4, 5, 100):
        with mock.patch.object(documents, "BLOCK_BYTES", size):
            assert read(path, document_separator="--") == ["one\nmore\r", "two\ufeff\r", "three"]


def test_a_line_without_end_is_refused_before_it_fills_the_memory(write, monkeypatch):
    monkeypatch.setattr(documents, "LINE_BYTES_LIMIT", 100)
    path = write("a.txt", "ok\n" + "x" * 1000)
    assert (
        refusal(path)
        == f"{path}:2: a line of at least 100 bytes. Is it text? Cut it into documents."
    )


# --- jsonl ------------------------------------------------------------------------------------------------------------


def test_jsonl_gives_the_text_field_of_each_row(write):
    rows = [
        {"text": "one", "n": 1},
        {"text": "two\nlines"},
        {"text": " "},
        {"text": ""},
        {"text": "é\x00"},
    ]
    path = write("a.jsonl", "\r\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read(path) == ["one", "two\nlines", "é\x00"]
    body = write("b.jsonl", '{"body": "x", "text": 3}')
    assert read(body, text_field="body") == ["x"]


FIX = "Correct the row, or set data.text_field to the key that holds the text."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": 5}', f"text: expected a string, found a number. {FIX}"),
        ('{"text": 5.5}', f"text: expected a string, found a number. {FIX}"),
        ('{"text": null}', f"text: expected a string, found null. {FIX}"),
        ('{"text": true}', f"text: expected a string, found a boolean. {FIX}"),
        ('{"text": ["a"]}', f"text: expected a string, found a list. {FIX}"),
        ('{"text": {}}', f"text: expected a string, found an object. {FIX}"),
        ('{"body": "a", "n": 1}', f"text: missing; the row has body, n. {FIX}"),
        ("{}", f"text: missing; the row has no keys. {FIX}"),
        (
            '{"instruction": "a", "output": "b"}',
            f"text: missing; the row has instruction, output. {FIX}"
            " Rows of questions and answers are for finetune.py.",
        ),
        ('"text"', f'expected an object such as {{"text": "..."}}, found a string. {FIX}'),
        (
            '{"text": "a',
            "not JSON: Unterminated string starting at: line 1 column 10 (char 9). Each line is one "
            "object; correct the line.",
        ),
        (
            '{"text": "a"} {"text": "b"}',
            "not JSON: Extra data: line 1 column 15 (char 14). Each line is one object; correct the line.",
        ),
        (
            '{"text": "a\\ud800"}',
            "text: the text has the lone surrogate \\ud800 at position 1, which is half a "
            "character. Remove it, or write the whole character.",
        ),
        ("[" * 100_000, "not JSON: "),
        ('{"text": ' + "9" * 5000 + "}", "not JSON: "),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_key(write, row, message):
    path = write("data.jsonl", f'{{"text": "good"}}\n{row}\n{{"text": "good"}}\n')
    assert refusal(path).startswith(f"{path}:2: {message}")


def test_the_rows_before_a_bad_one_are_read(write):
    documents = find_split(
        DataConfig(dataset=str(write("a.jsonl", '{"text": "good"}\n3\n'))), "train", SEED
    ).text_source.documents()
    assert next(documents) == "good"
    with pytest.raises(UserError, match="a.jsonl:2: "):
        next(documents)


# --- gz and parquet ---------------------------------------------------------------------------------------------------


def test_compressed_files_read_as_their_content(write):
    assert read(write("a.txt.gz", gzip.compress(b"one\ntwo\n"))) == ["one", "two"]
    assert read(write("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n'))) == ["one"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-20],
        lambda data: data[:30] + b"\xff\xff\xff" + data[33:],
    ],
    ids=["cut", "changed"],
)
def test_damaged_gzip_data_name_their_file(write, damage):
    path = write(
        "a.txt.gz",
        damage(gzip.compress(b"".join(b"line %d of the text\n" % (i * i) for i in range(99)))),
    )
    assert refusal(path).startswith(f"{path}: damaged or truncated gzip data (")


def parquet(columns: dict[str, object], row_group_size: int = 2) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, row_group_size=row_group_size)
    return file.getvalue()


def test_parquet_gives_its_column_in_order(write):
    texts = ["one", "two\nlines", " ", "é\x00", "five"]
    path = write("a.parquet", parquet({"n": range(5), "text": texts}))
    assert read(path) == ["one", "two\nlines", "é\x00", "five"]
    assert read(
        write("b.parquet", parquet({"body": pa.array(texts, pa.large_string())})), text_field="body"
    ) == read(path)


def test_parquet_is_read_in_batches(write, monkeypatch):
    monkeypatch.setattr(parquet_files, "BATCH_ROWS", 3)
    assert read(write("a.parquet", parquet({"text": [str(i) for i in range(10)]}))) == [
        str(i) for i in range(10)
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"body": ["a"], "n": [1]},
            "text: no such column; there are body, n. Set data.text_field to the one that holds the text.",
        ),
        ({"text": ["a", None]}, f"row 2: text: expected a string, found null. {FIX}"),
        ({"text": [7]}, f"row 1: text: expected a string, found a number. {FIX}"),
        ({"text": [["a"]]}, f"row 1: text: expected a string, found a list. {FIX}"),
    ],
)
def test_a_bad_parquet_row_is_named(write, columns, message):
    path = write("a.parquet", parquet(columns))
    assert refusal(path) == f"{path}: {message}"


@pytest.mark.parametrize("keep", [0, 100, -1, -10])
def test_a_cut_off_parquet_file_is_named(write, keep):
    path = write("a.parquet", parquet({"text": [f"line {i}" for i in range(50)]})[:keep])
    assert refusal(path).startswith(f"{path}: damaged or truncated, or not a parquet file: ")


def test_damage_inside_a_parquet_file_is_named(write):
    data = parquet({"text": [f"line {i}" for i in range(50)]}, row_group_size=50)
    path = write("a.parquet", data[:10] + b"\xff" * 60 + data[70:])
    assert refusal(path).startswith(f"{path}: damaged or truncated, or not a parquet file: ")


# --- folders, globs and what is not a file ----------------------------------------------------------------------------


def test_a_folder_is_read_to_its_bottom_in_sorted_order(write, tmp_path):
    for name, content in (
        ("c/b.txt", "3"),
        ("c/a/x.jsonl", '{"text": "2"}'),
        ("a.txt", "1"),
        ("README.md", "# 4"),
        ("picture.png", "no"),
        (".git/x.txt", "no"),
        ("c/.x.txt", "no"),
    ):
        write(f"corpus/{name}", content)
    assert read(tmp_path / "corpus") == ["# 4", "1", "2", "3"]
    assert read(tmp_path / "corpus/**/*.txt") == ["1", "3"]
    assert read(tmp_path / "corpus/*/*.txt") == ["3"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(write):
    write("a1.txt", "glob")
    assert read(write("a[1].txt", "file")) == ["file"]


KINDS = ".txt, .jsonl, .parquet, .json, .csv, .tsv, .md, .html, .htm; also .gz, .bz2, .xz, .zst"


def special_files(folder: Path) -> dict[str, tuple[str, str]]:
    os.mkfifo(folder / "pipe.txt")
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    (folder / "dangling.txt").symlink_to(folder / "gone")
    (folder / "zero.txt").symlink_to("/dev/zero")
    (folder / "empty").mkdir()
    (folder / "notes.rst").write_text("x", encoding="utf-8")
    (folder / "raw" / "sms").mkdir(parents=True)
    (folder / "raw" / "sms" / "SMSSpamCollection").write_text("ham\thello\n", encoding="utf-8")
    return {
        "raw": (
            "data.dataset: ",
            f"no file of a kind with documents ({KINDS}) in this folder. Give the path of one. "
            "Rows of questions and answers are for finetune.py.",
        ),
        "missing.txt": (
            "data.dataset: ",
            "not found. Give a file, a folder, a glob, or a Hugging Face name written owner/name.",
        ),
        "no/such/folder": (
            "data.dataset: ",
            "not found. Give a file, a folder, a glob, or a Hugging Face name written owner/name.",
        ),
        "*.jsonl": (
            "data.dataset: ",
            f"no file of a kind with documents ({KINDS}) matches. Give the path of one.",
        ),
        "empty": (
            "data.dataset: ",
            f"no file of a kind with documents ({KINDS}) in this folder. Give the path of one.",
        ),
        "notes.rst": (
            "data.dataset: ",
            f"not a kind of file with documents ({KINDS}). Convert it, or name it by its kind.",
        ),
        "pipe.txt": ("", "not a regular file. Give the path of a file on disk."),
        "zero.txt": ("", "not a regular file. Give the path of a file on disk."),
        "loop.txt": (
            "",
            "Too many levels of symbolic links. Give the path of a file that can be read.",
        ),
        "dangling.txt": ("", "not found. Give the path of a file that can be read."),
        "x" * 300 + ".txt": (
            "data.dataset: ",
            "not found. Give a file, a folder, a glob, or a Hugging Face name written owner/name.",
        ),
    }


def test_what_cannot_be_read_to_its_end_is_refused_at_once(tmp_path):
    start = time.monotonic()
    for name, (before, message) in special_files(tmp_path).items():
        assert refusal(tmp_path / name) == f"{before}{tmp_path / name}: {message}"
    assert refusal("/dev/zero") == "/dev/zero: not a regular file. Give the path of a file on disk."
    assert time.monotonic() - start < 30


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    assert (
        refusal(tmp_path)
        == f"{tmp_path / 'pipe.txt'}: not a regular file. Give the path of a file on disk."
    )


def test_a_folder_that_cannot_be_listed_is_not_passed_over(write, tmp_path, monkeypatch):
    """os.walk alone would skip a folder without permission, and train on the rest."""
    write("corpus/a.txt", "one")
    write("corpus/closed/b.txt", "two")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert (
        refusal(tmp_path / "corpus")
        == f"{tmp_path / 'corpus/closed'}: Permission denied. Give a folder that can be read."
    )


def test_a_folder_that_links_to_itself_ends(tmp_path, write):
    write("corpus/a.txt", "one")
    (tmp_path / "corpus/again").symlink_to(tmp_path / "corpus")
    assert read(tmp_path / "corpus") == ["one"]


def test_a_name_is_escaped_in_a_message():
    assert refusal("a\x1b]31m\n.txt").startswith(r"data.dataset: a\x1b]31m\n.txt: not found in /")


# --- datasets of the hub ----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(write, monkeypatch) -> list[tuple]:
    """The hub, played by a local file that is read through `datasets`; gives the calls."""
    import datasets

    path = write(
        "served/train.jsonl",
        "".join(
            json.dumps({"id": i, "text": f"document {i}" if i != 3 else " "}) + "\n"
            for i in range(50)
        ),
    )
    calls: list[tuple] = []
    load = datasets.load_dataset

    def serve(name: str, config: str | None, *, split: str, streaming: bool):
        calls.append((name, config, split, streaming))
        return load(
            "json",
            data_files={split: str(path)},
            split=split,
            streaming=streaming,
            cache_dir=str(path.parent / "cache"),
        )

    monkeypatch.setattr("datasets.load_dataset", serve)
    monkeypatch.setattr(hub_dataset, "require_hub", lambda where, fix: None)
    return calls


HUB_TEXTS = [f"document {i}" for i in range(50) if i != 3]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_is_read_in_its_order(hub, streaming):
    assert (
        read("owner/name", dataset_config="en", split="validation", streaming=streaming)
        == HUB_TEXTS
    )
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
    ("same", "fix"),
    [
        ({"val_split": "train"}, "Set data.val_split to another split, or remove it."),
        (
            {"val_dataset": "owner/name"},
            "Give another dataset, or set data.val_split instead.",
        ),
    ],
)
def test_the_split_that_is_trained_on_does_not_validate(hub, same, fix):
    """The error is headed by the setting that the user gave."""
    with pytest.raises(UserError) as caught:
        val_documents(DataConfig(dataset="owner/name", **same), SEED)
    assert (
        str(caught.value)
        == f"data.{next(iter(same))}: validation would be the training documents themselves. {fix}"
    )


def test_holding_out_of_a_stream_needs_a_number_of_documents(hub):
    with pytest.raises(
        UserError,
        match="data.val_docs: holding documents out of a streamed dataset would read all of it. Set "
        "data.val_docs, for example 1000.",
    ):
        val_documents(DataConfig(dataset="owner/name", streaming=True), SEED)
    assert (
        len(list(val_documents(DataConfig(dataset="owner/name", streaming=True, val_docs=2), SEED)))
        == 2
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_row_of_the_hub_is_named(hub, streaming):
    assert (
        refusal("owner/name", text_field="id", streaming=streaming)
        == f"owner/name (train): row 1: id: expected a string, found a number. {FIX}"
    )
    assert "owner/name (train): " in refusal("owner/name", text_field="body", streaming=streaming)


def test_without_a_network_a_hub_name_fails_at_once_and_says_how_to_go_on(monkeypatch):
    def unreachable(address, timeout):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    message = refusal("owner/name")
    assert message.startswith(
        "data.dataset: owner/name: not found on this machine, and huggingface.co cannot be reached "
        "(Network is unreachable)."
    )
    assert "Give a local file or folder as data.dataset." in message


def test_what_the_library_says_of_a_hub_dataset_is_passed_on(monkeypatch):
    def fail(*args, **kwargs):
        raise FileNotFoundError("Dataset 'owner/name' doesn't exist on the Hub")

    monkeypatch.setattr("datasets.load_dataset", fail)
    monkeypatch.setattr(hub_dataset, "require_hub", lambda where, fix: None)
    assert refusal("owner/name").startswith(
        "data.dataset: owner/name: Dataset 'owner/name' doesn't exist on the Hub. Check data.dataset_config"
    )


NETWORK_ERRORS = [
    ConnectionResetError(104, "Connection reset by peer"),
    httpx.ReadTimeout("timed out"),
    httpx.RemoteProtocolError("server disconnected"),
]


@pytest.mark.parametrize("error", NETWORK_ERRORS, ids=lambda error: type(error).__name__)
def test_a_network_that_fails_inside_a_stream_is_one_line(monkeypatch, error):
    """The HTTP library's errors are no OSErrors, and the hub's library lets some of them through."""

    class Broken:
        column_names = None

        def __iter__(self):
            yield {"text": "one"}
            raise error

    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: Broken())
    monkeypatch.setattr(hub_dataset, "require_hub", lambda where, fix: None)
    documents = find_split(
        DataConfig(dataset="owner/name", streaming=True), "train", SEED
    ).text_source.documents()
    assert next(documents) == "one"
    with pytest.raises(UserError) as caught:
        next(documents)
    assert (
        str(caught.value)
        == f"owner/name (train): reading stopped: {error}. Try again: a run resumes where it stopped."
    )


def test_a_network_that_fails_before_the_first_row_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise httpx.ConnectError("no route")

    monkeypatch.setattr("datasets.load_dataset", fail)
    monkeypatch.setattr(hub_dataset, "require_hub", lambda where, fix: None)
    assert refusal("owner/name").startswith(
        "data.dataset: owner/name: no route. Check data.dataset_config and data.split"
    )


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/name", "owner/" + "x" * 300 + ".txt"])
def test_a_name_that_is_too_long_is_refused_on_one_line(name, monkeypatch):
    """The operating system refuses to look for it, and Path.is_dir would pass that on."""

    def offline(where: tuple[str, str], fix: str) -> None:
        raise UserError(where, "offline", fix)

    monkeypatch.setattr(hub_dataset, "require_hub", offline)
    assert refusal(name).startswith(
        f"data.dataset: {name}: {'offline' if name.endswith('name') else f'not found in {os.getcwd()}'}. Give a "
    )


@pytest.mark.parametrize(
    "name",
    [
        "data/tiny_corpu",
        "data/x.txt",
        "./owner/name",
        "wikitext",
        "owner/name.bin",
        "a/b/c",
        "/a/b",
        "owner/name.jsonl.gz",
    ],
)
def test_what_looks_like_a_path_is_not_asked_of_the_hub(name, tmp_path, monkeypatch):
    """`data` is a folder here, so data/tiny_corpu is a path that was typed wrongly."""
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_dataset, "require_hub", None)
    if name.endswith(TOKEN_FILES):
        with pytest.raises(UserError, match="owner/name.bin: not found"):
            TokenFile.open(name)
    else:
        assert refusal(name).startswith(f"data.dataset: {name}: not found")


def test_what_is_here_is_never_asked_of_the_hub(write, tmp_path, monkeypatch):
    write("owner/name/a.txt", "one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_dataset, "require_hub", None)
    assert read("owner/name") == ["one"]


@pytest.mark.parametrize(
    "settings", [{"val_split": "test"}, {"split": "test"}, {"dataset_config": "en"}]
)
def test_files_here_have_no_splits(write, settings):
    assert (
        "is on this machine, where files have no splits. Remove split, val_split and dataset_config."
        in refusal(write("a.txt", "x"), **settings)
    )


def test_a_missing_library_is_named_with_its_pip_line(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal(write("a.parquet", b"")).endswith(
        "a.parquet: reading it needs pyarrow. Install it: pip install datasets."
    )


# --- the split --------------------------------------------------------------------------------------------------------


def test_no_document_is_in_both_splits_and_none_is_lost(lines):
    """Duplicates are 800 lines apart and must fall on the same side."""
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
    assert (len(list(train_documents(data, SEED))), list(val_documents(data, SEED))) == (
        1000,
        ["alpha", "beta"],
    )


def test_documents_in_both_sources_are_counted(write):
    """Of the validation documents b (twice), c and x, the training source has b and c."""
    data = DataConfig(
        dataset=str(write("a.txt", "a\nb\nb\nc\n")),
        val_dataset=str(
            write("b.jsonl", '{"text": "b"}\n{"text": "b"}\n{"text": "c"}\n{"text": "x"}\n')
        ),
    )
    assert overlap_of(data, SEED).found == 2
    repeated = str(write("repeated.txt", "".join(f"{n % 20}\n" for n in range(100))))
    assert overlap_of(DataConfig(dataset=repeated, val_fraction=0.5), SEED).found == 0


@pytest.mark.parametrize("content", ["", "\n\n \n\t\n", "\n" * 1000])
def test_a_file_without_documents_is_an_error(write, content):
    path = write("a.txt", content)
    for read in (train_documents, val_documents):
        with pytest.raises(UserError) as caught:
            list(read(DataConfig(dataset=str(path)), SEED))
        assert (
            str(caught.value)
            == f"{path}: no documents, only blank lines or nothing at all. Give a file with text."
        )


def test_a_split_without_documents_is_an_error_with_counts(write):
    text = next(f"text {i}" for i in range(99) if not is_held_out(f"text {i}", 0.5, SEED))
    data = DataConfig(dataset=str(write("a.txt", f"{text}\n{text}\n")), val_fraction=0.5)
    assert list(train_documents(data, SEED)) == [text, text]
    assert list(train_documents(data, SEED, skip=9)) == []
    with pytest.raises(UserError) as caught:
        list(val_documents(data, SEED))
    counts = "validation got 0 of 2 documents (data.val_fraction 0.5)"
    assert (
        str(caught.value)
        == f"{data.dataset}: {counts}. Give more documents, another data.val_fraction, or data.val_dataset."
    )


def test_a_source_that_is_not_there_is_found_out_before_the_first_document():
    with pytest.raises(UserError, match="not found"):
        train_documents(DataConfig(dataset="missing.txt"), SEED)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts other units elsewhere")
@pytest.mark.parametrize(
    ("name", "content", "n"),
    [("long.txt", b"x" * 50_000_000, 1), ("empty.txt", b"\n" * 1_000_000 + b"end", 1)],
    ids=["50 MB line", "1e6 empty lines"],
)
def test_odd_files_are_read_in_bounded_memory(write, name, content, n, child):
    """One document of 50 MB is held a few times (bytes, text, a copy being made): less than 300 MB in all."""
    path = write(name, content)
    code = """before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
n = sum(1 for _ in data_source.find_split(DataConfig(dataset=args[0]), "train", 1).text_source.documents())
print(n, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"""
    out, err = child(code, path).communicate(timeout=60)
    documents, megabytes = map(int, out.split())
    assert (err, documents) == ("", n)
    assert megabytes < (300 if name == "long.txt" else 5)


def test_a_list_over_several_lines_is_named(tmp_path: Path) -> None:
    """K6: json.dump(rows, indent=1) under the name .jsonl."""
    (tmp_path / "a.jsonl").write_text('[\n {"text": "a"}\n]')
    found = "a.jsonl:1: not one object per line, but a list over several lines. Each line is one"
    with pytest.raises(UserError, match=found):
        list(documents.jsonl_rows(tmp_path / "a.jsonl"))
