"""UserError: its fields, its one line, and the helpers that turn other errors into it."""

import errno
import gzip
import os
import pickle
import re
from pathlib import Path

import pytest

from tinylm.common.errors import UserError, first_line, not_found, rename_settings, require_package
from tinylm.common.files import reading, require_regular, writing


def error_of(*fields: object) -> UserError:
    """The error that `rename_settings` makes of one with these fields."""
    names = {"data.dataset": "--data", "data.split": "--split"}
    with pytest.raises(UserError) as caught, rename_settings(names):
        raise UserError(*fields)
    return caught.value


def test_the_fields_are_one_line() -> None:
    error = UserError(("a.yaml:2", "training.lr"), "must be above 0, got -1", "Set it to 3e-4")
    assert error.where == ("a.yaml:2", "training.lr")
    assert (error.problem, error.fix) == ("must be above 0, got -1", "Set it to 3e-4")
    assert str(error) == "a.yaml:2: training.lr: must be above 0, got -1. Set it to 3e-4."


@pytest.mark.parametrize("end", [".", "?", "!", "…"])
def test_a_sentence_that_has_an_end_gets_no_second_one(end: str) -> None:
    assert str(UserError("a", f"b{end}", f"c{end}")) == f"a: b{end} c{end}"


def test_control_characters_are_escaped_in_every_field() -> None:
    error = UserError("a\x1b[1m", "b\n", "Set {} to \u202e", "c\r")
    assert str(error) == r"a\x1b[1m: b\n. Set c\r to \u202e."


def test_a_fix_without_settings_may_have_braces() -> None:
    assert str(UserError("a", "b", "Write model: {n_layers: 4}")) == (
        "a: b. Write model: {n_layers: 4}."
    )


def test_a_setting_is_renamed_only_as_a_whole_part() -> None:
    """A path, a problem and a longer key that contain the name of a setting keep it."""
    where = ("data.dataset", "data.dataset_config", "my/data.dataset")
    error = error_of(where, "data.dataset", "Check {} and {}", "data.split", "data.splits")
    assert error.where == ("--data", "data.dataset_config", "my/data.dataset")
    assert error.problem == "data.dataset"
    assert error.fix == "Check --split and data.splits"


def test_renaming_happens_at_each_level() -> None:
    """A part of a mixture is renamed first, and then is no longer the setting of the outer level."""
    with pytest.raises(UserError) as caught, rename_settings({"data.dataset": "--data"}):  # noqa: SIM117
        with rename_settings({"data.dataset": "data.mix[1].dataset"}):
            raise UserError("data.dataset", "not found")
    assert str(caught.value) == "data.mix[1].dataset: not found."


def test_within_adds_context_and_keeps_the_settings_of_the_fix() -> None:
    inner = UserError("a.jsonl", "no such key", "Set {}", "data.split")
    assert str(inner.within("b", "c")) == "b: c: a.jsonl: no such key. Set data.split."
    assert str(inner.within("b", fix="Try")) == "b: a.jsonl: no such key. Try."
    assert str(inner.within("b").renamed({"data.split": "--split"})) == (
        "b: a.jsonl: no such key. Set --split."
    )


class DamagedError(UserError):
    """Stands for the kinds of UserError that other modules have."""


def test_the_type_of_the_error_is_kept() -> None:
    error = DamagedError("data.dataset", "damaged")
    assert type(error.within("a")) is DamagedError
    assert type(error.renamed({"data.dataset": "--data"})) is DamagedError


def test_an_error_passes_through_another_process() -> None:
    error = UserError(("a", "b"), "problem", "Set {}", "data.split")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert str(copy.renamed({"data.split": "--split"})) == "a: b: problem. Set --split."


