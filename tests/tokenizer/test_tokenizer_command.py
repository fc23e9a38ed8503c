"""`python -m tinylm tokenizer`: train, compare, show."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinylm.__main__ import main
from tinylm.config.schema import TokenizerConfig
from tinylm.text.documents import text_chunks
from tinylm.tokenizer import bpe_fast
from tinylm.tokenizer.bpe_fast import learn_bpe
from tinylm.tokenizer.factory import make_tokenizer
from tinylm.tokenizer.fit import measure_fit
from tinylm.tokenizer.hf_files import load_hf_tokenizer
from tinylm.tokenizer.pretokenize import Pretokenizer

ROOT = Path(__file__).parents[2]


def test_a_text_with_too_few_words_gives_a_smaller_vocabulary(tmp_path, capsys):
    """E15: `low` allows two merges."""
    (tmp_path / "a.txt").write_text("low low", encoding="utf-8")
    assert (
        main(
            [
                "tokenizer",
                "train",
                "--data",
                str(tmp_path / "a.txt"),
                "--out",
                str(tmp_path / "mine"),
                "--vocab-size",
                "1000",
            ]
        )
        == 0
    )
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path}/mine\n"
    assert (
        "vocabulary: 260 tokens instead of 1000: every word of this text is already one token\n"
        in shown.err
    )
    assert load_hf_tokenizer(str(tmp_path / "mine")).vocab_size == 260


def test_train_does_not_replace_what_is_there(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "vocab.json").write_text("{}", encoding="utf-8")
    assert (
        main(
            [
                "tokenizer",
                "train",
                "--data",
                "nowhere.txt",
                "--out",
                str(tmp_path / "mine"),
                "--vocab-size",
                "1000",
            ]
        )
        == 2
    )
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path}/mine: already exists. Delete it, or choose another folder.\n"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["--processes", "0"],
            "error: --processes: must be at least 1, got 0. Give a whole number from 1.\n",
        ),
        (
            ["--vocab-size", "9"],
            "error: --vocab-size: must be at least 257 (256 bytes and 1 special token), got 9. Raise it.\n",
        ),
        (
            ["--data", "no.txt"],
            "error: --data: no.txt: not found in {cwd}. Give a file, a folder, a glob, or a dataset on the "
            "hub written hf:owner/name.\n",
        ),
    ],
)
def test_train_names_what_is_wrong(tmp_path, capsys, change, message):
    given = [
        "--data",
        str(ROOT / "data/tiny_corpus.txt"),
        "--out",
        str(tmp_path / "mine"),
        "--vocab-size",
        "300",
    ]
    assert main(["tokenizer", "train", *given, *change]) == 2
    assert capsys.readouterr().err == message.replace("{cwd}", os.getcwd())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["--vocab-size", "100000000000"],
            "--vocab-size: must be at most 2147483647, got 100000000000. Lower it, for example to 32000.",
        ),
        (
            ["--pattern", "x*"],
            "--pattern: x* matches the empty text, but a word has at least one character. Write gpt2, "
            "gpt4, qwen2, or a regular expression whose matches are the words, such as "
            r"' ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+'.",
        ),
        (
            ["--special", "a"],
            "--special: a: must be two or more visible characters. Choose another, such as <|endoftext|>.",
        ),
        (["--docs", "0"], "--docs: must be at least 1, got 0. Give a whole number from 1."),
        (["--separator", ""], "--separator: is empty. Give the text that separates documents."),
        (
            ["--text-field", "body"],
            "a.jsonl:1: body: missing; the row has text. Correct the row, or set --text-field to "
            "the key that holds the text.",
        ),
        (
            ["--out", "a.jsonl/mine"],
            "a.jsonl/mine: cannot be written: File exists. Change --out, or move the file that is there.",
        ),
        (
            ["--out", "a.jsonl/b/mine"],
            "a.jsonl/b/mine: cannot be written: Not a directory. Change --out, or move the file that is there.",
        ),
    ],
)
def test_train_names_the_flag_before_it_learns(tmp_path, capsys, monkeypatch, change, message):
    """All but the row are known before any word is counted: with a count that fails the messages are the same."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"text": "low low"}\n', encoding="utf-8")
    if "--text-field" not in change:
        monkeypatch.setattr(bpe_fast, "count_words_of", None)
    given = ["--data", "a.jsonl", "--out", "mine", "--vocab-size", "300"]
    assert main(["tokenizer", "train", *given, *change]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def learned(tmp_path: Path, *flags: str) -> list[str]:
    """The merges that `tokenizer train` writes, `l ow` for example."""
    assert (
        main(["tokenizer", "train", "--out", str(tmp_path / "mine"), "--vocab-size", "270", *flags])
        == 0
    )
    return (tmp_path / "mine" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]


def test_train_reads_documents_as_encode_does(tmp_path, monkeypatch):
    """A column of another name; the first documents alone; texts between separators, whose letters are in no merge."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"body": "low"}\n{"body": "abab"}\n', encoding="utf-8")
    assert learned(tmp_path / "1", "--data", "a.jsonl", "--text-field", "body", "--docs", "1") == [
        "o w",
        "l ow",
    ]
    Path("a.txt").write_text("low##low##abab", encoding="utf-8")
    assert learned(tmp_path / "2", "--data", "a.txt", "--separator", "##", "--docs", "2") == [
        "o w",
        "l ow",
    ]
    assert learned(tmp_path / "3", "--data", "a.txt", "--separator", "##") == [
        "o w",
        "l ow",
        "a b",
        "ab ab",
    ]
    assert "# #" in learned(tmp_path / "4", "--data", "a.txt")


@pytest.fixture
def stream(monkeypatch) -> list[tuple]:
    """A dataset on the hub with documents without end in `body`; what was asked for."""
    asked: list[tuple] = []

    class Stream:
        column_names = None

        def __iter__(self):
            yield {"body": "low"}
            while True:
                yield {"body": "abab"}

    def serve(name: str, config: str | None, *, split: str, streaming: bool) -> Stream:
        asked.append((name, config, split, streaming))
        return Stream()

    monkeypatch.setattr("datasets.load_dataset", serve)
    monkeypatch.setattr("tinylm.text.hub_dataset.require_hub", lambda where, fix: None)
    return asked


def test_train_and_compare_take_a_dataset_on_the_hub(tmp_path, stream, capsys):
    """Three documents: `low` and `abab` twice, 11 bytes."""
    given = ("--data", "hf:owner/name:en:validation", "--text-field", "body", "--docs", "3")
    assert learned(tmp_path, *given) == ["a b", "ab ab", "o w", "l ow"]
    assert main(["tokenizer", "compare", "byte", *given]) == 0
    *_, row = capsys.readouterr().out.splitlines()
    assert row.split()[2] == "11"
    assert stream == [("owner/name", "en", "validation", True)] * 2


def test_a_stream_that_breaks_off_while_learning_is_to_be_tried_again(
    tmp_path, monkeypatch, capsys
):
    """Nothing is kept, so the message does not offer to resume."""

    def broken(*args, **kwargs):
        yield {"text": "low"}
        raise OSError("cable")

    class Stream:
        column_names, __iter__ = None, broken

    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: Stream())
    monkeypatch.setattr("tinylm.text.hub_dataset.require_hub", lambda where, fix: None)
    assert (
        main(
            [
                "tokenizer",
                "train",
                "--data",
                "hf:owner/name",
                "--out",
                str(tmp_path / "mine"),
                "--vocab-size",
                "300",
            ]
        )
        == 2
    )
    assert (
        capsys.readouterr().err == "error: owner/name (train): reading stopped: cable. Try again.\n"
    )


def test_show_prints_tokens_and_ids_and_no_escape(tmp_path, capsys):
    r"""`low` is token 257 (o w, then l ow); `é` two bytes; the escape of the user's text is shown, not sent."""
    learn_bpe(text_chunks(["low", "low"]), 260, Pretokenizer()).save(tmp_path / "mine")
    assert main(["tokenizer", "show", str(tmp_path / "mine"), "lowé[b]\x1b"]) == 0
    assert (
        capsys.readouterr().out
        == "low|\\xc3|\\xa9|[|b|]|\\x1b\n257 195 169 91 98 93 27\n7 tokens, 9 bytes, 1.29 bytes per token\n"
    )


def test_compare_prints_a_table(tmp_path, capsys):
    """`low low`: 7 bytes in 3 tokens (low, space, low); 2 of 260 are used."""
    learn_bpe(text_chunks(["low", "low"]), 260, Pretokenizer()).save(tmp_path / "mine")
    (tmp_path / "a.txt").write_text("low low", encoding="utf-8")
    assert (
        main(
            [
                "tokenizer",
                "compare",
                str(tmp_path / "mine"),
                "byte",
                "--data",
                str(tmp_path / "a.txt"),
            ]
        )
        == 0
    )
    text, _, *rows = capsys.readouterr().out.splitlines()
    assert text == f"text: {tmp_path / 'a.txt'}"
    assert [row.split()[1:] for row in rows] == [
        ["260", "3", "2.333", "2", "(1%)", "'low'", "'", "'"],
        ["260", "7", "1.000", "4", "(2%)", "'", "'", "'l'", "'o'"],
    ]


def test_compare_shows_those_it_has_and_names_each_that_it_has_not(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("low low", encoding="utf-8")
    assert (
        main(["tokenizer", "compare", "./none", "byte", "./nor", "--data", str(tmp_path / "a.txt")])
        == 2
    )
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["text:", "tokenizer", "byte"]
    fix = "Give a folder with tokenizer.json, or a Hugging Face name such as gpt2."
    problem = f"not found in {os.getcwd()}. {fix}"
    assert shown.err == f"error: TOKENIZER: ./none: {problem}\nerror: TOKENIZER: ./nor: {problem}\n"
    assert main(["tokenizer", "compare", "./none", "--data", str(tmp_path / "a.txt")]) == 2
    assert capsys.readouterr().out == ""


def test_show_names_its_argument(capsys):
    assert main(["tokenizer", "show", "./none", "text"]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: TOKENIZER: ./none: not found in {os.getcwd()}. Give a folder"
    )


def test_compare_without_text_is_an_error(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("", encoding="utf-8")
    assert main(["tokenizer", "compare", "byte", "--data", str(tmp_path / "a.txt")]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path}/a.txt: contains no text. Give a file with text.\n"
    )


def test_fit_counts_bytes_tokens_and_used_ones():
    fit = measure_fit(make_tokenizer(TokenizerConfig()), ["aé", "a"])
    assert (fit.n_bytes, fit.n_tokens, fit.n_used, fit.longest) == (4, 4, 3, [97, 169, 195])


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_leaves_nothing(small_text, tmp_path, processes):
    """Of a corpus of half a gigabyte: no half folder; the program says what stopped it."""
    (tmp_path / "text.txt").write_text(small_text * 40, encoding="utf-8", newline="")
    command = [
        sys.executable,
        "-m",
        "tinylm",
        "tokenizer",
        "train",
        "--data",
        *[str(tmp_path / "text.txt")] * 100,
    ]
    command += ["--out", str(tmp_path / "mine"), "--vocab-size", "30000", "--processes", processes]
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as program:
        time.sleep(2.5)
        os.killpg(program.pid, signal.SIGINT)
        error = program.communicate(timeout=30)[1]
    assert (program.returncode, error, [path.name for path in tmp_path.iterdir()]) == (
        130,
        "\nstopped by Ctrl-C\n",
        ["text.txt"],
    )
