"""Encoding: chunks, processes, interruptions, the cache, a token file as the dataset, the command."""

import gzip
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import overlap_of, val_documents, write_token_file
from tinylm.__main__ import main
from tinylm.cli import encode as encode_command
from tinylm.common.errors import UserError
from tinylm.common.files import locked
from tinylm.config.schema import DataConfig
from tinylm.text import documents, hub_dataset
from tinylm.text.data_source import find_split, train_documents
from tinylm.text.named_sources import sources_named
from tinylm.text.sources import Split
from tinylm.tokenizer.byte_char import ByteTokenizer, CharTokenizer
from tinylm.tokens import encode, run_files
from tinylm.tokens.encode import (
    EncodeSpec,
    encode_documents,
    encode_file,
)
from tinylm.tokens.id_arrays import open_tokens
from tinylm.tokens.run_files import cached_token_file
from tinylm.tokens.token_file import TokenFile

ROOT = Path(__file__).parents[2]
BYTES = ByteTokenizer()
SEED = 1


def names(folder: Path) -> list[str]:
    """The files of a folder, without locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def spec_of(*paths: Path, **options) -> EncodeSpec:
    """All documents of some files."""
    split = Split(
        "train",
        sources_named([str(path) for path in paths], "text", options.get("separator")),
        None,
        options.pop("limit", None),
    )
    return EncodeSpec(split, BYTES, **options)


def documents_in(path: Path) -> list[str]:
    """What a token file of the byte tokenizer holds, by its index."""
    file = TokenFile.open(path)
    file.verify()
    ends = [0, *file.document_ends.tolist()]
    return [BYTES.decode(file.tokens[a:b]) for a, b in zip(ends, ends[1:], strict=False)]


# --- ids --------------------------------------------------------------------------------------------------------------


def test_each_document_is_cut_and_closed_by_eos():
    """`abc` is 97 98 99; EOS (258) comes after the cut, so a cut document still ends."""
    encoded = [tokens.tolist() for tokens in encode_documents(["abc", "é", "z"], BYTES, 2)]
    assert encoded == [[97, 98, 258], [0xC3, 0xA9, 258], [122, 258]]
    assert [tokens.tolist() for tokens in encode_documents(["abc"], BYTES, None)] == [
        [97, 98, 99, 258]
    ]


@pytest.mark.parametrize("size", [1, 2, 256])
def test_a_document_that_cannot_be_encoded_is_named_by_its_number(size, monkeypatch):
    """The third of them, whatever the batches; a stream that continues after 10 documents counts those."""
    monkeypatch.setattr(encode, "BATCH_DOCUMENTS", size)
    tokenizer = CharTokenizer("abc", unknown="error")
    found = "position 1: the character 'Q' (U+0051) is not one of the 3 characters of the tokenizer"
    for named, location in (
        ({}, "text: document 3"),
        ({"name": "a.txt: training", "first": 11}, "a.txt: training document 13"),
    ):
        with pytest.raises(UserError) as caught:
            list(encode_documents(["abc", "b", "aQ", "Q"], tokenizer, None, **named))
        assert (
            str(caught.value)
            == f"{location}: {found}. Set tokenizer.unknown: unk, or train on text that contains it."
        )


@pytest.mark.parametrize("which", ["train", "val"])
def test_a_text_that_cannot_be_encoded_is_named_with_its_split(write, tmp_path, which):
    path, val = write("a.txt", "ab\nQ\n"), write("b.txt", "ab\nba\nQ\n")
    data = DataConfig(dataset=str(path), val_dataset=str(val), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError) as caught:
        cached_token_file(data, which, CharTokenizer("ab", unknown="error"), SEED)
    place = f"{path}: training document 2" if which == "train" else f"{val}: validation document 3"
    found = "position 0: the character 'Q' (U+0051) is not one of the 2 characters of the tokenizer"
    assert (
        str(caught.value)
        == f"{place}: {found}. Set tokenizer.unknown: unk, or train on text that contains it."
    )
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
    """256 documents or a million characters, whichever is first: a stream without end must give its first
    tokens soon.
    """
    read = count()
    next(encode_documents((text for _ in read), BYTES, None))
    assert next(read) == read_ahead


def test_a_cache_folder_that_cannot_be_made_is_an_error(write, lines):
    data = DataConfig(dataset=str(lines), cache_dir=str(write("file", "x")))
    with pytest.raises(UserError, match="cannot be written: File exists. Change data.cache_dir"):
        cached_token_file(data, "train", BYTES, SEED)


@pytest.mark.slow
def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_nothing(tmp_path, write, child):
    """RLIMIT_FSIZE stops any file of the child at 64 KiB, as a full disk would."""
    source = write("source.txt", "some words and more of them\n" * 10_000)
    code = """resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try: run_files.cached_token_file(DataConfig(dataset=args[0], cache_dir=args[1]), "train", BYTES, 1)
except UserError as error: print(error)"""
    out, err = child(code, source, tmp_path / "cache").communicate(timeout=60)
    assert (
        err,
        "cannot be written: File too large. Raise the limit with `ulimit -f unlimited`, or change data.cache_dir."
        in out,
    ) == ("", True)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_after_a_kill_the_cached_file_is_gone_on_with_and_equals_an_undisturbed_one(
    tmp_path, write, child, monkeypatch
):
    """The child is killed after some chunks of 1 KB are saved; the file has its final name only when it is
    complete.
    """
    source = write("source.txt", "".join(f"line {i}\n" for i in range(5000)))
    code = """documents.SPAN_BYTES, token_file_writer.TokenFileWriter.SAVE_SECONDS = 1000, -1
def slow(what, done, total):
    if done > 30_000: print("half", flush=True); time.sleep(60)
run_files.cached_token_file(DataConfig(dataset=args[0], cache_dir=args[1]), "train", BYTES, 1, on_progress=slow)"""
    process = child(code, source, tmp_path / "cache")
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    remains = names(tmp_path / "cache")
    assert len(remains) == 1 and remains[0].endswith(".bin.part")
    monkeypatch.setattr(documents, "SPAN_BYTES", 1000)
    seen: list[int] = []
    data = DataConfig(dataset=str(source), cache_dir=str(tmp_path / "cache"))
    first = cached_token_file(
        data, "train", BYTES, 1, on_progress=lambda what, done, total: seen.append(done)
    )
    assert min(seen) > 30_000
    clean = cached_token_file(
        DataConfig(dataset=str(source), cache_dir=str(tmp_path / "clean")), "train", BYTES, 1
    )
    assert first.path.read_bytes() == clean.path.read_bytes()
    assert names(tmp_path / "cache") == [first.path.name]


@pytest.mark.slow
def test_two_processes_make_one_file(tmp_path, write, child):
    """Both start with an empty cache; one encodes, the other waits and takes the same file."""
    source = write("source.txt", "".join(f"line {i}\n" for i in range(50_000)))
    code = """made = []