def test_a_refused_write_names_the_path_and_the_setting() -> None:
    with pytest.raises(UserError) as caught, writing("a.bin", "data.cache_dir"):
        raise OSError(28, "No space left on device")
    assert str(caught.value) == (
        "a.bin: cannot be written: No space left on device. "
        "Free disk space or change data.cache_dir."
    )
    assert (
        caught.value.renamed({"data.cache_dir": "--out"}).fix == "Free disk space or change --out"
    )


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "Free disk space or change --out"),
        (errno.EDQUOT, "Free disk space or change --out"),
        (errno.EFBIG, "Raise the limit with `ulimit -f unlimited`, or change --out"),
        (errno.EMFILE, "Close other programs, or raise the limit with `ulimit -n 4096`"),
        (errno.ENFILE, "Close other programs, or raise the limit with `ulimit -n 4096`"),
        (errno.EACCES, "Get the permission to write there, or change --out"),
        (errno.EROFS, "Change --out to a folder that can be written"),
        (errno.EIO, "Check the disk, or change --out"),
        (errno.ENAMETOOLONG, "Shorten --out"),
        (errno.ENOTDIR, "Change --out, or move the file that is there"),
        (errno.EISDIR, "Change --out, or move the folder that is there"),
        (errno.ELOOP, "Change --out"),
    ],
)
def test_a_refused_write_has_the_fix_of_its_cause(number: int, fix: str) -> None:
    with pytest.raises(UserError) as caught, writing("/none/a.bin", "--out"):
        raise OSError(number, None)
    assert str(caught.value) == f"/none/a.bin: cannot be written: {os.strerror(number)}. {fix}."


def test_a_write_that_ended_without_a_reason_says_what_is_free(tmp_path: Path) -> None:
    """NumPy's tofile raises an OSError without a number, safetensors an error of its own."""
    with pytest.raises(UserError) as caught, writing(tmp_path / "a.gguf", "OUT"):
        raise OSError("128 requested and 16 written")
    assert re.fullmatch(
        rf"{tmp_path}/a.gguf: cannot be written: the disk did not take all of it "
        r"\([\d,]+ bytes are free there\)\. Free disk space or change OUT\.",
        str(caught.value),
    )


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.EMFILE, "Close other programs, or raise the limit with `ulimit -n 4096`"),
        (errno.EACCES, "Get the permission to read it"),
        (errno.EIO, "Check the disk, or restore the file from a backup"),
        (errno.ELOOP, "Give the path of a file that can be read"),
    ],
)
def test_a_refused_read_has_the_fix_of_its_cause(number: int, fix: str) -> None:
    with pytest.raises(UserError) as caught, reading("a.txt"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == f"a.txt: {os.strerror(number)}. {fix}."


def test_a_missing_relative_path_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not_found("a/b.txt") == f"not found in {tmp_path}"
    assert not_found(tmp_path / "b.txt") == "not found"
    with pytest.raises(UserError) as caught:
        require_regular("b.txt")
    assert str(caught.value) == (
        f"b.txt: not found in {tmp_path}. Give the path of a file that can be read."
    )
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert not_found("b.txt") == "not found: the working folder was deleted"
    monkeypatch.chdir(tmp_path)


def test_an_error_that_is_not_the_operating_systems_is_no_refused_write() -> None:
    """requests' ConnectionError is an OSError without an errno."""
    with pytest.raises(ConnectionError, match="hub"), writing("a.bin", "data.cache_dir"):
        raise ConnectionError("hub")


def test_a_missing_file_and_a_truncated_one_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    with pytest.raises(UserError) as caught, reading(path):
        path.read_bytes()
    assert str(caught.value) == f"{path}: not found. Give the path of a file that can be read."
    path.write_bytes(gzip.compress(b"text" * 100)[:-9])
    with pytest.raises(UserError) as caught, reading(path), gzip.open(path) as file:
        file.read()
    assert caught.value.problem is not None
    assert caught.value.problem.startswith("damaged or truncated gzip data (")
    assert caught.value.fix == "Download or compress it again"


def test_only_a_regular_file_is_one(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        require_regular(tmp_path / "a")
    assert str(caught.value) == (
        f"{tmp_path / 'a'}: not found. Give the path of a file that can be read."
    )
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError) as caught:
            require_regular(path)
        assert str(caught.value) == (
            f"{path}: not a regular file. Give the path of a file on disk."
        )


def test_a_missing_package_is_named_with_its_command() -> None:
    require_package("pytest")
    with pytest.raises(UserError) as caught:
        require_package("no_such_package")
    assert str(caught.value) == (
        "no_such_package: this package is needed and is not installed. pip install no_such_package."
    )


def test_the_first_line_of_a_foreign_message() -> None:
    """Without the final period, since it becomes a part of a sentence; the type if there is no message."""
    assert first_line(ValueError("\nbad \x1b[1m header.\nmore")) == r"bad \x1b[1m header"
    assert first_line(KeyError()) == "KeyError"
