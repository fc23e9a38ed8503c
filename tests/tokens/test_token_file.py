"""The token file: its format, errors, writing in chunks; arrays of ids of other programs."""

import io
import json
import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import write_token_chunks, write_token_file
from tinylm.common.errors import UserError
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.byte_char import ByteTokenizer, CharTokenizer
from tinylm.tokens import id_arrays, overlap
from tinylm.tokens import token_file as token_files
from tinylm.tokens.id_arrays import open_tokens, write_ids
from tinylm.tokens.overlap import token_overlap
from tinylm.tokens.token_file import (
    HEADER_BYTES,
    MAGIC,
    TokenFile,
    checked_tokens,
    token_dtype,
)
from tinylm.tokens.token_file_writer import TokenFileWriter, writer_folder

BYTES = ByteTokenizer()


def names(folder: Path) -> list[str]:
    """The files of a folder, without locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_two_bytes_hold_65536_ids_and_one_more_needs_four():
    assert [token_dtype(size).name for size in (260, 65536, 65537, 70000)] == [
        "uint16",
        "uint16",
        "uint32",
        "uint32",
    ]


class Wide(Tokenizer):
    """70000 tokens, of which the first is 69999: cast to two bytes it would be 4463."""

    kind, vocab_size, eos_id, pad_id, special_names = (
        "wide",
        70_000,
        65_536,
        65_536,
        {65_536: "end"},
    )

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.full(len(text), 69_999, dtype=np.int64) for text in texts]

    def token_bytes(self, id: int) -> bytes:
        return b"x"

    def to_plain(self) -> dict[str, str]:
        return {"kind": "wide"}

    @classmethod
    def from_plain(cls, plain: dict[str, str]) -> "Wide":
        return cls()


def test_ids_beyond_65535_are_kept(tmp_path):
    write_token_file(tmp_path / "a.bin", ["ab", "c"], Wide())
    file = TokenFile.open(tmp_path / "a.bin")
    assert (file.header.dtype, file.tokens.tolist()) == (
        "uint32",
        [69_999, 69_999, 65_536, 69_999, 65_536],
    )


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
    write_token_file(path, ["ab", "é", "c"], BYTES)
    return path


TOKENS = [97, 98, 258, 0xC3, 0xA9, 258, 99, 258]


def test_a_token_file_reads_as_it_was_written(token_file):
    file = TokenFile.open(token_file)
    assert (len(file), file.tokens.tolist(), file.tokens.ndim) == (8, TOKENS, 1)
    header = file.header
    assert (
        header.count,
        header.dtype,
        header.documents,
        header.text_bytes,
        header.eos_id,
        header.vocab_size,
    ) == (8, "uint16", 3, 5, 258, 260)
    assert (header.tokenizer, header.source) == (BYTES.fingerprint, "test")
    file.verify()
    file.require_tokenizer(BYTES)


def test_the_format_is_a_line_a_json_header_and_raw_numbers(token_file):
    """Read here with nothing of ours: what another program would do.

    8 tokens fill 16 bytes, so the index needs no padding.
    """
    data = token_file.read_bytes()
    assert data.startswith(MAGIC) and data[4095:4096] == b"\n" and len(data) == 4096 + 2 * 8 + 8 * 3
    header = json.loads(data[len(MAGIC) : 4096])
    assert (header["version"], header["count"], header["documents"]) == (2, 8, 3)
    assert np.frombuffer(data[4096:4112], dtype="<u2").tolist() == TOKENS
    assert np.frombuffer(data[4112:], dtype="<u8").tolist() == [3, 6, 8]


@pytest.mark.parametrize("n", range(1, 6))
def test_the_index_stands_behind_zeros_at_a_multiple_of_8_bytes(tmp_path, n):
    """n letters and EOS are n + 1 tokens of 2 bytes."""
    write_token_file(tmp_path / "a.bin", ["x" * n], BYTES)
    data = (tmp_path / "a.bin").read_bytes()[4096:]
    assert len(data) == -(-2 * (n + 1) // 8) * 8 + 8
    assert data[2 * (n + 1) :] == bytes(len(data) - 8 - 2 * (n + 1)) + (n + 1).to_bytes(8, "little")


@pytest.mark.slow
@given(
    texts=st.lists(
        st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=5),
        min_size=1,
        max_size=9,
    ),
    data=st.data(),
)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None
)
def test_documents_come_back_by_the_index(tmp_path, texts, data):
    """Of the whole file, and of a part between two borders."""
    write_token_file(tmp_path / "a.bin", texts, BYTES)
    file = TokenFile.open(tmp_path / "a.bin")
    file.verify()
    ends = [0, *file.document_ends.tolist()]
    assert [BYTES.decode(file.tokens[a:b]) for a, b in zip(ends, ends[1:], strict=False)] == texts
    first = data.draw(st.integers(0, len(texts) - 1))
    last = data.draw(st.integers(first + 1, len(texts)))
    part = file.between(ends[first], ends[last])
    assert part.document_ends.tolist() == [end - ends[first] for end in ends[first + 1 : last + 1]]


@pytest.mark.slow
@given(lengths=st.lists(st.integers(0, 3), min_size=2, max_size=9), data=st.data())
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None
)
def test_the_border_is_the_first_start_of_a_document_from_there_on(tmp_path, lengths, data):
    """Oracle: a search through all tokens. The start of the file and its end divide nothing."""
    write_token_file(tmp_path / "a.bin", ["x" * n for n in lengths], BYTES)
    file = TokenFile.open(tmp_path / "a.bin")
    starts = [place for place in range(1, len(file)) if file.tokens[place - 1] == BYTES.eos_id]
    wanted = data.draw(st.integers(0, len(file)))
    assert file.document_border(wanted) == next(
        (start for start in starts if start >= wanted), starts[-1]
    )


def test_one_document_has_no_border(tmp_path):
    write_token_file(tmp_path / "a.bin", ["only one"], BYTES)
    with pytest.raises(
        UserError,
        match="a.bin: has only one document, so none can be held out. Set data.val_dataset to a second token file.",
    ):
        TokenFile.open(tmp_path / "a.bin").document_border(3)


def test_tokens_cannot_be_written_to(token_file):
    with pytest.raises(ValueError, match="read-only"):
        TokenFile.open(token_file).tokens[0] = 1


def test_the_same_text_gives_the_same_bytes(token_file, tmp_path):
    write_token_file(tmp_path / "again.bin", ["ab", "é", "c"], BYTES)
    assert (tmp_path / "again.bin").read_bytes() == token_file.read_bytes()


def test_a_worker_process_gets_the_path_not_the_tokens(tmp_path):
    write_token_file(tmp_path / "a.bin", ["x" * 100_000], BYTES)
    file = TokenFile.open(tmp_path / "a.bin").between(10, 20)
    packed = pickle.dumps(file)
    assert len(packed) < 5000
    back = pickle.loads(packed)  # noqa: S301
    assert (back.tokens.tolist(), back.fingerprint, back.fix) == (
        file.tokens.tolist(),
        file.fingerprint,
        file.fix,
    )


def encode_again(path: Path) -> str:
    return f"Encode again: python -m tinylm encode --data TEXT --tokenizer TOKENIZER --out {path}."


@pytest.mark.parametrize("size", [4096, 4097, 4096 + 16, 4096 + 39, 4096 + 41, 4096 + 160])
def test_a_token_file_of_the_wrong_size_is_refused(token_file, size):
    data = token_file.read_bytes()
    token_file.write_bytes((data + bytes(size))[:size])
    with pytest.raises(UserError) as caught:
        TokenFile.open(token_file)
    expected = "expected 4136 bytes (8 tokens of uint16 after 4096 bytes of header, and 3 ends of documents)"
    assert (
        str(caught.value) == f"{token_file}: {expected}, found {size}. {encode_again(token_file)}"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a token file: it begins with b''."),
        (pickle.dumps({"x": 1}), "not a token file: it begins with b'"),
        (MAGIC + b'{"version": 1', "header: JSON: Invalid JSON"),
        (MAGIC + b"[]" + b" " * 5000, "header: JSON: "),
        (MAGIC + b"{}" + b" " * 5000, "header: version: Field required"),
        (MAGIC + b'{"version": 1}' + b" " * 5000, "header: version: Input should be 2. "),
    ],
)
def test_what_is_no_token_file_is_refused(tmp_path, content, message):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError) as caught:
        TokenFile.open(tmp_path / "a.bin")
    assert str(caught.value).startswith(f"{tmp_path / 'a.bin'}: {message}")
    assert encode_again(tmp_path / "a.bin") in str(caught.value)
    assert str(caught.value).endswith(" If it is a bare array of ids, set data.token_dtype.") == (
        "not a token file" in message
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("count", 0),
        ("count", "8"),
        ("count", 2.5),
        ("dtype", "float64"),
        ("eos_id", -1),
        ("tokenizer", 3),
    ],
)
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


@pytest.mark.slow
def test_every_flipped_bit_is_found(token_file):
    """In the tokens and in each field of the header; the spaces after the JSON have no meaning."""
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
        f"{token_file}: encoded with tokenizer {BYTES.fingerprint} (vocabulary 260), this run uses "
        f"{other.fingerprint} (5). "
        f"Set tokenizer to that one, or: {encode_again(token_file)}"
    )


# --- writing goes wrong -----------------------------------------------------------------------------------------------


def test_the_file_is_synced_before_it_gets_its_name_and_the_folder_after(tmp_path, monkeypatch):
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (
            order.append("sync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "sync file"),
            fsync(fd),
        ),
    )
    monkeypatch.setattr(
        os,
        "replace",
        lambda a, b: (order.append(f"{Path(a).name} -> {Path(b).name}"), replace(a, b)),
    )
    write_token_file(tmp_path / "a.bin", ["a"], BYTES)
    assert order == ["sync file", "tokens -> a.bin", "sync folder"]


def broken() -> Iterator[np.ndarray]:
    yield np.array([97, 258])
    raise UserError("source", "the source broke")


def test_a_source_that_breaks_leaves_no_file_and_keeps_the_old_one(token_file, tmp_path):
    before = token_file.read_bytes()
    for path in (token_file, tmp_path / "new.bin"):
        with pytest.raises(UserError, match="the source broke"):
            write_token_chunks(path, broken(), BYTES)
    assert (names(tmp_path), token_file.read_bytes()) == (["train.bin"], before)


@pytest.mark.parametrize(
    ("call", "reason", "fix"),
    [
        ("fsync", "Input/output error", "Check the disk"),
        ("replace", "Permission denied", "Get the permission to write there"),
    ],
)
def test_a_failed_sync_or_rename_is_a_failed_file(tmp_path, monkeypatch, call, reason, fix):
    def fail(*args):
        raise OSError({"fsync": 5, "replace": 13}[call], reason)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError) as caught:
        write_token_file(tmp_path / "a.bin", ["a"], BYTES)
    assert (
        str(caught.value)
        == f"{tmp_path / 'a.bin'}: cannot be written: {reason}. {fix}, or change data.cache_dir."
    )
    assert names(tmp_path) == []


# --- documents on both sides ------------------------------------------------------------------------------------------


DOCUMENTS = st.lists(st.sampled_from(["", "a", "b", "ab", "abc", "é", "x" * 9]), max_size=12)


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 3, 2**16])
@given(train=st.lists(DOCUMENTS, min_size=1, max_size=3), val=DOCUMENTS)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8, deadline=None
)
def test_documents_on_both_sides_are_those_of_both_sets(tmp_path, block, train, val):
    """Oracle: Python's sets.

    Documents of EOS alone say nothing; ids of two and of four bytes are the same documents.
    """
    files = []
    for number, documents in enumerate([*train, val]):
        write_token_file(tmp_path / f"{number}.bin", [*documents, ""], BYTES)
        np.save(
            tmp_path / f"{number}.npy",
            TokenFile.open(tmp_path / f"{number}.bin").tokens.astype(np.uint32),
        )
        files.append(
            open_tokens(tmp_path / f"{number}.{'npy' if number == 0 else 'bin'}", tokenizer=BYTES)
        )
    *sides, wanted = [{text for text in documents if text} for documents in [*train, val]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "DIGESTS", block)
        assert token_overlap(files[:-1], files[-1:])[:2] == (
            len(wanted & set().union(*sides)),
            len(wanted),
        )


def test_documents_on_both_sides_of_a_border_are_counted(tmp_path):
    """b and c of b, c, d; the border is after `aa`, `b` and `c`, 3 + 2 + 2 tokens."""
    write_token_file(tmp_path / "a.bin", ["aa", "b", "c", "b", "c", "d", "b"], BYTES)
    file = TokenFile.open(tmp_path / "a.bin")
    assert token_overlap([file.between(0, 7)], [file.between(7, len(file))])[:2] == (2, 3)


# --- writing that continues -----------------------------------------------------------------------


PORTIONS = [([1, 2, 258], [3]), ([], []), ([3, 258, 258], [2, 3]), ([4, 258], [2])]


def written(path: Path, portions: list, **options) -> TokenFileWriter:
    """A writer with some chunks."""
    writer = TokenFileWriter(path, BYTES, "recipe", **options)
    for tokens, ends in portions:
        writer.append(np.array(tokens, dtype=np.uint16), np.array(ends, dtype=np.int64), read=2)
    return writer


def test_what_a_header_says_of_the_text_is_checked_and_left_out_where_it_is_nothing(tmp_path):
    """Files that were written before these fields are whole; a flipped bit in one of their names is found."""
    for name, spelled, unseparated in (("plain.bin", 0, False), ("noted.bin", 2, True)):
        with written(tmp_path / name, PORTIONS[:1]) as writer:
            writer.append(np.array([5, 258], dtype=np.uint16), np.array([2]), spelled=spelled)
            writer.finish("source", unseparated=unseparated)
    assert b"spelled_eos" not in (tmp_path / "plain.bin").read_bytes()
    noted = TokenFile.open(tmp_path / "noted.bin")
    noted.verify()
    assert (noted.header.spelled_eos, noted.header.unseparated) == (2, True)
    data = (tmp_path / "noted.bin").read_bytes()
    for name in (b"spelled_eos", b"unseparated"):
        (tmp_path / "noted.bin").write_bytes(data.replace(name, name.upper()))
        with pytest.raises(UserError, match="its content is not what was written"):
            TokenFile.open(tmp_path / "noted.bin").verify()


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """The file of all chunks, written without interruption."""
    with written(tmp_path / "whole.bin", PORTIONS) as writer:
        writer.finish("source")
    assert TokenFile.open(tmp_path / "whole.bin").tokens.tolist() == [
        1,
        2,
        258,
        3,
        258,
        258,
        4,
        258,
    ]
    return (tmp_path / "whole.bin").read_bytes()


@pytest.mark.parametrize("saved", range(5))
@pytest.mark.parametrize("lost", range(3))
def test_a_draft_goes_on_from_what_was_saved(tmp_path, whole, saved, lost):
    """Chunks after the last saved state are written again, although half of them may be on disk; nothing is
    closed, as after a kill.
    """
    path = tmp_path / "a.bin"
    writer = written(path, PORTIONS[:saved])
    writer.save()
    for tokens, ends in PORTIONS[saved : saved + lost]:
        writer.append(np.array(tokens, dtype=np.uint16), np.array(ends, dtype=np.int64))
    writer._tokens_file.flush()
    with TokenFileWriter(path, BYTES, "recipe", resume=True) as again:
        assert (again.state.portions, again.state.read) == (saved, 2 * saved)
        for tokens, ends in PORTIONS[saved:]:
            again.append(np.array(tokens, dtype=np.uint16), np.array(ends, dtype=np.int64), read=2)
        again.finish("source")
    assert path.read_bytes() == whole
    assert names(tmp_path) == ["a.bin", "whole.bin"]


def test_a_kill_while_the_file_is_finished_loses_nothing(tmp_path, whole, monkeypatch):
    """The index is written already when the rename does not come."""
    path = tmp_path / "a.bin"
    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt),
        written(path, PORTIONS, keep=True) as writer,
    ):
        writer.save()
        patch.setattr(os, "replace", interrupt)
        writer.finish("source")
    with TokenFileWriter(path, BYTES, "recipe", resume=True) as again:
        assert again.state.portions == 4
        again.finish("source")
    assert path.read_bytes() == whole


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("keep", "error", "left"),
    [(False, UserError, False), (True, UserError, True), (False, KeyboardInterrupt, True)],
)
def test_an_interruption_leaves_the_draft_and_an_error_only_where_that_is_wished(
    tmp_path, keep, error, left
):
    with pytest.raises(error), written(tmp_path / "a.bin", PORTIONS[:2], keep=keep):
        raise error("text", "interrupted")
    assert names(tmp_path) == ([".a.bin.part"] if left else [])
    assert TokenFileWriter(tmp_path / "a.bin", BYTES, "recipe", resume=True).state.portions == (
        2 if left else 0
    )


def test_without_resume_an_unfinished_file_is_written_again(tmp_path):
    written(tmp_path / "a.bin", PORTIONS).save()
    assert TokenFileWriter(tmp_path / "a.bin", BYTES, "recipe").state.portions == 0


def test_the_state_is_saved_every_few_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(TokenFileWriter, "SAVE_SECONDS", -1)
    written(tmp_path / "a.bin", PORTIONS[:3])
    assert TokenFileWriter(tmp_path / "a.bin", BYTES, "recipe", resume=True).state.portions == 3


def test_the_draft_of_something_else_is_not_gone_on_with(tmp_path):
    written(tmp_path / "a.bin", PORTIONS).save()
    folder = writer_folder(tmp_path / "a.bin")
    for recipe, cut in (("other", ""), ("recipe", "after 5 bytes")):
        with pytest.raises(UserError) as caught:
            TokenFileWriter(tmp_path / "a.bin", BYTES, recipe, cut=cut, resume=True)
        found = "was started with another text, tokenizer, settings or version"
        assert (
            str(caught.value)
            == f"{folder}: {found}. Continue with those, or: Delete {folder} to start again."
        )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokens", bytes(100), "tokens: shorter than"),
        ("ends", b"", "ends: shorter than"),
        ("state.json", b"{", "state.json: not the state of"),
    ],
)
def test_a_damaged_draft_is_refused(tmp_path, name, content, message):
    written(tmp_path / "a.bin", PORTIONS).save()
    folder = writer_folder(tmp_path / "a.bin")
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        TokenFileWriter(tmp_path / "a.bin", BYTES, "recipe", resume=True)
    assert message in str(caught.value)
    assert str(caught.value).endswith(f"Delete {folder} to start again.")


# --- arrays of ids ----------------------------------------------------------------------------------------------------


def opened(path: Path, tokenizer: Tokenizer = BYTES, **options) -> TokenFile:
    return open_tokens(path, tokenizer=tokenizer, **options)


def array_refusal(path: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        opened(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("block", [1, 2, 3, 2**20])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_an_array_reads_as_the_token_file_with_its_ids(
    token_file, tmp_path, dtype, block, monkeypatch
):
    monkeypatch.setattr(token_files, "BLOCK", block)
    ids, ours = np.array(TOKENS, dtype=dtype), TokenFile.open(token_file)
    np.save(tmp_path / "a.npy", ids)
    ids.tofile(tmp_path / "bare.bin")
    for file in (opened(tmp_path / "a.npy"), opened(tmp_path / "bare.bin", dtype=dtype)):
        file.verify()
        file.require_tokenizer(BYTES)
        assert (file.tokens.tolist(), file.document_ends.tolist(), file.header.dtype) == (
            TOKENS,
            [3, 6, 8],
            dtype,
        )
        assert (file.header.documents, file.header.text_bytes) == (
            ours.header.documents,
            ours.header.text_bytes,
        )
        assert file.between(3, 8).document_ends.tolist() == [3, 5]
        assert len(file.fingerprint) == 12


def test_a_last_document_without_eos_is_one(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1, 258, 2], dtype=np.uint16))
    np.save(tmp_path / "b.npy", np.array([1, 2], dtype=np.uint16))
    assert opened(tmp_path / "a.npy").document_ends.tolist() == [2, 3]
    assert opened(tmp_path / "b.npy").document_ends.tolist() == [2]


def test_the_fingerprint_of_an_array_is_its_content(tmp_path):
    for name, ids in (("a", [1, 2]), ("b", [1, 2]), ("c", [1, 3])):
        np.save(tmp_path / f"{name}.npy", np.array(ids, dtype=np.uint16))
    a, b, c = (opened(tmp_path / f"{name}.npy").fingerprint for name in "abc")
    assert a == b != c


def test_a_worker_process_gets_an_array_without_reading_it_again(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.array(TOKENS, dtype=np.uint16))
    packed = pickle.dumps(opened(tmp_path / "a.npy").between(3, 8))
    monkeypatch.setattr(id_arrays, "_scan", None)
    back = pickle.loads(packed)  # noqa: S301
    assert (back.tokens.tolist(), back.document_ends.tolist()) == (TOKENS[3:], [3, 5])


def test_an_id_that_the_tokenizer_lacks_is_named_with_its_place(tmp_path):
    """Before training, not in it: an embedding has no such row."""
    ids = np.array([1, 2, 258, 260, 259, 7], dtype=np.uint16)
    np.save(tmp_path / "a.npy", ids)
    ids.tofile(tmp_path / "a.bin")
    for path, options in ((tmp_path / "a.npy", {}), (tmp_path / "a.bin", {"dtype": "uint16"})):
        found = "id 260 at position 3, and the tokenizer of this run has 260 tokens"
        assert (
            array_refusal(path, **options)
            == f"{path}: {found}. Set tokenizer to the one that it was encoded with, or correct data.token_dtype."
        )


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_bare_array_of_an_odd_size_is_refused(tmp_path, size):
    (tmp_path / "a.bin").write_bytes(bytes(size))
    expected = "expected a multiple of 4 bytes (data.token_dtype is uint32)"
    message = f"{tmp_path / 'a.bin'}: {expected}, found {size}. Give the whole file, or correct data.token_dtype."
    assert array_refusal(tmp_path / "a.bin", dtype="uint32") == message


def test_a_bare_array_needs_its_dtype(tmp_path):
    np.array(TOKENS, dtype=np.uint16).tofile(tmp_path / "a.bin")
    assert array_refusal(tmp_path / "a.bin").endswith(
        " If it is a bare array of ids, set data.token_dtype."
    )


def test_a_dtype_that_the_file_denies_is_refused(token_file):
    assert opened(token_file, dtype="uint16").tokens.tolist() == TOKENS
    message = f"data.token_dtype: is uint32, but the header of {token_file} says uint16. Remove data.token_dtype."
    assert array_refusal(token_file, dtype="uint32") == message


def npy_header(shape: str, descr: str = "'<u2'") -> bytes:
    text = (
        f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117)
        + b"\n"
    )
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize("shape", [10**12, 2**63, 10**300])
def test_an_absurd_shape_is_refused_before_anything_is_made(tmp_path, shape):
    (tmp_path / "a.npy").write_bytes(npy_header(f"({shape},)") + bytes(8))
    assert f"for {shape} ids of uint16, and at least one id, found " in array_refusal(
        tmp_path / "a.npy"
    )


@pytest.mark.parametrize("descr", ["'<i8'", "'<f4'", "'>u2'", "'|u1'", "'|O'", "[('a', '<u2')]"])
def test_an_array_of_another_type_is_refused(tmp_path, descr):
    (tmp_path / "a.npy").write_bytes(npy_header("(4,)", descr) + bytes(32))
    assert ": expected one row of uint16 or uint32, found " in array_refusal(tmp_path / "a.npy")


@pytest.mark.parametrize("shape", ["(2, 2)", "()", "(-4,)", "(0,)"])
def test_an_array_that_is_no_row_of_ids_is_refused(tmp_path, shape):
    (tmp_path / "a.npy").write_bytes(npy_header(shape) + bytes(8))
    assert array_refusal(tmp_path / "a.npy").startswith(f"{tmp_path / 'a.npy'}: ")


def test_an_array_of_python_objects_runs_nothing(tmp_path):
    """np.load would refuse it as well, without allow_pickle."""

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    np.save(tmp_path / "a.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Payload()))
    for name in ("a.npy", "b.npy"):
        array_refusal(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@given(
    data=st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=120).map(lambda tail: npy_header("(4,)")[:20] + tail),
    )
)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None
)
def test_no_bytes_named_npy_do_more_than_a_refusal(tmp_path, data):
    (tmp_path / "a.npy").write_bytes(data)
    array_refusal(tmp_path / "a.npy")


def test_a_later_version_of_the_format_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.arange(4, dtype=np.uint16), version=(2, 0))
    (tmp_path / "a.npy").write_bytes(buffer.getvalue())
    assert "a.npy: not a NumPy file of token ids: format 2.0. " in array_refusal(tmp_path / "a.npy")


def test_a_token_file_as_a_plain_array(token_file, tmp_path):
    """NumPy reads what we write, and it is what NumPy writes."""
    write_ids(TokenFile.open(token_file), tmp_path / "a.npy", "--out")
    np.save(tmp_path / "b.npy", np.array(TOKENS, dtype=np.uint16))
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert np.load(tmp_path / "a.npy", allow_pickle=False).tolist() == TOKENS


def test_an_array_that_cannot_be_written_leaves_nothing(token_file, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError,
        match="a.npy: cannot be written: No space left on device. Free disk space or change --out.",
    ):
        write_ids(TokenFile.open(token_file), tmp_path / "a.npy", "--out")
    assert names(tmp_path) == ["train.bin"]