file = run_files.cached_token_file(DataConfig(dataset=args[0], cache_dir=args[1]), "train", BYTES, 1, on_progress=lambda *at: made.append(at))
print(file.fingerprint, bool(made))"""
    outputs = [
        process.communicate(timeout=60)
        for process in [child(code, source, tmp_path / "cache") for _ in range(2)]
    ]
    assert [err for _, err in outputs] == ["", ""]
    (first, made_first), (second, made_second) = (out.split() for out, _ in outputs)
    assert first == second
    assert {made_first, made_second} == {"True", "False"}


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
    monkeypatch.setattr(run_files, "encode_file", None)
    again = cached_token_file(data, "train", BYTES, SEED)
    assert (again.path, again.fingerprint) == (first.path, first.fingerprint)


@pytest.mark.parametrize(
    "change",
    [
        {"val_fraction": 0.2},
        {"train_docs": 5},
        {"max_doc_len": 3},
        {"text_field": "body"},
        {"document_separator": "\n1"},
        {"val_dataset": "other.txt"},
    ],
)
def test_every_setting_that_changes_the_tokens_changes_the_name(data, change):
    assert (
        cached_token_file(data, "train", BYTES, SEED).path
        != cached_token_file(data.model_copy(update=change), "train", BYTES, SEED).path
    )


def test_seed_text_and_tokenizer_change_the_name_and_the_place_of_the_text_does_not(
    data, lines, tmp_path
):
    path = cached_token_file(data, "train", BYTES, SEED).path
    assert cached_token_file(data, "train", BYTES, SEED + 1).path != path
    assert (
        cached_token_file(
            data, "train", CharTokenizer("document 0123456789", unknown="error"), SEED
        ).path
        != path
    )
    moved = tmp_path / "moved.txt"
    lines.rename(moved)
    data = data.model_copy(update={"dataset": str(moved)})
    assert cached_token_file(data, "train", BYTES, SEED).path == path
    moved.write_bytes(moved.read_bytes().replace(b"799", b"798"))
    assert cached_token_file(data, "train", BYTES, SEED).path != path


@pytest.mark.parametrize(
    ("place", "found"),
    [
        (5000, "damaged: its content is not what was written (checksum)"),
        (0, "not a token file"),
        (30, "header: "),
        (None, "expected "),
    ],
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
    with pytest.raises(
        UserError,
        match="cannot be written: File name too long. Shorten data.cache_dir.",
    ):
        cached_token_file(data, "train", BYTES, SEED)


def test_a_source_fingerprint_is_its_content(write, tmp_path):
    def fingerprint(name: str, which: str = "train", **settings) -> str:
        data = DataConfig(dataset=str(tmp_path / name), **settings)
        return find_split(data, which, SEED).text_source.fingerprint

    (
        write("a.txt", "one\n"),
        write("b.txt", "one\n"),
        write("c.txt", "One\n"),
        write("d.jsonl", "one\n"),
    )
    assert (
        fingerprint("a.txt")
        == fingerprint("b.txt")
        == fingerprint("c.txt", "val", val_dataset=str(tmp_path / "b.txt"))
    )
    assert len({fingerprint(name) for name in ("a.txt", "c.txt", "d.jsonl", "?.txt")}) == 4
    hub = [
        DataConfig(dataset="o/n"),
        DataConfig(dataset="o/m"),
        DataConfig(dataset="o/n", dataset_config="en"),
        DataConfig(dataset="o/n", split="test"),
    ]
    assert len({find_split(data, "train", SEED).text_source.fingerprint for data in hub}) == 4


# --- a token file as the dataset --------------------------------------------------------------------------------------


@pytest.fixture
def given_file(tmp_path: Path) -> Path:
    """100 documents of 1 to 9 letters."""
    path = tmp_path / "given.bin"
    write_token_file(path, [str(i) * (1 + i % 4) for i in range(100)], BYTES)
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


def test_a_second_token_file_validates_whole(given_file, tmp_path):
    write_token_file(tmp_path / "val.bin", ["ab", "c"], BYTES)
    data = DataConfig(dataset=str(given_file), val_dataset=str(tmp_path / "val.bin"))
    assert cached_token_file(data, "val", BYTES, SEED).tokens.tolist() == [97, 98, 258, 99, 258]
    assert len(cached_token_file(data, "train", BYTES, SEED)) == len(TokenFile.open(given_file))


def test_text_may_validate_a_token_file_and_the_other_way_round(given_file, lines, tmp_path):
    settings = {"cache_dir": str(tmp_path / "cache")}
    data = DataConfig(dataset=str(given_file), val_dataset=str(lines), **settings)
    assert cached_token_file(data, "val", BYTES, SEED).header.documents == 1000
    data = DataConfig(dataset=str(lines), val_dataset=str(given_file), max_doc_len=4, **settings)
    assert cached_token_file(data, "val", BYTES, SEED).header.documents == 100
    assert cached_token_file(data, "train", BYTES, SEED).header.documents == 1000
    assert overlap_of(data, SEED).found == 0


TEXT_SETTINGS = {
    "streaming": True, "dataset_config": "en", "split": "test", "val_split": "test", "train_docs": 3, "max_doc_len": 3,
    "text_field": "body", "document_separator": "\n\n", "val_docs": 3,
}  # fmt: skip


@pytest.mark.parametrize("setting", TEXT_SETTINGS)
def test_settings_that_a_token_file_cannot_follow_are_refused(given_file, setting):
    """Whichever split is asked for first, and before a stream is read: training would only say it in its
    first step.
    """
    data = DataConfig(dataset=str(given_file), **{setting: TEXT_SETTINGS[setting]})
    give_text = "Give the text that it was made from as data.dataset."
    expected = (
        f"data.{setting}: does not apply to the token file data.dataset. Remove it, or: {give_text}"
    )
    train, val = (
        partial(cached_token_file, data, which, BYTES, SEED) for which in ("train", "val")
    )
    for ask in (train, val, partial(train_documents, data, SEED)):
        with pytest.raises(UserError) as caught:
            ask()
        assert str(caught.value) == expected


def test_settings_of_text_are_refused_for_a_token_file_only_where_no_text_follows_them(
    given_file, write, tmp_path
):
    """The text that validates a token file has its own key and separator, but is not streamed; a val_dataset
    is named as such.
    """
    text = write("val.jsonl", '{"body": "one"}\n')
    data = DataConfig(
        dataset=str(given_file),
        val_dataset=str(text),
        text_field="body",
        val_docs=1,
        cache_dir=str(tmp_path / "cache"),
    )
    assert cached_token_file(data, "val", BYTES, SEED).tokens.tolist() == [*b"one", BYTES.eos_id]
    with pytest.raises(
        UserError, match="data.streaming: does not apply to the token file data.dataset"
    ):
        cached_token_file(data.model_copy(update={"streaming": True}), "val", BYTES, SEED)
    with pytest.raises(UserError) as caught:
        cached_token_file(
            DataConfig(
                dataset=str(text), text_field="body", val_dataset=str(given_file), val_docs=1
            ),
            "train",
            BYTES,
            SEED,
        )
    fix = "Remove it, or: Give the text that it was made from as data.val_dataset."
    assert (
        str(caught.value)
        == f"data.val_docs: does not apply to the token file data.val_dataset. {fix}"
    )


def test_a_given_token_file_is_checked_before_use(given_file):
    with pytest.raises(
        UserError,
        match=rf"given.bin: encoded with tokenizer {BYTES.fingerprint} \(vocabulary 260\), this run uses",
    ):
        cached_token_file(
            DataConfig(dataset=str(given_file)), "train", CharTokenizer("ab", unknown="error"), SEED
        )
    with open(given_file, "r+b") as file:
        file.seek(4200)
        file.write(b"\xff")
    for key in ("dataset", "val_dataset"):
        with pytest.raises(UserError) as caught:
            cached_token_file(DataConfig(**{key: str(given_file)}), "val", BYTES, SEED)
        fix = f"Encode again: python -m tinylm encode --data TEXT --tokenizer TOKENIZER --out {given_file}."
        assert (
            str(caught.value)
            == f"{given_file}: damaged: its content is not what was written (checksum). {fix}"
        )


@pytest.mark.parametrize("name", ["given.bin", "given.npy"])
def test_a_token_file_is_read_once_for_both_splits_and_again_when_it_changes(
    given_file, tmp_path, monkeypatch, name
):
    np.save(tmp_path / "given.npy", TokenFile.open(given_file).tokens)
    opened: list[Path] = []
    verify = TokenFile.verify
    monkeypatch.setattr(TokenFile, "verify", lambda file: (opened.append(file.path), verify(file)))
    data = DataConfig(dataset=str(tmp_path / name))
    for which in ("train", "val", "train"):
        cached_token_file(data, which, BYTES, SEED)
    assert opened == [tmp_path / name]
    os.utime(tmp_path / name, ns=(1, 1))
    cached_token_file(data, "val", BYTES, SEED)
    assert opened == [tmp_path / name] * 2


def test_a_token_file_has_no_documents_to_read_again(given_file):
    for read in (train_documents, val_documents):
        with pytest.raises(
            UserError,
            match="data.dataset: .*given.bin is a token file, whose documents cannot be read again",
        ):
            read(DataConfig(dataset=str(given_file)), SEED)


@pytest.mark.parametrize("name", ["given.npy", "bare.bin", "bare.npy"])
def test_an_array_of_ids_is_divided_and_trained_on_like_a_token_file(given_file, tmp_path, name):
    tokens = TokenFile.open(given_file).tokens
    np.save(tmp_path / "given.npy", tokens)
    for bare in ("bare.bin", "bare.npy"):
        np.array(tokens).tofile(tmp_path / bare)
    for whole, array in (
        ({"dataset": str(given_file)}, "dataset"),
        ({"dataset": str(given_file), "val_dataset": str(given_file)}, "val_dataset"),
    ):
        ours = DataConfig(**whole)
        theirs = DataConfig(
            **whole | {array: str(tmp_path / name)},
            token_dtype="uint16" if name.startswith("bare") else None,
        )
        for which in ("train", "val"):
            expected, found = (
                cached_token_file(data, which, BYTES, SEED) for data in (ours, theirs)
            )
            assert found.tokens.tolist() == expected.tokens.tolist()
            assert found.document_ends.tolist() == expected.document_ends.tolist()


def test_a_dtype_without_a_bare_file_is_refused(data, tmp_path):
    """A text has no ids, and the header of a .npy says their type."""
    np.save(tmp_path / "a.npy", np.array([1, 258], dtype=np.uint16))
    no_bare = "only valid for a bare .bin or .npy; neither data.dataset nor data.val_dataset is one"
    other = f"is uint32, but the header of {tmp_path / 'a.npy'} says uint16"
    for name, problem, fix in (
        (data.dataset, no_bare, "Remove it"),
        (str(tmp_path / "a.npy"), other, "Remove data.token_dtype"),
    ):
        settings = data.model_copy(update={"token_dtype": "uint32", "dataset": name})
        with pytest.raises(UserError) as caught:
            cached_token_file(settings, "val", BYTES, SEED)
        assert str(caught.value) == f"data.token_dtype: {problem}. {fix}."


def test_a_token_file_whose_name_is_too_long_is_refused_on_one_line():
    with pytest.raises(
        UserError, match="x.bin: File name too long. Give the path of a file that can be read."
    ):
        cached_token_file(DataConfig(dataset="x" * 300 + ".bin"), "train", BYTES, SEED)


# --- chunks and processes ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_portions(monkeypatch) -> None:
    """Files are cut after each 40 bytes, and text after each 40 characters."""
    monkeypatch.setattr(documents, "SPAN_BYTES", 40)
    monkeypatch.setattr(documents, "CHUNK_CHARACTERS", 40)


@pytest.mark.slow
@given(
    texts=st.lists(st.text(alphabet="ab\n\r-é\u2028\ufeff", max_size=12), max_size=12),
    separator=st.sampled_from([None, "-", "--", "-é-", "\n\n", "<|end|>"]),
    size=st.integers(1, 30),
)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None
)
def test_no_portion_cuts_a_document(tmp_path, texts, separator, size):
    """Oracle: the file read from its start to its end.

    Separators that overlap themselves, or have line ends, are among them.
    """
    (tmp_path / "a.txt").write_bytes((separator or "\n").join(texts).encode())
    (tmp_path / "a.jsonl").write_bytes(
        "".join(
            json.dumps({"text": text}, ensure_ascii=False) + "\r\n" * (len(text) % 3) + "\n"
            for text in texts
        ).encode()
    )
    before, documents.SPAN_BYTES = documents.SPAN_BYTES, size
    try:
        for name in ("a.txt", "a.jsonl"):
            source = sources_named([str(tmp_path / name)], "text", separator)
            assert [text for job in source.chunks() for text in job.texts()] == list(
                source.documents()
            )
    finally:
        documents.SPAN_BYTES = before


@pytest.mark.parametrize(("separator", "parts"), [(None, 2), ("<|end|>", 2), ("--", 1), ("a\n", 1)])
def test_a_plain_file_is_cut_where_an_end_of_a_document_shows_by_itself(
    write, small_portions, separator, parts
):
    path = write("a.txt", "x" * 45 + "<|end|>\n" + "y" * 30)
    assert len(list(sources_named([str(path)], "text", separator).chunks())) == parts


def test_an_error_in_a_portion_names_the_line_of_the_file(write, small_portions):
    """Line 31 of the file is the first of some chunk; each line before it has 11 bytes."""
    path = write("a.jsonl", '{"text":1}\n'.replace("1", '"a"') * 30 + '{"text": 5}\n')
    with pytest.raises(UserError, match=r"a.jsonl:31: text: expected a string, found a number"):
        encode_file(path.with_suffix(".bin"), spec_of(path))
    path = write("a.txt", b"0123456789\n" * 30 + b"ab\xff\n")
    with pytest.raises(UserError, match=r"a.txt:31: not UTF-8 text: byte 0xff at offset 332"):
        encode_file(path.with_suffix(".bin"), spec_of(path))


def corpus_of_all_kinds(folder: Path, texts: list[str]) -> list[Path]:
    """The texts four times, in as many kinds of files."""
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "a.jsonl").write_text(rows, encoding="utf-8")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), folder / "c.parquet")
    (folder / "d.txt").write_text(
        "".join(text.replace("\n", " ") + "\n" for text in texts), encoding="utf-8"
    )
    return [folder / name for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt")]


@pytest.mark.slow
@given(
    texts=st.lists(
        st.text(
            alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\r\ufeff"),
            max_size=9,
        ),
        min_size=1,
        max_size=9,
    )
)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None
)
def test_any_documents_come_back_from_the_file_in_their_order(tmp_path, small_portions, texts):
    paths = corpus_of_all_kinds(tmp_path, texts)
    expected = [text for text in texts if text and not text.isspace()]
    if expected:
        encode_file(tmp_path / "out.bin", spec_of(*paths))
        found = documents_in(tmp_path / "out.bin")
        assert found[: 3 * len(expected)] == 3 * expected
        assert found == list(sources_named([str(path) for path in paths], "text", None).documents())
        (tmp_path / "out.bin").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"limit": 117, "max_doc_len": 4}], ids=str)
def test_any_number_of_processes_makes_the_same_bytes(
    tmp_path, small_portions, options, monkeypatch
):
    """130 documents in about 60 chunks, shared by two workers and this process; one process writes the same bytes."""
    paths = corpus_of_all_kinds(
        tmp_path, [f"document {i} " + "x" * (i % 13) + "\né" for i in range(30)]
    )
    encode_file(tmp_path / "1.bin", spec_of(*paths, **dict(options)))
    monkeypatch.setattr(encode, "WORTH_PROCESSES", 1)
    encode_file(tmp_path / "3.bin", spec_of(*paths, **dict(options)), processes=3)
    assert (tmp_path / "1.bin").read_bytes() == (tmp_path / "3.bin").read_bytes()
    assert TokenFile.open(tmp_path / "1.bin").header.documents == options.get("limit", 120)


@pytest.mark.slow
def test_a_split_is_the_same_with_helpers(data, tmp_path, monkeypatch, small_portions):
    one = cached_token_file(data, "val", BYTES, SEED).path.read_bytes()
    monkeypatch.setattr(encode, "WORTH_PROCESSES", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert (
        cached_token_file(
            data.model_copy(update={"cache_dir": str(tmp_path / "two")}), "val", BYTES, SEED
        ).path.read_bytes()
        == one
    )


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "name"), [(1, "a.jsonl"), (1, "a.jsonl.gz"), (2, "a.jsonl")])
def test_an_error_behind_the_limit_is_not_met(write, tmp_path, processes, name, monkeypatch):
    """Although the chunk with the last document was read to its end."""
    monkeypatch.setattr(encode, "WORTH_PROCESSES", 1)
    rows = b'{"text": "one"}\n{"text": "two"}\n3\n'
    path = write(name, gzip.compress(rows) if name.endswith(".gz") else rows)
    encode_file(tmp_path / "a.bin", spec_of(path, limit=2), processes=processes)
    assert documents_in(tmp_path / "a.bin") == ["one", "two"]
    with pytest.raises(UserError, match=f"{name}:3: expected an object"):
        encode_file(tmp_path / "b.bin", spec_of(path, limit=3), processes=processes)


def test_a_document_that_cannot_be_encoded_is_counted_from_the_first_of_the_source(
    write, small_portions
):
    path = write("a.txt", "ab\n" * 50 + "aQ\n")
    spec = EncodeSpec(
        Split("train", sources_named([str(path)], "text", None), None, None),
        CharTokenizer("ab", unknown="error"),
        label="a.txt:",
    )
    with pytest.raises(
        UserError,
        match=r"a.txt: document 51: position 1: the character 'Q' \(U\+0051\) is not one of",
    ):
        encode_file(path.with_suffix(".bin"), spec)


def test_nothing_to_encode_is_an_error_and_no_file(write, tmp_path):
    path = write("corpus/a.txt", "\n \n")
    with pytest.raises(UserError) as caught:
        encode_file(tmp_path / "a.bin", spec_of(path))
    assert (
        str(caught.value)
        == f"{path}: no documents, only blank lines or nothing at all. Give a file with text."
    )
    assert names(tmp_path) == ["corpus"]


def test_progress_counts_bytes_of_the_text(write, tmp_path, small_portions):
    path = write("a.txt", "123456789\n" * 10)
    seen: list[tuple[str, int, int]] = []
    encode_file(tmp_path / "a.bin", spec_of(path), on_progress=lambda *at: seen.append(at))
    assert seen == [("encoding, bytes", 50, 100), ("encoding, bytes", 100, 100)]


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts other units elsewhere")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "n", "limit"),
    [
        (b"x" * 50_000_000, 1, 400),
        (b"\n" * 1_000_000 + b"end", 1, 10),
        (b"some words\n" * 2_000_000, 2_000_000, 50),
    ],
    ids=["50 MB line", "1e6 empty lines", "22 MB of short lines"],
)
def test_odd_files_are_encoded_in_bounded_memory(write, tmp_path, child, content, n, limit):
    """One document of 50 MB is held as bytes, text (twice), and tokens of 1 and 2 bytes; short ones in
    chunks of 1 MB, 90,000 documents.
    """
    path = write("a.txt", content)
    code = """before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
