"""Mixtures: the shares are the weights, each source has passes of its own, and the fingerprint depends on
all of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import overlap_of, write_token_file
from tinylm.common.errors import UserError, printable
from tinylm.config.schema import DataConfig, MixPart, TokenizerConfig
from tinylm.text.data_source import data_sources
from tinylm.text.sources import is_held_out
from tinylm.tokenizer.byte_char import ByteTokenizer
from tinylm.tokens.mixture import Allocation, mixture_fingerprint, shares_of
from tinylm.tokens.run_files import (
    name_of,
    token_files,
)
from tinylm.tokens.token_file import JoinedFiles, TokenFile
from training.tokenizer import learn_from_documents, training_split

BYTES = ByteTokenizer()
SEED = 1
WEIGHTS = st.lists(st.floats(0.01, 100) | st.integers(1, 5).map(float), min_size=1, max_size=6)


# --- which rows come from which source --------------------------------------------------------------------------------


@pytest.mark.slow
@given(WEIGHTS, st.integers(0, 2**31 - 1), st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
@settings(deadline=None)
def test_at_each_border_of_blocks_a_source_is_less_than_a_row_from_its_share(weights, seed, blocks):
    """The counts add up to all rows, and no source's count falls from one block to the next."""
    allocation = Allocation(weights, seed)
    for block in blocks:
        n = block * allocation.block_rows
        counts, later = allocation.counts(n), allocation.counts(n + allocation.block_rows)
        assert sum(counts) == n
        assert all(
            abs(count - share * n) < 1
            for count, share in zip(counts, shares_of(weights), strict=True)
        )
        assert all(count <= more for count, more in zip(counts, later, strict=True))


@given(WEIGHTS, st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=30)
def test_the_rows_of_a_source_are_numbered_without_gap_or_repetition(weights, seed):
    """Place after place, the numbers that a source gets are 0, 1, 2, ...: so it goes through its own passes
    in order.
    """
    allocation = Allocation(weights, seed)
    taken: dict[int, list[int]] = {source: [] for source in range(len(weights))}
    for place in range(allocation.block_rows * 2 + 10):
        source, number = allocation.row(place)
        taken[source].append(number)
    assert all(numbers == list(range(len(numbers))) for numbers in taken.values())


@given(WEIGHTS, st.lists(st.integers(0, 10**7), min_size=1, max_size=4))
@settings(deadline=None, max_examples=30)
def test_a_place_has_its_row_whoever_asks_and_in_whatever_order(weights, places):
    asked = Allocation(weights, SEED)
    assert [asked.row(place) for place in places] == [
        Allocation(weights, SEED).row(place) for place in places
    ]


@pytest.mark.slow
def test_other_seeds_mix_in_another_order():
    """In one block of 1024 rows with weights 1 and 1, 512 rows are of each source, for every seed, in other
    places.
    """
    sources = [[Allocation([1, 1], seed).row(place)[0] for place in range(1024)] for seed in (1, 2)]
    assert sources[0] != sources[1]
    assert [one.count(0) for one in sources] == [512, 512]
    blocks = [Allocation([1, 1], 1).row(1024 + place)[0] for place in range(1024)]
    assert blocks != sources[0], "each block has an order of its own"


def test_a_tenth_is_a_tenth():
    """0.1 + 0.2 + 0.7 is not 1 in binary numbers; of 10 million rows the sources have exactly 1, 2 and 7 million."""
    assert Allocation([0.1, 0.2, 0.7], SEED).counts(10_000_000) == [1_000_000, 2_000_000, 7_000_000]


def test_a_source_of_a_millionth_is_in_every_block():
    """Or with 1024 rows a block it would never be seen, or its count would fall; the config allows no
    smaller weight.
    """
    allocation = Allocation([999_999, 1], SEED)
    assert allocation.block_rows == 1_000_000
    assert allocation.counts(3_000_000) == [2_999_997, 3]


# --- tokens of several files ------------------------------------------------------------------------------------------


@dataclass
class ArrayFile:
    """What `JoinedFiles` reads of a token file"""

    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@pytest.mark.slow
@given(
    st.lists(st.lists(st.integers(0, 99), max_size=5), min_size=1, max_size=5),
    st.integers(-30, 30) | st.none(),
    st.integers(-30, 30) | st.none(),
)
def test_joined_tokens_are_sliced_as_one_array_would_be(parts, start, stop):
    arrays = [np.array(part, dtype=np.uint16) for part in parts]
    found = JoinedFiles(tuple(map(ArrayFile, arrays))).tokens[start:stop]
    assert found.tolist() == np.concatenate(arrays)[start:stop].tolist()
    assert found.dtype == np.uint16


def test_joined_tokens_have_no_steps():
    with pytest.raises(ValueError, match="joined tokens have no steps, got a step of 2"):
        JoinedFiles((ArrayFile(np.arange(3)),)).tokens[::2]


