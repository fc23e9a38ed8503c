"""The order of data is a pure function of (seed, k), in every process."""

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import eval_val
import finetune
import train
from data import PretrainData, RankShare
from tests import programs
from tests.conftest import val_documents
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint import load as checkpoint_load
from tinylm.checkpoint.info import describe
from tinylm.common.errors import UserError
from tinylm.config.loader import load_config
from tinylm.config.schema import Config
from tinylm.rows.inspect import InspectedRow
from tinylm.text.data_source import train_documents
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.byte_char import ByteTokenizer
from tinylm.tokenizer.factory import make_tokenizer
from tinylm.tokens.packing import IGNORE_INDEX, Batch
from tinylm.tokens.stream import Cursor, StreamDataset
from training.show_rows import print_rows


@pytest.fixture
def load(make_config: Callable[..., Path]) -> Callable[..., tuple[Config, Tokenizer]]:
    """A config with these settings, and its byte tokenizer."""

    def load(**sections: dict) -> tuple[Config, Tokenizer]:
        config = load_config(make_config(**sections))
        return config, make_tokenizer(config.tokenizer)

    return load


def prepared(
    config: Config, tokenizer: Tokenizer, first: int = 0, cursor: list[int] | None = None
) -> PretrainData:
    """The data of a run that begins at micro-batch `first`."""
    data = PretrainData(config, tokenizer)
    data.prepare()
    data.start_at(first, cursor)
    return data


def batches_of(data: PretrainData) -> list[Batch]:
    """Every batch of the run, through its loader."""
    return list(data.train_dataloader())