split = sources.Split("train", named_sources.sources_named([args[0]], "text", None), None, None)
encode.encode_file(Path(args[1]), encode.EncodeSpec(split, BYTES))
print(run_files.TokenFile.open(args[1]).header.documents, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"""
    out, err = child(code, path, tmp_path / "a.bin").communicate(timeout=120)
    assert err == ""
    documents, megabytes = map(int, out.split())
    assert documents == n
    assert megabytes < limit


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs `python -m tinylm encode`; exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["encode", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_the_command_tells_what_it_made(run, write, tmp_path):
    """Two documents of 5 and 7 bytes: 12 bytes in 12 tokens beside two EOS."""
    path, out = (
        write("a.txt", "hello\nworld é\n".replace("world é", "wörld!")),
        tmp_path / "data" / "a.bin",
    )
    code, stdout, stderr = run(
        "--data", path, "--tokenizer", "byte", "--out", out, "--processes", 1
    )
    assert (code, stdout) == (0, f"{out}\n")
    printed = stderr.splitlines()
    assert (
        printed[0] == f"encoding with 1 processes, tokenizer {BYTES.fingerprint} (vocabulary 260)"
    )
    assert re.fullmatch(r"encoded 0.0 MB of text in \d+\.\d s, 0\.\d MB/s", printed[1])
    assert printed[2:] == [
        "14 tokens (uint16) of 2 documents, 1.000 bytes per token",
        "first ten ids: 104 101 108 108 111 258 119 195 182 114",
        "last ten ids:  111 258 119 195 182 114 108 100 33 258",
        f"next: python train.py --config config_smoke.yaml data.dataset={out} tokenizer.kind=byte "
        f"tokenizer.vocab_size=null "
        f"training.checkpoint_dir=checkpoints/{out.stem}",
    ]
    assert documents_in(out) == ["hello", "wörld!"]


def test_the_same_command_again_finds_its_file_complete(run, write, tmp_path):
    command = (
        "--data",
        write("a.txt", "one\ntwo\n"),
        "--tokenizer",
        "byte",
        "--out",
        tmp_path / "a.bin",
    )
    assert run(*command)[0] == 0
    made = os.stat(tmp_path / "a.bin").st_mtime_ns
    for more in ((), ("--resume",)):
        code, stdout, stderr = run(*command, *more)
        assert (code, stdout, stderr.splitlines()[0]) == (
            0,
            f"{tmp_path / 'a.bin'}\n",
            f"already complete: {tmp_path / 'a.bin'}",
        )
    assert os.stat(tmp_path / "a.bin").st_mtime_ns == made
    for more in (("--docs", 1), ("--max-doc-len", 2), ("--separator", "o")):
        code, stdout, stderr = run(*command, *more)
        found = "already exists, and was made from other text, or with another tokenizer or other settings"
        assert (code, stdout, stderr) == (
            2,
            "",
            f"error: {tmp_path / 'a.bin'}: {found}. Delete it, or choose another --out.\n",
        )


def test_a_plain_array_beside_the_token_file(run, write, tmp_path):
    command = (
        "--data",
        write("a.txt", "one\ntwo\n"),
        "--tokenizer",
        "byte",
        "--out",
        tmp_path / "a.bin",
        "--format",
        "npy",
    )
    code, stdout, _ = run(*command)
    assert (code, stdout) == (0, f"{tmp_path / 'a.npy'}\n{tmp_path / 'a.bin'}\n")
    assert (
        np.load(tmp_path / "a.npy").tolist() == TokenFile.open(tmp_path / "a.bin").tokens.tolist()
    )
    code, stdout, stderr = run(*command)
    complete = [f"already complete: {tmp_path / name}" for name in ("a.bin", "a.npy")]
    assert (code, stdout, stderr.splitlines()[:2]) == (
        0,
        f"{tmp_path / 'a.npy'}\n{tmp_path / 'a.bin'}\n",
        complete,
    )
    # the name of the array means the same
    code, _, stderr = run(*command[:5], tmp_path / "a.npy")
    assert (code, stderr.splitlines()[:2]) == (0, complete)


def other_ids(array: Path) -> None:
    np.save(array, np.load(array) + np.uint16(1))


def fewer_ids(array: Path) -> None:
    np.save(array, np.load(array)[:-1])


def no_array(array: Path) -> None:
    array.write_bytes(b"mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            other_ids,
            "a.npy: already exists, with other ids than {bin}. Delete it, or choose another --out.",
        ),
        (
            fewer_ids,
            "a.npy: already exists, with other ids than {bin}. Delete it, or choose another --out.",
        ),
        (
            no_array,
            "a.npy: not a NumPy file of token ids: EOF: reading magic string, expected 8 bytes got 4. Delete it.",
        ),
        (
            lambda array: array.with_suffix(".bin").unlink(),
            "a.npy: already exists, without {bin}. Delete it, or choose another --out.",
        ),
    ],
    ids=["other ids", "fewer ids", "no array", "alone"],
)
def test_an_array_that_is_not_that_of_the_token_file_is_kept_and_named(
    run, write, tmp_path, change, message
):
    command = (
        "--data",
        write("a.txt", "one\ntwo\n"),
        "--tokenizer",
        "byte",
        "--out",
        tmp_path / "a.bin",
        "--format",
        "npy",
    )
    assert run(*command)[0] == 0
    change(tmp_path / "a.npy")
    before = (tmp_path / "a.npy").read_bytes()
    code, _, stderr = run(*command)
    assert (code, stderr.splitlines()[-1]) == (
        2,
        f"error: {tmp_path}/{message.format(bin=tmp_path / 'a.bin')}",
    )
    assert (tmp_path / "a.npy").read_bytes() == before


SPELLED = (
    "documents contain <|eos|> in their text, where it is only characters and ends nothing. If "
    "it separates documents of a .txt file, set --separator to '<|eos|>'"
)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_documents_that_spell_the_end_of_text_are_counted_and_said(
    run, write, tmp_path, monkeypatch, processes
):
    """Documents 0, 10, ...

    190 of 200, in chunks of 50 bytes; 0 and 10 of the first eleven in one chunk. For an existing file it is
    reported again.
    """
    monkeypatch.setattr(documents, "SPAN_BYTES", 50)
    monkeypatch.setattr(encode, "WORTH_PROCESSES", 1)
    path = write(
        "a.txt", "".join(f"text {i}{'<|eos|>' if i % 10 == 0 else ''}\n" for i in range(200))
    )
    command = ("--data", path, "--tokenizer", "byte", "--processes", processes)
    for _ in range(2):
        assert (
            f"warning: {path}: 20 of 200 {SPELLED}"
            in run(*command, "--out", tmp_path / "a.bin")[2].splitlines()
        )
    monkeypatch.setattr(documents, "SPAN_BYTES", 2**20)
    assert (
        f"warning: {path}: 2 of 11 {SPELLED}"
        in run(*command, "--docs", 11, "--out", tmp_path / "b.bin")[2].splitlines()
    )
    assert "warning" not in run(*command, "--separator", "<|eos|>", "--out", tmp_path / "c.bin")[2]


def test_the_end_marks_of_other_tokenizers_are_counted_and_said(run, write, tmp_path, monkeypatch):
    """At the border of a line, as corpora are published: 20 of 40 lines are a mark, 10 end with another.

    HTML has </s> inside of its lines, which is no mark.
    """
    monkeypatch.setattr(documents, "SPAN_BYTES", 50)
    path = write("a.txt", "a <s>b</s> c\n<|endoftext|>\nlast.</s>\n<|endoftext|>\n" * 10)
    command = ("--data", path, "--tokenizer", "byte")
    lines = run(*command, "--out", tmp_path / "a.bin")[2].splitlines()
    for mark, n_marked in (("<|endoftext|>", 20), ("</s>", 10)):
        assert (
            f"warning: {path}: {n_marked} of 40 documents contain {mark} at the border of a line. It "
            "is not the end-of-text token of this tokenizer, so it is only characters. If it "
            f"separates documents of a .txt file, set --separator to '{mark}'"
        ) in lines
    assert TokenFile.open(tmp_path / "a.bin").header.end_marks == {"<|endoftext|>": 20, "</s>": 10}
    plain = ("--data", write("b.txt", "a <s>b</s> c\n"), "--tokenizer", "byte")
    assert "warning" not in run(*plain, "--out", tmp_path / "b.bin")[2]


def test_a_count_of_spelled_ends_survives_an_interruption(write, tmp_path, small_portions):
    """Of ten chunks of five lines, three are encoded before the interruption; each of them has one such document."""
    path = write(
        "a.txt", "".join("<|eos|>..\n" if i % 5 == 0 else "123456789\n" for i in range(50))
    )

    def stop(what: str, done: int, total: int) -> None:
        if done > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_file(tmp_path / "a.bin", spec_of(path), on_progress=stop)
    encode_file(tmp_path / "a.bin", spec_of(path))
    assert TokenFile.open(tmp_path / "a.bin").header.spelled_eos == 10
    encode_file(tmp_path / "b.bin", spec_of(path))
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


NEVER = "warning: {}: --separator '{}' does not occur in it, so each .txt file is one document"


@pytest.mark.parametrize(
    ("name", "content", "separator", "found"),
    [
        ("a.txt", "one\ntwo\n", "<|x|>", False),
        ("a.txt", "one\ntwo\n", "\n\n", False),
        ("a.txt", "one\n\ntwo\n", "\n\n", True),
        ("a.txt", "one<|x|>", "<|x|>", True),
        ("a.txt", "one\n" * 30 + "<|x|>", "<|x|>", True),
        ("a.txt.gz", "one<|x|>two", "<|x|>", True),
        ("a.txt.gz", "one two", "<|x|>", False),
        ("a.jsonl", '{"text": "one<|x|>"}', "<|x|>", False),
    ],
)
def test_a_separator_that_never_occurs_is_said(
    run, write, tmp_path, monkeypatch, name, content, separator, found
):
    """A separator at the end of a file, or of a chunk, counts as found; a row of a .jsonl is not divided."""
    monkeypatch.setattr(documents, "SPAN_BYTES", 50)
    path = write(name, gzip.compress(content.encode()) if name.endswith(".gz") else content)
    stderr = run(
        "--data", path, "--tokenizer", "byte", "--out", tmp_path / "a.bin", "--separator", separator
    )[2]
    warnings = [line for line in stderr.splitlines() if line.startswith("warning")]
    assert warnings == ([] if found else [NEVER.format(path, separator.replace("\n", "\\n"))])


def test_a_second_command_says_that_it_waits(run, write, tmp_path, monkeypatch):
    """A thread holds the lock until the command has reported that it waits."""
    out, held, reported = tmp_path / "a.bin", threading.Event(), threading.Event()

    def hold() -> None:
        with locked(out, "--out"):
            held.set()
            reported.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(10)
    info = encode_command.logger.info

    def info_and_release(message: str, *values: object) -> None:
        info(message, *values)
        if message.startswith("waiting"):
            reported.set()

    monkeypatch.setattr(encode_command.logger, "info", info_and_release)
    code, _, stderr = run("--data", write("a.txt", "one\n"), "--tokenizer", "byte", "--out", out)
    holder.join()
    assert (code, stderr.splitlines()[0]) == (0, f"waiting: another process writes {out}")


def test_errors_of_the_text_name_flags(run, write, tmp_path):
    """The setting of the same meaning is data.text_field.

    Nothing was done yet, so that the next command need not say --resume.
    """
    command = ("--tokenizer", "byte", "--out", tmp_path / "out.bin")
    path = write("a.jsonl", '{"body": "one"}\n')
    found = "text: missing; the row has body. Correct the row, or set --text-field to the key that holds the text."
    assert run("--data", path, *command)[2].splitlines()[-1] == f"error: {path}:1: {found}"
    pq.write_table(pa.table({"body": ["one"]}), tmp_path / "a.parquet")
    found = "text: no such column; there are body. Set --text-field to the one that holds the text."
    assert (
        run("--data", tmp_path / "a.parquet", *command)[2].splitlines()[-1]
        == f"error: {tmp_path / 'a.parquet'}: {found}"
    )


def test_a_hub_that_refuses_a_dataset_is_told_in_flags(run, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr("datasets.load_dataset", fail)
    monkeypatch.setattr(hub_dataset, "require_hub", lambda where, fix: None)
    stderr = run("--data", "hf:owner/name", "--tokenizer", "byte", "--out", tmp_path / "a.bin")[2]
    fix = "Check the configuration and the split in --data, or: Give a local file or folder as --data."
    assert stderr.splitlines()[-1] == f"error: --data: owner/name: no route. {fix}"


def test_a_stream_that_breaks_off_is_gone_on_with_by_the_flag_that_the_error_names(
    run, tmp_path, monkeypatch
):
    """`Try again` alone would fail: without --resume the command does not continue an interrupted one."""
    broken = [True]

    class Stream:
        column_names = None

        def __iter__(self) -> Iterator[dict]:
            yield from ({"text": f"document {i}"} for i in range(30))
            if broken:
                raise OSError("cable")

    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: Stream())
    monkeypatch.setattr(hub_dataset, "require_hub", lambda where, fix: None)
    monkeypatch.setattr(documents, "CHUNK_CHARACTERS", 100)
    command = (
        "--data",
        "hf:owner/name",
        "--tokenizer",
        "byte",
        "--out",
        tmp_path / "a.bin",
        "--processes",
        1,
    )
    code, _, stderr = run(*command)
    fix = "The same command with --resume continues from there."
    assert (code, stderr.splitlines()[-1]) == (
        2,
        f"error: owner/name (train): reading stopped: cable. {fix}",
    )
    broken.clear()
    assert (run(*command)[0], run(*command, "--resume")[0]) == (2, 0)
    assert documents_in(tmp_path / "a.bin") == [f"document {i}" for i in range(30)]


HUB_NAME = (
    "not the name of a dataset on the hub. Write hf:owner/name, hf:owner/name:config or "
    "hf:owner/name:config:split."
)
KINDS = ".txt, .jsonl, .parquet, .json, .csv, .tsv, .md, .html, .htm; also .gz, .bz2, .xz, .zst"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--processes", "0"),
            "--processes: must be at least 1, got 0. Give a whole number from 1.",
        ),
        (("--docs", "0"), "--docs: must be at least 1, got 0. Give a whole number from 1."),
        (
            ("--max-doc-len", "-3"),
            "--max-doc-len: must be at least 1, got -3. Give a whole number from 1.",
        ),
        (("--separator", ""), "--separator: is empty. Give the text that separates documents."),
        (
            ("--out", "a.txt"),
            "--out: a.txt: the name of a token file must end with .bin, or .npy for an array beside "
            "it. Choose such a name.",
        ),
        (
            ("--data", "no.txt"),
            "--data: no.txt: not found in {cwd}. Give a file, a folder, a glob, or a dataset on the hub written hf:owner/name.",
        ),
        (("--data", "hf:c4"), f"--data: hf:c4: {HUB_NAME}"),
        (("--data", "hf:a/b:c:d:e"), f"--data: hf:a/b:c:d:e: {HUB_NAME}"),
        (
            ("--data", "a.bin"),
            f"--data: a.bin: not a kind of file with documents ({KINDS}). Convert it, or name it by its kind.",
        ),
        (
            ("--data", "/dev/zero"),
            "/dev/zero: not a regular file. Give the path of a file on disk.",
        ),
        (("--data", "pipe.txt"), "pipe.txt: not a regular file. Give the path of a file on disk."),
        (
            ("--data", "loop.txt"),
            "loop.txt: Too many levels of symbolic links. Give the path of a file that can be read.",
        ),
        (
            ("--data", "empty"),
            f"--data: empty: no file of a kind with documents ({KINDS}) in this folder. Give the path of one.",
        ),
        (("--out", "pipe.bin"), "pipe.bin: not a regular file. Give the path of a file on disk."),
        (
            ("--out", "folder.bin"),
            "folder.bin: not a regular file. Give the path of a file on disk.",
        ),
        (
            ("--out", "a.txt/b.bin"),
            "a.txt: cannot be written: File exists. Change --out, or move the file that is there.",
        ),
        (
            ("--tokenizer", "./none"),
            "--tokenizer: ./none: not found in {cwd}. Give a folder with tokenizer.json, or a Hugging Face name such as gpt2.",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(run, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one\n", encoding="utf-8")
    Path("a.bin").write_text("one\n", encoding="utf-8")
    (
        os.mkfifo("pipe.txt"),
        os.mkfifo("pipe.bin"),
        os.mkdir("folder.bin"),
        os.mkdir("empty"),
        os.symlink("loop.txt", "loop.txt"),
    )
    given = {"--data": "a.txt", "--tokenizer": "byte", "--out": "out.bin"} | dict([flags])
    code, stdout, stderr = run(*(word for pair in given.items() for word in pair))
    expected = f"error: {message.replace('{cwd}', os.getcwd())}\n"
    assert (code, stdout, stderr) == (2, "", expected)


def test_a_file_of_another_kind_at_the_place_is_not_replaced(run, write, tmp_path):
    code, _, stderr = run(
        "--data", write("a.txt", "one\n"), "--tokenizer", "byte", "--out", write("a.bin", "mine")
    )
    assert (code, (tmp_path / "a.bin").read_text(encoding="utf-8")) == (2, "mine")
    assert (
        "a.bin: not a token file: it begins with b'mine'. Delete it, or choose another --out."
        in stderr
    )


def test_a_dataset_of_the_hub_is_streamed_and_no_more_of_it_read_than_asked_for(
    run, tmp_path, monkeypatch
):
    """`hf:owner/name:config:split`; of a million rows a few batches are read for seven documents."""
    calls: list[tuple] = []
    rows = count()

    class Stream:
        column_names = None

        def __iter__(self) -> Iterator[dict]:
            yield from ({"body": f"document {i}"} for i in rows)

    def serve(name: str, config: str | None, *, split: str, streaming: bool) -> Stream:
        calls.append((name, config, split, streaming))
        return Stream()

    monkeypatch.setattr("datasets.load_dataset", serve)
    monkeypatch.setattr(hub_dataset, "require_hub", lambda where, fix: None)
    monkeypatch.setattr(documents, "CHUNK_CHARACTERS", 100)
    command = (
        "--data",
        "hf:owner/name:en:validation",
        "--text-field",
        "body",
        "--docs",
        7,
        "--tokenizer",
        "byte",
        "--out",
        tmp_path / "a.bin",
    )
    assert run(*command, "--processes", 1)[0] == 0
    assert calls == [("owner/name", "en", "validation", True)]
    assert documents_in(tmp_path / "a.bin") == [f"document {i}" for i in range(7)]
    assert next(rows) < 100
    names = {
        "hf:a/b": (None, "train"),
        "hf:a/b:en": ("en", "train"),
        "hf:a/b::test": (None, "test"),
    }
    for name, (config, split) in names.items():
        (source,) = sources_named([name], "text", None).sources
        assert (source.name, source.config, source.split, source.streaming) == (
            "a/b",
            config,
            split,
            True,
        )


# --- interruptions of the command -------------------------------------------------------------------------------------


SLOW_COMMAND = """
from tinylm.__main__ import main
documents.SPAN_BYTES, encode.WORTH_PROCESSES, token_file_writer.TokenFileWriter.SAVE_SECONDS = 2000, 1, 0.02
append, wait = token_file_writer.TokenFileWriter.append, float(args.pop(0))
def slow(self, *chunk, **read):
    append(self, *chunk, **read)
    print(self.state.portions, flush=True)
    time.sleep(wait)
token_file_writer.TokenFileWriter.append = slow
if __name__ == "__main__":
    sys.exit(main(["encode", *args]))
"""


@pytest.fixture
def interrupted(write, tmp_path, child) -> Callable[..., tuple[int, str]]:
    """Start the command on 100 chunks and send it a signal after some of them; its exit code and stderr."""
    path = write("a.txt", "".join(f"document {i} {'x' * (i % 50)}\n" for i in range(5000)))
    command = ("--data", path, "--tokenizer", "byte", "--out", tmp_path / "a.bin")

    def start(n_chunks: int, number: int, *flags: object) -> tuple[int, str]:
        process = child(SLOW_COMMAND, 0.02 if n_chunks else 0, *command, *flags)
        seen = 0
        while n_chunks and process.stdout.readline():
            seen += 1
            if seen == n_chunks:
                process.send_signal(number)
                break
        _, err = process.communicate(timeout=60)
        return process.returncode, err

    return start


@pytest.mark.slow
def test_ctrl_c_leaves_a_state_to_go_on_from_and_says_so(interrupted, tmp_path):
    code, err = interrupted(10, signal.SIGINT, "--processes", 1)
    assert (code, names(tmp_path)) == (130, [".a.bin.part", "a.txt"])
    assert err.splitlines()[-3:] == [
        "interrupted; the same command with --resume continues from here",
        "",
        "stopped by Ctrl-C",
    ]
    state = tmp_path / ".a.bin.part/state.json"
    assert json.loads(state.read_bytes())["portions"] >= 10
    code, err = interrupted(
        0, 0, "--processes", 1
    )  # hours of work must not go for a flag that was forgotten
    assert (code, err.strip()) == (
        2,
        f"error: {state.parent}: holds the work of an interrupted run. Continue it with the same "
        f"command and --resume, or delete it to start again.",
    )
    assert interrupted(0, 0, "--processes", 1, "--resume")[0] == 0
    resumed = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").unlink()
    encode_file(tmp_path / "a.bin", spec_of(tmp_path / "a.txt"))
    assert (tmp_path / "a.bin").read_bytes() == resumed


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_five_times_and_resumed_the_file_is_that_of_one_run(
    interrupted, tmp_path, processes
):
    """Killed with SIGKILL a dozen chunks later each time; the file has its final name only at the end."""
    for _ in range(5):
        assert (
            interrupted(12, signal.SIGKILL, "--processes", processes, "--resume")[0]
            == -signal.SIGKILL
        )
        assert not (tmp_path / "a.bin").exists()
    assert json.loads((tmp_path / ".a.bin.part/state.json").read_bytes())["portions"] > 20
    assert interrupted(0, 0, "--processes", processes, "--resume")[0] == 0
    encode_file(tmp_path / "clean.bin", spec_of(tmp_path / "a.txt"))
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "clean.bin").read_bytes()
    assert names(tmp_path) == ["a.bin", "a.txt", "clean.bin"]


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_done_for_a_resume(write, tmp_path, child, run, monkeypatch):
    """RLIMIT_FSIZE stops the file at 64 KiB; no file has the final name, and with space the command continues."""
    path = write("a.txt", "some words and more of them\n" * 5000)
    command = ("--data", path, "--tokenizer", "byte", "--out", tmp_path / "a.bin", "--processes", 1)
    code = """resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)); documents.SPAN_BYTES, token_file_writer.TokenFileWriter.SAVE_SECONDS = 5000, -1