# --- the files of a run -----------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, list[str]], str]:
    """Writes a text of one-line documents into the test's folder and gives its path."""

    def write(name: str, documents: list[str]) -> str:
        (tmp_path / name).write_text(
            "".join(f"{document}\n" for document in documents), encoding="utf-8"
        )
        return str(tmp_path / name)

    return write


def token_file(path: Path, documents: list[str]) -> str:
    """A token file of these documents, as `python -m tinylm encode` makes one."""
    write_token_file(path, documents, BYTES)
    return str(path)


def mixed(tmp_path: Path, *datasets: str, **more: Any) -> DataConfig:
    """Settings that mix these sources, the first with weight 3."""
    parts = tuple(
        MixPart(dataset=dataset, weight=1 if number else 3)
        for number, dataset in enumerate(datasets)
    )
    return DataConfig(mix=parts, cache_dir=str(tmp_path / "cache"), **more)


def train_files(data: DataConfig, needed: int) -> tuple[TokenFile, ...]:
    """The training files of these settings."""
    sources = data_sources(data, "train", SEED)
    return token_files(sources, BYTES, data.cache_dir, needed=needed)


def val_file(data: DataConfig) -> TokenFile | JoinedFiles:
    """The validation file of these settings."""
    files = token_files(data_sources(data, "val", SEED), BYTES, data.cache_dir)
    return files[0] if len(files) == 1 else JoinedFiles(files)


def text_of(file: TokenFile | JoinedFiles) -> list[str]:
    """The documents in the tokens of a file."""
    return BYTES.decode(
        [10 if id == BYTES.eos_id else id for id in np.asarray(file.tokens[:]).tolist()]
    ).splitlines()


A, B = [f"first {i}" for i in range(40)], [f"second {i}" for i in range(30)]


def test_each_source_is_a_file_and_what_is_held_out_of_each_is_validated_together(tmp_path, write):
    """The split goes by the text and the seed, as for one source; all documents are on one side or the other."""
    data = mixed(tmp_path, write("a.txt", A), write("b.txt", B), val_fraction=0.3)
    train, val = train_files(data, needed=2), val_file(data)
    held = [[text for text in texts if is_held_out(text, 0.3, SEED)] for texts in (A, B)]
    assert all(held)
    assert [text_of(file) for file in train] == [
        [text for text in texts if text not in out] for texts, out in zip((A, B), held, strict=True)
    ]
    assert text_of(val) == held[0] + held[1]
    assert len(val) == sum(len(text) + 1 for out in held for text in out)


def test_token_files_are_mixed_and_held_out_at_their_ends(tmp_path, write):
    """A token file beside a text: the last tenth of its tokens from a document's start on; max_doc_len is
    for the text alone.
    """
    data = mixed(tmp_path, token_file(tmp_path / "a.bin", A), write("b.txt", B), max_doc_len=6)
    train, val = train_files(data, needed=2), val_file(data)
    assert text_of(train[0]) + text_of(val)[: 40 - len(text_of(train[0]))] == A
    assert set(text_of(train[1])) == {"second"}


def test_settings_for_text_are_refused_where_all_sources_are_token_files(tmp_path):
    data = mixed(
        tmp_path,
        token_file(tmp_path / "a.bin", A),
        token_file(tmp_path / "b.bin", B),
        max_doc_len=6,
    )
    message = (
        "data.max_doc_len: does not apply to the token file data.mix[0].dataset. Remove it, or: "
    )
    with pytest.raises(UserError) as caught:
        train_files(data, needed=2)
    assert (
        str(caught.value) == message + "Give the text that it was made from as data.mix[0].dataset."
    )