def equal(a: Batch, b: Batch) -> bool:
    """Whether two batches hold the same numbers."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


@pytest.fixture
def mix(tmp_path: Path, corpus: Path) -> dict[str, Any]:
    """Settings of a mixture: the corpus with weight 1, and a second text, of other characters, with weight 2."""
    other = tmp_path / "other.txt"
    other.write_text(
        "".join(f"{i} {'XYZ'[i % 3] * (i % 17)}\n" for i in range(90)), encoding="utf-8"
    )
    return {"mix": [{"dataset": str(corpus)}, {"dataset": str(other), "weight": 2}]}


STREAM = {"streaming": True, "shuffle_window": 8}


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"order": "random"},
        {"order": "sequential"},
        {"stride": 5},
        STREAM,
        STREAM | {"order": "sequential"},
    ],
)
@pytest.mark.parametrize("first", [1, 5])
def test_a_resumed_loader_gives_what_the_uninterrupted_one_gave(
    load: Any, kind: dict, first: int
) -> None:
    """From micro-batch `first` on, for a token file by its number alone, for a stream by the cursor of the
    batch before.
    """
    config, tokenizer = load(data=kind, training={"max_steps": 12})
    whole = batches_of(prepared(config, tokenizer))
    cursor = whole[first - 1].get("cursor")
    resumed = batches_of(prepared(config, tokenizer, first, cursor))
    assert len(whole) == 12
    assert len(resumed) == 12 - first
    assert all(equal(a, b) for a, b in zip(whole[first:], resumed, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["shuffled", "random", "sequential"])
@pytest.mark.parametrize("first", [1, 300])
def test_a_resumed_mixture_gives_what_the_uninterrupted_one_gave(
    load: Any, mix: dict, order: str, first: int
) -> None:
    """Also after the first block of 1024 rows, which is 256 micro-batches of 4."""
    config, tokenizer = load(data=mix | {"order": order}, training={"max_steps": 301})
    whole, resumed = (
        batches_of(prepared(config, tokenizer)),
        batches_of(prepared(config, tokenizer, first)),
    )
    assert len(whole) == 301
    assert len(resumed) == 301 - first
    assert all(equal(a, b) for a, b in zip(whole[first:], resumed, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, STREAM, "mix"])
def test_the_number_of_workers_does_not_matter(load: Any, kind: dict | str, mix: dict) -> None:
    """A6: 0, 1 and 2 processes give the same batches in the same order."""
    runs = []
    kind = mix if isinstance(kind, str) else kind
    for workers in (0, 1, 2):
        config, tokenizer = load(data=kind | {"num_workers": workers}, training={"max_steps": 9})
        runs.append(batches_of(prepared(config, tokenizer)))
    assert len(runs[0]) == 9
    for other in runs[1:]:
        assert all(equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_each_pass_is_a_permutation_of_all_rows(load: Any, order: str) -> None:
    """A4, A5: with R rows and batches of 4, any R places in a row that begin a pass hold each row once."""
    config, tokenizer = load(data={"order": order})
    data = prepared(config, tokenizer)
    assert data.train_files
    batches = data.train_dataset(RankShare(4))
    rows = len(batches.rows)
    assert rows % 4, "a pass must end inside a batch, or the test proves less"
    origins = [start // 16 for k in range(3 * rows // 4 + 1) for start in batches[k]["origin"]]
    passes = [origins[p * rows : (p + 1) * rows] for p in range(3)]
    assert all(sorted(one) == list(range(rows)) for one in passes)
    assert (passes[0] != passes[1]) == (order == "shuffled")


def test_passes_are_counted_in_rows_of_the_data(load: Any) -> None:
    """A permutation has every row once; random rows are a pass when they have all tokens; a stream
    has no known length.
    """
    [data, random, stream] = [
        prepared(*load(data=settings)) for settings in ({}, {"order": "random"}, STREAM)
    ]
    n_tokens, seq_len = len(data.train_files[0]), data.config.training.seq_len
    assert data.source_rows == [-(-(n_tokens - 1) // seq_len)] == [len(data.train_dataset().rows)]
    assert random.source_rows == [n_tokens / seq_len]
    assert stream.source_rows == []


@pytest.mark.slow
def test_metrics_and_checkpoints_say_how_often_the_data_were_seen(
    make_config: Any, tmp_path: Path
) -> None:
    config = make_config()
    assert train.main(["--config", str(config)]) == 0
    training = load_config(config).training
    rows = training.max_steps * training.micro_batch_size * training.grad_accum_steps
    expected = rows / sum(prepared(load_config(config), ByteTokenizer()).source_rows)
    last = (tmp_path / "logs" / "tiny" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    cells = dict(zip(last[0].split(","), last[-1].split(","), strict=True))
    assert float(cells["passes"]) == pytest.approx(expected)
    assert describe(tmp_path / "checkpoints" / "final.ckpt").passes == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_each_source_of_a_mixture_goes_through_its_own_passes(
    load: Any, mix: dict, order: str
) -> None:
    """A4, A5: of 4096 rows each third is of the first source, to less than a row a block; the R rows of a
    source are all there in its every pass.
    """
    config, tokenizer = load(data=mix | {"order": order})
    data = prepared(config, tokenizer)
    batches = data.train_dataset(RankShare(4))
    origins = [origin for k in range(1024) for origin in batches[k]["origin"]]
    taken = [[start // 16 for source, start in origins if source == wanted] for wanted in (0, 1)]
    assert [len(rows) for rows in taken] == [1365, 4096 - 1365]  # 4096 / 3 = 1365.33
    for rows, source in zip(taken, batches.rows.sources, strict=True):
        n = len(source)
        assert len(rows) > 3 * n, "there must be passes to compare"
        passes = [rows[p * n : (p + 1) * n] for p in range(3)]
        assert all(sorted(one) == list(range(n)) for one in passes)
        assert (passes[0] != passes[1]) == (order == "shuffled")


def test_the_rows_of_a_mixture_are_those_of_the_source_that_is_said(load: Any, mix: dict) -> None:
    """The texts share no letter: a row has capitals where it is of the second source, and there alone."""
    config, tokenizer = load(data=mix, training={"max_steps": 20})
    batches = batches_of(prepared(config, tokenizer))
    for batch in batches:
        for ids, (source, _) in zip(batch["input_ids"], batch["origin"], strict=True):
            letters = [
                character for character in tokenizer.decode(ids.tolist()) if character.isalpha()
            ]
            assert not letters or all(character.isupper() == (source == 1) for character in letters)
    assert {source for batch in batches for source, _ in batch["origin"]} == {0, 1}


@pytest.mark.parametrize("order", ["shuffled", "random", "sequential"])
def test_a_mixture_of_one_source_is_the_run_of_that_source(
    load: Any, corpus: Path, order: str
) -> None:
    """So runs from before there were mixtures go on exactly: a single source is dealt every place, and draws
    the same numbers.
    """
    runs = []
    for kind in ({}, {"mix": [{"dataset": str(corpus), "weight": 7}]}):
        config, tokenizer = load(data={"order": order} | kind, training={"max_steps": 60})
        runs.append(batches_of(prepared(config, tokenizer)))
    assert all(equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("order", ["shuffled", "random"])
def test_sources_of_equal_length_have_orders_of_their_own(
    load: Any, corpus: Path, order: str
) -> None:
    """A text mixed with itself: its two copies are not read side by side."""
    config, tokenizer = load(
        data={"order": order, "mix": [{"dataset": str(corpus)}, {"dataset": str(corpus)}]}
    )
    data = prepared(config, tokenizer)
    batches = data.train_dataset(RankShare(4))
    origins = [origin for k in range(40) for origin in batches[k]["origin"]]
    first, second = ([start for source, start in origins if source == wanted] for wanted in (0, 1))
    assert first[:20] != second[:20]


def test_two_ranks_share_the_rows_of_a_mixture(load: Any, mix: dict) -> None:
    """A13: the rows of two ranks equal those of one device, in order."""
    config, tokenizer = load(data=mix)
    data = prepared(config, tokenizer)
    one, *two = (
        data.train_dataset(share)
        for share in (RankShare(4), RankShare(4, 0, 2), RankShare(4, 1, 2))
    )
    for k in range(3):
        assert all(equal(two[rank][k], one[2 * k + rank]) for rank in (0, 1))


def test_two_ranks_share_the_rows_of_one(load: Any) -> None:
    """A13: micro-batch k of rank r of R is micro-batch k * R + r of a single device."""
    config, tokenizer = load()
    data = prepared(config, tokenizer)
    assert data.train_files
    one, first, second = (
        data.train_dataset(share)
        for share in (RankShare(4), RankShare(4, 0, 2), RankShare(4, 1, 2))
    )
    for k in range(3):
        assert equal(first[k], one[2 * k])
        assert equal(second[k], one[2 * k + 1])


def test_two_ranks_share_the_rows_of_one_stream(load: Any) -> None:
    """The same rule for a stream; the cursor differs, for it is of the whole step."""
    config, tokenizer = load(data=STREAM)
    one = list(StreamDataset(config, tokenizer, RankShare(4), range(6), Cursor()))
    for rank in (0, 1):
        mine = list(StreamDataset(config, tokenizer, RankShare(4, rank, 2), range(3), Cursor()))
        for k in range(3):
            assert torch.equal(mine[k]["input_ids"], one[2 * k + rank]["input_ids"])
            assert mine[k]["cursor"] == one[2 * k + 1]["cursor"]


def test_a_stream_loses_no_token(load: Any) -> None:
    """The rows of sequential order, end to end, are the documents with EOS between them, pass after pass."""
    config, tokenizer = load(data=STREAM | {"order": "sequential"}, training={"max_steps": 200})
    inputs = torch.cat(
        [
            batch["input_ids"].flatten()
            for batch in StreamDataset(config, tokenizer, RankShare(4), range(200), Cursor())
        ]
    )
    text = [
        token
        for document in train_documents(config.data, config.training.seed)
        for token in [*tokenizer.encode(document), tokenizer.eos_id]
    ]
    assert len(inputs) > len(text), "the test must see the second pass begin"
    assert inputs.tolist() == (text * 3)[: len(inputs)]


def test_windows_of_a_stream_are_shuffled_but_lose_no_row(load: Any) -> None:
    """A window of 8 rows holds the 8 rows that document order would give, in another order."""
    rows = {}
    for order in ("sequential", "shuffled"):
        config, tokenizer = load(data=STREAM | {"order": order})
        rows[order] = torch.cat(
            [
                batch["input_ids"]
                for batch in StreamDataset(config, tokenizer, RankShare(4), range(4), Cursor())
            ]
        ).tolist()
    assert rows["sequential"][:8] != rows["shuffled"][:8]
    assert sorted(rows["sequential"][:8]) == sorted(rows["shuffled"][:8])
    assert sorted(rows["sequential"][8:]) == sorted(rows["shuffled"][8:])


def test_validation_asks_for_every_token_once(load: Any) -> None:
    """All labels but padding are the validation tokens from the second on, whatever the stride of training."""
    config, tokenizer = load(data={"stride": 3})
    data = prepared(config, tokenizer)
    assert data.val_file is not None
    labels = torch.cat([batch["labels"].flatten() for batch in data.val_dataloader()])
    assert labels[labels != IGNORE_INDEX].tolist() == np.asarray(data.val_file.tokens[1:]).tolist()


def test_validation_is_shared_by_ranks_in_equal_numbers_of_batches(load: Any) -> None:
    """The targets of two ranks equal those of one; a rank without rows gets padding, so that no rank waits."""
    config, tokenizer = load()
    data = prepared(config, tokenizer)
    assert data.val_file is not None
    one = data.val_dataset(RankShare(3))
    ranks = [data.val_dataset(RankShare(3, rank, 2)) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == -(-len(one) // 2)
    counts = [
        sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
        for batches in (one, *ranks)
    ]
    assert counts[0] == counts[1] + counts[2]


def test_no_document_is_in_both_splits(load: Any) -> None:
    """Copies of a document fall on one side: the split looks at the text, not at the line number."""
    config, _ = load()
    path = Path(config.data.dataset)
    path.write_text(path.read_text(encoding="utf-8") * 2, encoding="utf-8")
    train, val = set(train_documents(config.data, 1)), set(val_documents(config.data, 1))
    assert train and val
    assert not train & val


def test_document_masks_count_documents(load: Any) -> None:
    """document_ids rise by one at each EOS of the row."""
    config, tokenizer = load(data={"document_mask": True, "order": "sequential"})
    batch = batches_of(prepared(config, tokenizer))[0]
    for ids, documents in zip(batch["input_ids"], batch["document_ids"], strict=True):
        assert documents[-1] - documents[0] == int((ids[1:] == tokenizer.eos_id).sum())


def test_text_shorter_than_a_row_is_an_error_with_both_counts(load: Any, tmp_path: Path) -> None:
    """E2."""
    (tmp_path / "short.txt").write_text("ab\ncd\nef\ngh\nij\nkl\n", encoding="utf-8")
    config, tokenizer = load(
        data={"dataset": str(tmp_path / "short.txt"), "val_fraction": 0.5}, training={"seq_len": 32}
    )
    with pytest.raises(
        UserError, match=r"gives \d+ training tokens, and one row of training.seq_len needs 33"
    ):
        prepared(config, tokenizer)


def refusal_of(config: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The one line of a run that exits with 2."""
    capsys.readouterr()
    assert train.main(["--config", str(config), *overrides]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.slow
def test_a_run_on_a_mixture_resumes_exactly_and_refuses_other_shares(
    make_config: Callable[..., Path], mix: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From step 4, with two workers in place of none: every number of steps 5 and 6, and the weights, to the
    last bit. A10 for weights and sources.
    """
    config = make_config(data=mix, training={"grad_accum_steps": 2})
    assert train.main(["--config", str(config)]) == 0
    err = capsys.readouterr().err
    assert "corpus.txt (33.3%), " in err and "other.txt (66.7%): train " in err
    source = tmp_path / "checkpoints" / "step-000004.ckpt"
    elsewhere = [
        f"training.checkpoint_dir={tmp_path / 'again'}",
        f"training.log_dir={tmp_path / 'again'}",
        "data.num_workers=2",
    ]
    assert train.main(["--config", str(config), "--resume", str(source), *elsewhere]) == 0
    rows = [
        (tmp_path / folder / "tiny" / "metrics.csv").read_text(encoding="utf-8").splitlines()
        for folder in ("logs", "again")
    ]
    columns = [
        rows[0][0].split(",").index(name)
        for name in ("step", "train_loss", "val_loss", "grad_norm")
    ]
    numbers = [[[row.split(",")[column] for column in columns] for row in run] for run in rows]
    assert numbers[0][-2:] == numbers[1][-2:]
    weights = [
        checkpoint_format.read(tmp_path / folder / "final.ckpt")["weights"]
        for folder in ("checkpoints", "again")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    capsys.readouterr()
    assert (
        eval_val.main(
            [
                "--ckpt",
                str(tmp_path / "checkpoints" / "final.ckpt"),
                "--config",
                str(config),
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["val_loss"] == float(numbers[0][-1][2])

    config = make_config(data=mix, training={"max_steps": 8, "grad_accum_steps": 2})
    parts = mix["mix"]
    changed = refusal_of(
        config, capsys, f"data.mix={json.dumps([parts[0], parts[1] | {'weight': 3}])}"
    )
    assert re.search(
        r"train data \(mix of .*corpus.txt \(25.0%\), .*\) was 1/3 \w+ \+ 2/3 \w+ when it was "
        r"saved, this run has 1/4 \w+ \+ 3/4 \w+\.",
        changed,
    )
    assert "--allow-changes" in changed
    assert "this run has 1 " in refusal_of(config, capsys, f"data.mix={json.dumps(parts[:1])}")
    assert "train data (" in refusal_of(config, capsys, "data.mix=null")


@pytest.mark.slow
def test_a_resumed_run_keeps_the_characters_that_it_learned(
    make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learned from the first documents of what may be a stream: the checkpoint has them, and nothing is read
    to learn them again.
    """
    config = make_config(
        tokenizer={"kind": "char", "unknown": "unk", "learn_docs": 20},
        training={"max_steps": 2, "val_every_steps": 2},
    )
    assert train.main(["--config", str(config)]) == 0
    monkeypatch.setattr("training.tokenizer.training_split", None)
    assert train.main(["--config", str(config), "training.max_steps=4"]) == 0


@pytest.mark.slow
def test_documents_of_a_mixture_that_validate_too_are_counted_and_said(
    make_config: Callable[..., Path],
    mix: dict,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """E13: the validation file is 20 lines of the first source and 10 of the second."""
    lines = [Path(part["dataset"]).read_text(encoding="utf-8").splitlines() for part in mix["mix"]]
    (tmp_path / "val.txt").write_text(
        "\n".join([*lines[0][:20], *lines[1][-10:], "alone"]), encoding="utf-8"
    )
    config = make_config(
        data=mix | {"val_dataset": str(tmp_path / "val.txt")},
        training={"max_steps": 1, "val_every_steps": 1},
    )
    assert train.main(["--config", str(config)]) == 0
    assert (
        "warning: 30 documents of data.val_dataset are also training documents"
        in capsys.readouterr().err
    )


# --- --show-rows ----------------------------------------------------------------------------------


def shown(config: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines that --show-rows prints on stdout."""
    capsys.readouterr()
    program = finetune if "verifier" in config.read_text(encoding="utf-8") else train
    assert program.main(["--config", str(config), *arguments]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("kind", [{}, {"document_mask": True}, {"order": "random"}, STREAM, "mix"])
def test_the_program_prints_the_first_rows_of_the_run(
    make_config: Callable[..., Path],
    load: Any,
    mix: dict,
    kind: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Five rows are micro-batch 0 and one of micro-batch 1.

    A byte of this text is a character, so the text without marks is what training decodes.
    """
    data = mix if kind == "mix" else kind
    config, tokenizer = load(data=data)
    lines = shown(make_config(data=data), capsys, "--show-rows", "5")
    batches = batches_of(prepared(config, tokenizer))
    rows = [
        (k, ids.tolist(), labels.tolist())
        for k in (0, 1)
        for ids, labels in zip(batches[k]["input_ids"], batches[k]["labels"], strict=True)
    ]
    assert len(lines) == 5 * 4
    for place, (k, ids, labels) in enumerate(rows[:5]):
        heading, text, counts, _ = lines[4 * place : 4 * place + 4]
        assert heading.startswith(f"row {place}, micro-batch {k}: ")
        assert re.sub(r"┃\d+┃|[┊⟦⟧]|<\|eos\|>", "", text) == tokenizer.decode([*ids, labels[-1]])
        assert text.count("<|eos|>") == [*ids, labels[-1]].count(tokenizer.eos_id)
        assert ("┃0┃⟦" in text) == ("document_mask" in data)
        assert counts.startswith("16 tokens, targets: 16, documents: ")


def test_the_program_names_the_source_of_each_row_of_a_mixture(
    make_config: Callable[..., Path], mix: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second source has capitals, the first has none."""
    lines = shown(make_config(data=mix), capsys, "--show-rows", "12")
    headings, texts = lines[::4], [re.sub(r"<\|\w+\|>", "", text) for text in lines[1::4]]
    assert {"other.txt" in heading for heading in headings} == {True, False}
    for heading, text in zip(headings, texts, strict=True):
        letters = [character for character in text if character.isalpha()]
        assert not letters or all(
            character.isupper() == ("other.txt from token " in heading) for character in letters
        )


def test_the_program_needs_no_validation_data(
    make_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a stream on the hub it would read thousands of documents to hold some out; here the file is not
    even there.
    """
    assert shown(
        make_config(data={"val_dataset": str(tmp_path / "none.txt")}), capsys, "--show-rows", "1"
    )[0].startswith("row 0, ")
    assert not list((tmp_path / "cache").glob("val-*"))


def test_problems_are_shown_with_the_places_where_an_answer_departs(
    make_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The right answer departs nowhere; the wrong one is the right one outside of the marked places.

    One problem is one row.
    """
    sections = {
        "data": {"task": "gsm8k", "dataset": "smoke", "val_fraction": 0.25},
        "verifier": {"n_wrong": 2},
        "tokenizer": {"kind": "byte"},
    }
    model = {"max_seq_len": 256}
    lines = shown(
        make_config(**sections, model=model, training={"seq_len": 256}), capsys, "--show-rows", "2"
    )
    assert len(lines) == 2 * 3 * 4
    for place in range(2):
        right, *wrong = (lines[4 * (3 * place + number) :][:3] for number in range(3))
        assert right[0].startswith(
            f"row {place}, micro-batch 0, answer 1, right: gsm8k: built-in row "
        )
        assert re.fullmatch(r"⟦.*⟧┊⟦<\|eos\|>.*⟧", right[1]) and right[2].endswith(
            " tokens, departures: 0, documents: 2"
        )
        for number, (heading, text, counts) in enumerate(wrong, start=2):
            assert heading == right[0].replace("answer 1, right", f"answer {number}, wrong")
            before, departs, after = re.fullmatch(
                r"(⟦.*⟧┊⟦<\|eos\|>.*)⟧([\d,.]+)⟦(.*⟧)", text
            ).groups()
            assert right[1].startswith(before) and right[1].endswith(after)
            assert f" tokens, departures: {len(departs)}, " in counts


@pytest.mark.slow
def test_the_tokenizer_is_that_of_the_model_that_a_run_begins_with(
    make_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The config of the second run says nothing of characters."""
    assert (
        train.main(
            [
                "--config",
                str(
                    make_config(
                        tokenizer={"kind": "char"}, training={"max_steps": 1, "val_every_steps": 1}
                    )
                ),
            ]
        )
        == 0
    )
    config = make_config(
        "second.yaml", training={"init_from": str(tmp_path / "checkpoints" / "final.ckpt")}
    )
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    config.write_text(
        yaml.safe_dump(
            {
                name: section
                for name, section in settings.items()
                if name not in ("tokenizer", "model")
            }
        ),
        encoding="utf-8",
    )
    loaded = checkpoint_load.load_model(tmp_path / "checkpoints" / "final.ckpt")
    data = prepared(load_config(config), loaded.tokenizer)
    _, text, _, _ = shown(config, capsys, "--show-rows", "1")
    inputs = batches_of(data)[0]["input_ids"][0].tolist()
    assert loaded.tokenizer.kind == "char"
    assert re.sub(r"[┊⟦⟧]|<\|eos\|>", "", text)[:10] == loaded.tokenizer.decode(inputs)[:10]


def test_no_row_to_print_is_refused(
    make_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--config", str(make_config()), "--show-rows", "0"]) == 2
    assert (
        capsys.readouterr().err
        == "error: --show-rows: must be at least 1, got 0. Give the number of rows to print.\n"
    )


class Screen(io.StringIO):
    """A terminal that remembers what was written to it."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_gets_colors_without_no_color(
    monkeypatch: pytest.MonkeyPatch, no_color: bool
) -> None:
    """Two documents in two colors, and dim where there is no target; with NO_COLOR the marks of a pipe, and
    no color codes.
    """
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv(
        "NO_COLOR", raising=False
    )
    print_rows(
        [InspectedRow("a row\x1b", [97, 98, 258, 99], [98, -100, 99, -100], [0, 0, 1, 1])],
        ByteTokenizer(),
    )
    text = screen.getvalue()
    if no_color:
        assert "┃0┃⟦a⟧b┃1┃⟦<|eos|>⟧c\n" in text
        assert not re.search(r"\x1b\[[\d;]*3\dm", text)
    else:
        assert "\x1b[2;39ma\x1b[0m\x1b[39mb\x1b[0m" in text
        assert "\x1b[2;36m<|eos|>\x1b[0m\x1b[36mc\x1b[0m" in text
        assert "⟦" not in text


@pytest.mark.slow
def test_the_former_program_says_where_it_went() -> None:
    """`python data.py --rows 3` printed rows; the training programs do now."""
    done = programs.run(
        [sys.executable, "data.py", "--config", "config_smoke.yaml", "--rows", "3"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "`python train.py --config ... --show-rows N`" in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_validation_on_the_very_tokens_of_training_is_refused(make_config, tmp_path, capsys):
    """E13 for a token file: val_loss would be that of training."""
    assert train.main(["--config", str(make_config(training={"max_steps": 1}))]) == 0
    (file,) = (tmp_path / "cache").glob("train-*.bin")
    config = make_config(
        data={"dataset": str(file), "val_dataset": str(file)}, training={"max_steps": 1}
    )
    where = [
        f"training.checkpoint_dir={tmp_path / 'again'}",
        f"training.log_dir={tmp_path / 'again'}",
    ]
    assert refusal_of(config, capsys, *where).startswith(
        "error: data.val_dataset: has exactly the tokens of the training data. Give other data"
    )
