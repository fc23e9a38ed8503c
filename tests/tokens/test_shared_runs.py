"""Validation documents inside the training text are found by runs of tokens, and no others."""

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import write_token_file
from tinylm.tokenizer.byte_char import ByteTokenizer
from tinylm.tokens.shared_runs import note_on_validation, run_hashes, shared_documents
from tinylm.tokens.token_file import TokenFile

BYTES = ByteTokenizer()


def token_file(path: Path, texts: list[str]) -> TokenFile:
    write_token_file(path, texts, BYTES)
    return TokenFile.open(path)


def random_text(rng: np.random.Generator, n: int) -> str:
    return "".join(map(chr, rng.integers(97, 123, n)))


def test_a_hash_depends_on_the_tokens_of_its_run_alone() -> None:
    """The same 20 tokens at places 7 and 300 of an array have one hash; all others differ."""
    tokens = np.random.default_rng(0).integers(0, 50_000, 400).astype(np.uint16)
    tokens[300:320] = tokens[7:27]
    hashes = run_hashes(tokens, 20)
    assert hashes[300] == hashes[7]
    assert len(np.unique(hashes)) == len(hashes) - 1 == 380
    assert len(run_hashes(tokens[:19], 20)) == 0


def test_documents_that_are_mostly_in_training_are_counted(tmp_path: Path) -> None:
    """Of five documents of 300 bytes one is inside a longer training document, one has 250 of its
    bytes there, one 150, one none; the last is too short for a run of 80 bytes.
    """
    rng = np.random.default_rng(1)
    texts = [random_text(rng, 300) for _ in range(4)]
    train = [
        random_text(rng, 500) + texts[0] + random_text(rng, 500),
        random_text(rng, 100) + texts[1][:250],
        texts[2][:150] + random_text(rng, 2000),
        "too short",
    ]
    files = [
        token_file(tmp_path / f"{i}.bin", part) for i, part in enumerate((train[:2], train[2:]))
    ]
    val = [
        token_file(tmp_path / "val.bin", texts),
        token_file(tmp_path / "val2.bin", ["too short"]),
    ]
    assert shared_documents(files, val) == (2, 4, 80)
    assert note_on_validation(files, val) == (
        "warning: 2 of 4 validation documents are in the training text for at least half of their "
        "length, by runs of 80 tokens; val_loss looks better than it is. python -m tinylm data clean "
        "removes near duplicates"
    )
    assert note_on_validation([files[1]], val) is None


@pytest.mark.parametrize("block", [100, 97])
def test_runs_across_the_blocks_that_are_read_are_found(tmp_path, monkeypatch, block) -> None:
    monkeypatch.setattr("tinylm.tokens.shared_runs.BLOCK", block)
    rng = np.random.default_rng(2)
    text = random_text(rng, 400)
    train = token_file(tmp_path / "train.bin", [random_text(rng, 333) + text])
    val = token_file(tmp_path / "val.bin", [text, random_text(rng, 400)])
    assert shared_documents([train], [val]) == (1, 2, 80)


@pytest.mark.slow
def test_a_run_warns_once_of_validation_text_in_the_training_text(
    make_config, tmp_path, capfd
) -> None:
    """At the first of two validations; the documents differ in their first word alone, so that the
    split by content cannot hold them together.
    """
    import train

    text = random_text(np.random.default_rng(3), 200)
    path = tmp_path / "alike.txt"
    path.write_text("".join(f"{i} {text}\n" for i in range(40)), encoding="utf-8")
    config = make_config(
        data={"dataset": str(path), "val_fraction": 0.2},
        training={"max_steps": 2, "val_every_steps": 1},
    )
    assert train.main(["--config", str(config)]) == 0
    lines = capfd.readouterr().err.splitlines()
    warnings = [line for line in lines if "are in the training text" in line]
    assert len(warnings) == 1
    n = int(warnings[0].split()[1])
    assert warnings[0].startswith(
        f"warning: {n} of {n} validation documents are in the training text"
    )