def test_a_validation_source_of_its_own_leaves_the_sources_whole(tmp_path, write):
    """Its text is read by the settings for text, also where the first source is a token file and has no use
    for them.
    """
    (tmp_path / "val.txt").write_text("one|two", encoding="utf-8")
    data = mixed(
        tmp_path,
        token_file(tmp_path / "a.bin", A),
        write("b.txt", B),
        val_dataset=str(tmp_path / "val.txt"),
        document_separator="|",
    )
    assert text_of(val_file(data)) == ["one", "two"]
    assert text_of(train_files(data, needed=2)[0]) == A


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            "none.txt",
            "data.mix[1].dataset: none.txt: not found in {cwd}. Give a file, a folder, a glob, or a Hugging "
            "Face name written owner/name.",
        ),
        ("none.bin", "none.bin: not found in {cwd}. Give the path of a file that can be read."),
    ],
)
def test_a_source_that_is_not_there_is_named_with_its_number(
    tmp_path, write, second, message, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data = mixed(tmp_path, write("a.txt", A), second)
    for read in (
        lambda: train_files(data, needed=2),
        lambda: val_file(data),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert str(caught.value) == message.format(cwd=tmp_path)


def test_a_source_shorter_than_a_row_is_named_with_both_counts(tmp_path, write):
    """E2: 30 documents of 9 or 10 characters and an EOS each are fewer than 1000 tokens."""
    data = mixed(tmp_path, write("a.txt", A * 10), write("b.txt", B))
    with pytest.raises(
        UserError,
        match=r"^data.mix\[1\].dataset: .*b.txt gives \d+ training tokens, and one row of "
        r"training.seq_len needs 1000. Give ",
    ):
        train_files(data, needed=1000)


def test_sources_and_shares_are_in_the_fingerprint(tmp_path, write):
    """A10: another weight, another order, another text; the same shares written otherwise are the same."""
    a, b = write("a.txt", A), write("b.txt", B)

    def fingerprint(*parts: tuple[str, float]) -> str:
        data = DataConfig(
            mix=tuple(MixPart(dataset=dataset, weight=weight) for dataset, weight in parts),
            cache_dir=str(tmp_path / "cache"),
        )
        weights = [part.weight for part in data.mix]
        files = train_files(data, needed=2)
        return mixture_fingerprint(weights, [file.fingerprint for file in files])

    one = fingerprint((a, 3), (b, 1))
    assert one.startswith("3/4 ") and " + 1/4 " in one
    assert one == fingerprint((a, 0.3), (b, 0.1))
    write("c.txt", [*A[:-1], "other"])
    others = {
        fingerprint((a, 2), (b, 1)),
        fingerprint((b, 3), (a, 1)),
        fingerprint((str(tmp_path / "c.txt"), 3), (b, 1)),
        fingerprint((a, 3)),
        one,
    }
    assert len(others) == 5


def test_a_message_calls_a_mixture_by_its_sources_and_shares():
    data = DataConfig(mix=(MixPart(dataset="a.txt", weight=3), MixPart(dataset="b\x1b.txt")))
    assert printable(name_of(data)) == r"mix of a.txt (75.0%), b\x1b.txt (25.0%)"
    assert name_of(DataConfig(dataset="a.txt")) == "a.txt"


# --- documents of several sources -------------------------------------------------------------------------------------


def test_a_document_that_is_in_validation_and_in_any_source_is_counted_once(tmp_path, write):
    """E13: of the five validation documents one is in both sources, one in the first, one in the second."""
    val = write("val.txt", ["first 0", "both", "second 0", "alone", "too"])
    data = mixed(
        tmp_path, write("a.txt", [*A, "both"]), write("b.txt", [*B, "both"]), val_dataset=val
    )
    assert overlap_of(data, SEED).found == 3
    assert (
        overlap_of(mixed(tmp_path, token_file(tmp_path / "a.bin", A), val_dataset=val), SEED).found
        == 0
    ), "a token file has no documents to compare"
    assert (
        overlap_of(
            mixed(
                tmp_path, token_file(tmp_path / "a.bin", A), data.mix[1].dataset, val_dataset=val
            ),
            SEED,
        ).found
        == 2
    )


def test_documents_in_several_sources_are_on_one_side_of_the_split(tmp_path, write):
    """Held out by content: a document that two sources have is for training in both or for validation in both."""
    data = mixed(tmp_path, write("a.txt", A), write("b.txt", A[::-1]), val_fraction=0.3)
    train = {text for file in train_files(data, needed=2) for text in text_of(file)}
    val = set(text_of(val_file(data)))
    assert train and val and not train & val
    assert overlap_of(data, SEED).found == 0


def test_tokenizers_learn_from_all_sources_in_turn(tmp_path, write):
    """The first documents are of both sources, so that learn_docs does not stop inside the first; held-out
    ones are skipped.
    """
    data = mixed(tmp_path, write("a.txt", A), write("b.txt", B), val_fraction=0.1)
    documents = list(training_split(data, SEED).documents())
    expected = [[text for text in texts if not is_held_out(text, 0.1, SEED)] for texts in (A, B)]
    assert sorted(documents) == sorted(expected[0] + expected[1])
    assert {text.split()[0] for text in documents[:3]} == {"first", "second"}
    char = learn_from_documents(TokenizerConfig(kind="char"), data, SEED)
    assert char.decode(char.encode("first second 0123456789")) == "first second 0123456789"
    bpe = learn_from_documents(TokenizerConfig(kind="bpe", vocab_size=270), data, SEED)
    assert bpe.vocab_size == 270
    assert bpe.decode(bpe.encode("first second")) == "first second"


def test_no_tokenizer_learns_from_a_token_file(tmp_path, write):
    data = mixed(tmp_path, write("a.txt", A), token_file(tmp_path / "b.bin", B))
    with pytest.raises(
        UserError,
        match=r"^data.mix\[1\].dataset: .*b.bin is a token file, whose documents cannot be read again",
    ):
        learn_from_documents(TokenizerConfig(kind="char"), data, SEED)


def test_a_bare_array_validates_a_mixture_of_texts(tmp_path, write):
    """Its dtype is that of the settings, though no part of the mixture is such a file."""
    np.array([97, BYTES.eos_id], dtype=np.uint16).tofile(tmp_path / "val.bin")
    data = mixed(
        tmp_path,
        write("a.txt", A),
        write("b.txt", B),
        val_dataset=str(tmp_path / "val.bin"),
        token_dtype="uint16",  # noqa: S106  (no password)
    )
    assert val_file(data).tokens.tolist() == [97, BYTES.eos_id]