from tinylm.__main__ import main
sys.exit(main(["encode", *args]))"""
    process = child(code, *command)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert (
        err.splitlines()[-1]
        == f"error: {tmp_path / 'a.bin'}: cannot be written: File too large. Raise the limit with `ulimit -f unlimited`, or change --out."
    )
    assert names(tmp_path) == [".a.bin.part", "a.txt"]
    assert json.loads((tmp_path / ".a.bin.part/state.json").read_bytes())["portions"] > 3
    assert (
        "was started with another text, tokenizer, settings or version"
        in run(*command, "--resume")[2]
    )
    monkeypatch.setattr(documents, "SPAN_BYTES", 5000)
    assert run(*command, "--resume")[0] == 0
    assert documents_in(tmp_path / "a.bin") == ["some words and more of them"] * 5000


def test_bare_ids_beside_the_token_file_are_its_ids(run, write, tmp_path):
    """np.fromfile is the oracle; read back with data.token_dtype they are the same token file. The
    same command again finds both, and refuses numbers that are others.
    """
    out = tmp_path / "a.bin"
    flags = ("--data", write("a.txt", "one\ntwo\n"), "--tokenizer", "byte", "--out", out)
    code, stdout, _ = run(*flags, "--format", "bare")
    bare = tmp_path / "a.ids.bin"
    assert (code, stdout) == (0, f"{bare}\n{out}\n")
    expected = [*b"one", BYTES.eos_id, *b"two", BYTES.eos_id]
    assert np.fromfile(bare, dtype="<u2").tolist() == expected
    again = open_tokens(bare, tokenizer=BYTES, dtype="uint16")
    assert again.tokens.tolist() == TokenFile.open(out).tokens.tolist() == expected
    assert run(*flags, "--format", "bare")[0] == 0
    bare.write_bytes(bare.read_bytes()[::-1])
    code, _, stderr = run(*flags, "--format", "bare")
    assert code == 2
    assert f"error: {bare}: already exists, with other ids than {out}. Delete it" in stderr
