"""Batches of fine-tuning: a deterministic order, the same loss packed or padded, and exact resume."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model import LanguageModule
from tinylm.checkpoint.format import NO_REFERENCES
from tinylm.common.errors import UserError
from tinylm.config.loader import load_config
from tinylm.config.schema import Config
from tinylm.eval.perplexity import byte_length_table, score_batches
from tinylm.model.decoder import Decoder
from tinylm.objectives.cross_entropy import cross_entropy
from tinylm.runs.record import RunRecord
from tinylm.tokenizer.byte_char import ByteTokenizer
from tinylm.tokens.packing import IGNORE_INDEX, Batch, RankShare
from training.build import build_weights
from training.context import ResumeOptions, RunContext
from training.resume import find_resume_state, require_same_data
from training.run import fit
from training.stages.sft import SFT, SFTData

TOKENIZER = ByteTokenizer()


@pytest.fixture
def load(make_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Config]:
    """A config over 61 rows of 8 to 26 tokens, in rows of 32."""
    rows = [
        {"prompt": f"say {'a' * (i % 9)}{i}", "completion": f"{i}{'a' * (i % 7)}"}
        for i in range(61)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def load(**sections: dict) -> Config:
        data = {"dataset": str(path), "template": "plain"} | sections.pop("data", {})
        training = {"seq_len": 32} | sections.pop("training", {})
        return load_config(make_config(data=data, training=training, **sections))

    return load


def prepared(config: Config, first: int = 0) -> SFTData:
    data = SFTData(config, TOKENIZER)
    data.prepare()
    data.start_at(first, None)
    return data


def batches_of(config: Config, first: int = 0) -> list[Batch]:
    return list(prepared(config, first).train_dataloader())


def equal(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


# --- order ---


@pytest.mark.parametrize(
    "kind", [{}, {"packing": "padded"}, {"order": "sequential"}, {"order": "random"}]
)
def test_a_resumed_loader_continues_with_the_same_batches(load: Any, kind: dict) -> None:
    config = load(data=kind, training={"max_steps": 12})
    whole = batches_of(config)
    assert len(whole) == 12
    assert all(equal(a, b) for a, b in zip(whole[5:], batches_of(config, 5), strict=True))


@pytest.mark.slow
def test_the_number_of_workers_does_not_matter(load: Any) -> None:
    """A6."""
    runs = [
        batches_of(load(data={"num_workers": workers}, training={"max_steps": 9}))
        for workers in (0, 1, 2)
    ]
    assert all(equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_each_pass_has_every_example_once_in_another_order(load: Any, packing: str) -> None:
    """A5: row by row, any pass is a permutation of all rows, and with them of all examples."""
    config = load(data={"packing": packing}, training={"micro_batch_size": 1, "max_steps": 200})
    data = prepared(config)
    places = [row for batch in data.train_dataloader() for row in batch["origin"]]
    rows = len({tuple(row) for row in places})
    passes = [
        [place for row in places[start : start + rows] for place in row] for start in (0, rows)
    ]
    assert (
        sorted(passes[0])
        == sorted(passes[1])
        == sorted(example.location for example in data.train_examples)
    )
    assert passes[0] != passes[1]


def test_another_seed_is_another_order(load: Any) -> None:
    """With given rows, since the seed also decides which rows are held out."""
    examples = prepared(load()).train_examples
    origins = []
    for seed in (1, 2):
        data = SFTData(load(training={"seed": seed}, data={"packing": "padded"}), TOKENIZER)
        data.train_examples = examples
        origins.append(data.train_dataset(RankShare(4))[0]["origin"])
    assert origins[0] != origins[1]


@pytest.mark.parametrize("which", ["train", "val"])
def test_ranks_share_the_rows_that_one_device_would_see(load: Any, which: str) -> None:
    """Micro-batch k of rank r of 2 is micro-batch 2k + r of one device; validation may end with
    rows of padding."""
    data = prepared(load(data={"packing": "padded"}))
    data.val_examples = data.train_examples
    dataset = data.train_dataset if which == "train" else data.val_dataset
    single = dataset(RankShare(4))
    for rank in (0, 1):
        for k in (0, 2, 5):
            assert equal(dataset(RankShare(4, rank, 2))[k], single[2 * k + rank])


def test_validation_has_every_example_once_and_is_padded(load: Any) -> None:
    data = prepared(load(data={"val_fraction": 0.3}, training={"micro_batch_size": 4}))
    batches = list(data.val_dataloader())
    targets = sum(int(example.trained.sum()) for example in data.val_examples)
    assert all(batch["labels"].shape == (4, 32) for batch in batches)
    assert sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches) == targets
    assert (
        len(
            list(
                prepared(
                    load(data={"val_fraction": 0.3}, training={"val_batches": 1})
                ).val_dataloader()
            )
        )
        == 1
    )


# --- what the loss sees ---


def loss_of(config: Config, decoder: Decoder) -> tuple[float, int, torch.Tensor]:
    """Loss sum and targets of one pass over all rows, and the gradient of the embedding."""
    data = prepared(config)
    rows = data.rows_of(data.train_examples)
    batch = data.collate()(rows, range(len(rows)))
    decoder.zero_grad()
    features = decoder.features(batch["input_ids"], document_ids=batch.get("document_ids"))
    loss = cross_entropy(
        features.hidden.flatten(0, 1), decoder.head.weight, batch["labels"].flatten()
    )
    loss.backward()
    return (
        loss.item(),
        int((batch["labels"] != IGNORE_INDEX).sum()),
        decoder.embedding.weight.grad.clone(),
    )


@pytest.mark.parametrize("position", ["rope", "learned", "alibi"])
@pytest.mark.parametrize("train_on", ["response", "all"])
def test_packed_and_padded_rows_have_the_same_loss(load: Any, position: str, train_on: str) -> None:
    """An example in a packed row attends only to itself and has positions from 0, as in a row of its own."""
    settings = {"model": {"position": position, "vocab_size": 260}}
    torch.manual_seed(0)
    decoder = Decoder(load(**settings).model).double()
    packed, padded = (
        loss_of(
            load(**settings, data={"packing": packing}, training={"train_on": train_on}), decoder
        )
        for packing in ("packed", "padded")
    )
    assert packed[1] == padded[1] > 100
    assert packed[0] == pytest.approx(padded[0], rel=1e-12)
    torch.testing.assert_close(packed[2], padded[2], rtol=1e-9, atol=1e-12)


def test_without_the_document_mask_the_loss_would_differ(load: Any) -> None:
    """So the test above can fail."""
    settings = {"model": {"vocab_size": 260}}
    torch.manual_seed(0)
    decoder = Decoder(load(**settings).model).eval()
    data = prepared(load(**settings))
    batch = next(iter(data.val_dataloader()))
    scores = [
        score_batches(decoder, [part], byte_length_table(TOKENIZER, 260)).loss
        for part in (batch, {k: v for k, v in batch.items() if k != "document_ids"})
    ]
    assert abs(scores[0] - scores[1]) > 1e-5


def test_packing_saves_rows(load: Any) -> None:
    packed, padded = (prepared(load(data={"packing": packing})) for packing in ("packed", "padded"))
    assert len(packed.rows_of(packed.train_examples)) < 0.6 * len(
        padded.rows_of(padded.train_examples)
    )


# --- notes ---


def test_one_line_describes_the_data(load: Any, tmp_path: Path) -> None:
    data = prepared(load(data={"packing": "padded"}))
    n, m = len(data.train_examples), len(data.val_examples)
    assert n + m == 61
    line = data.describe()
    assert line.startswith(
        f"data: {tmp_path / 'rows.jsonl'}: train {n} examples in {n} rows of 32 ("
    )
    assert line.endswith(
        f"% of the tokens trained (train_on response), validation {m} examples; template plain"
    )
    assert data.notes == []


def test_skipped_and_shared_rows_are_noted(load: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a" * n, "completion": "b"} for n in (1, 2, 40)]
    path = tmp_path / "val.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = prepared(load(data={"dataset": str(path), "val_dataset": str(path)}))
    assert data.notes == [
        "training: kept 2 of 3 rows",
        f"training: skipped 1 row: the prompt fills the context of 32 tokens ({path}:3). Raise "
        f"training.seq_len, or shorten the prompts.",
        "validation: kept 2 of 3 rows",
        f"validation: skipped 1 row: the prompt fills the context of 32 tokens ({path}:3). Raise "
        f"training.seq_len, or shorten the prompts.",
        "warning: 2 validation rows are also training rows; val_loss will be too low",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"val_fraction": 0.2}},
        {"training": {"seq_len": 14}},
        {"training": {"train_on": "all"}},
    ],
)
def test_fingerprints_identify_what_is_trained_on(load: Any, change: dict) -> None:
    same, other = prepared(load()).fingerprints(), prepared(load(**change)).fingerprints()
    assert same == prepared(load()).fingerprints()
    assert same["train"] != other["train"]
    assert same["val"] != other["val"]


# --- a run ---


def tune(config: Config, resume: bool = True) -> int:
    """What finetune.py does, through the parts of a run."""
    context = RunContext("sft", config, "cpu", record=RunRecord())
    found = find_resume_state(context, ResumeOptions(start_new=not resume))
    data = prepared(config)
    decoder = build_weights(config, found, None)
    if found is not None:
        require_same_data(found, data, allow_changes=False)
    byte_lengths = byte_length_table(TOKENIZER, 260)
    module = LanguageModule(config, decoder, byte_lengths, "sft", dict(NO_REFERENCES))
    return fit(context, SFT, module, data, found)


def metrics(config: Config) -> list[dict[str, str]]:
    path = Path(config.training.log_dir) / config.training.run_name / "metrics.csv"
    with open(path, encoding="utf-8") as file:
        return [
            {key: row[key] for key in ("step", "train_loss", "val_loss", "tokens")}
            for row in csv.DictReader(file)
        ]


@pytest.mark.slow
def test_a_run_learns_and_a_resumed_run_is_identical_to_the_bit(load: Any, tmp_path: Path) -> None:
    """A12 for the data: 20 steps at once, and 9 and then 11, have equal losses, which fall."""
    settings = {"model": {"vocab_size": 260}}
    training = {
        "max_steps": 20,
        "val_every_steps": 10,
        "save_every_steps": 3,
        "schedule": "constant",
        "grad_accum_steps": 2,
    }
    whole = load(**settings, training=training)
    assert tune(whole) == 0
    apart = {"checkpoint_dir": str(tmp_path / "apart"), "log_dir": str(tmp_path / "apart_logs")}
    assert tune(load(**settings, training=training | apart | {"max_steps": 9})) == 0
    assert tune(load(**settings, training=training | apart)) == 0
    rows, resumed = metrics(whole), metrics(load(**settings, training=training | apart))
    assert [row for row in rows if row["step"] not in ("9",)] == [
        row for row in resumed if row["step"] not in ("9",)
    ]
    losses = [float(row["train_loss"]) for row in rows]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_resuming_with_other_rows_is_an_error(load: Any, tmp_path: Path) -> None:
    """A10: one answer changed."""
    config = load(model={"vocab_size": 260}, training={"max_steps": 2})
    assert tune(config) == 0
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"60', '"61'), encoding="utf-8")
    with pytest.raises(UserError, match="data .* was .* when it was saved, this run has"):
        tune(load(model={"vocab_size": 260}, training={"max_steps": 4}))
