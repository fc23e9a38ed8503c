"""Fine-tuning on several files of rows: shares by weight, each file in its own format and template,
passes of each, the side that long examples lose, and an exact resume.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune
import list as list_program
from tests.training.test_train import elsewhere
from tinylm.checkpoint import format as checkpoint_format
from tinylm.config.loader import load_config
from tinylm.config.schema import Config
from tinylm.model.decoder import Decoder
from tinylm.tokenizer.byte_char import ByteTokenizer
from tinylm.tokens.packing import RankShare
from training.stages.sft import SFTData

TOKENIZER = ByteTokenizer()
TINY = {"n_layers": 1, "d_model": 16, "n_heads": 2, "max_seq_len": 64}


@pytest.fixture
def load(make_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Config]:
    """A config over 40 questions of one format (a.jsonl) and 12 chats of another (b.jsonl)."""
    questions = [{"q": f"say {i}", "a": f"{i} " * (1 + i % 3)} for i in range(40)]
    chats = [
        {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "yo"}]}
        for i in range(12)
    ]  # fmt: skip
    for name, rows in (("a", questions), ("b", chats)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    mix = [
        {
            "dataset": str(tmp_path / "a.jsonl"),
            "weight": 3,
            "columns": {"prompt": "q", "completion": "a"},
            "template": "plain",
        },
        {"dataset": str(tmp_path / "b.jsonl"), "weight": 1, "rows": "messages"},
    ]

    def load(**sections: dict[str, Any]) -> Config:
        data = {"dataset": "unused", "mix": mix, "val_fraction": 0.2} | sections.pop("data", {})
        training = {"seq_len": 64, "train_on": "all", "micro_batch_size": 4, "max_steps": 6}
        training |= sections.pop("training", {})
        path = make_config(model=TINY, data=data, training=training, **sections)
        return load_config(path)

    return load


def prepared(config: Config) -> SFTData:
    data = SFTData(config, TOKENIZER)
    data.prepare()
    return data


def test_each_source_is_read_by_its_own_keys_and_template(load: Any) -> None:
    """a.jsonl in `plain`: question, newline, answer, EOS. b.jsonl has no template of its own, so it
    has data.template, `instruction`.
    """
    of_a, of_b = prepared(load()).by_source
    texts = [TOKENIZER.decode(examples[0].ids.tolist()) for examples in (of_a, of_b)]
    number = of_a[0].ids.tolist()[4] - ord("0")
    assert texts[0] == f"say {number}\n" + f"{number} " * (1 + number % 3)
    assert texts[1].startswith("### Instruction: hi ")
    assert texts[1].endswith("\n### Output: yo\n")


def test_weights_are_shares_of_the_rows(load: Any) -> None:
    """1024 rows are a block of the mixture, in which weights 3 and 1 are exactly 768 and 256 rows."""
    data = prepared(load(data={"packing": "padded"}))
    dataset = data.train_dataset(RankShare(1024))
    found = Counter(Path(origin[0]).name[0] for origin in dataset[0]["origin"])
    assert found == {"a": 768, "b": 256}
    n_a, n_b = map(len, data.by_source)
    assert data.source_passes(256, 1) == [768 / n_a, 256 / n_b]


@pytest.mark.slow
def test_passes_of_a_source_count_its_rows_at_any_step(load: Any) -> None:
    """Counted one by one, in the middle of a block too."""
    data = prepared(load(data={"packing": "padded"}))
    for step in (1, 7, 300):
        origins = [data.train_dataset(RankShare(4))[k]["origin"] for k in range(step)]
        n_of_a = sum("a.jsonl" in row[0] for batch in origins for row in batch)
        n_rows = list(map(len, data.by_source))
        expected = [n_of_a / n_rows[0], (4 * step - n_of_a) / n_rows[1]]
        assert data.source_passes(step, 1) == expected


def test_validation_holds_out_rows_of_each_source(load: Any) -> None:
    data = prepared(load())
    names = {Path(example.location).name[0] for example in data.val_examples}
    assert names == {"a", "b"}
    train = {example.location for example in data.train_examples}
    assert not train & {example.location for example in data.val_examples}


def test_an_example_of_a_packed_row_is_as_if_alone(load: Any) -> None:
    """Its logits in a packed row equal those of a row of its own, and a change of its neighbor's
    tokens does not move them: attention and positions stop where an example ends.
    """
    data = prepared(load())
    batch = data.train_dataset(RankShare(1))[0]
    torch.manual_seed(0)
    model = Decoder(data.config.model.model_copy(update={"vocab_size": TOKENIZER.vocab_size}))
    model.eval()
    ids, documents = batch["input_ids"], batch["document_ids"]
    second = documents[0] == 1
    assert second.any() and (documents[0] == 0).any(), "the row must have two examples"
    changed = torch.where(documents == 0, (ids + 1) % 256, ids)
    with torch.no_grad():
        packed = model(ids, document_ids=documents)[0, second]
        beside_another = model(changed, document_ids=documents)[0, second]
        alone = model(ids[:, second])[0]
        mixed_up = model(ids)[0, second]
    assert torch.equal(packed, beside_another)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(packed, mixed_up, atol=1e-3), "without the mask it would see both"


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_chosen_side_is_truncated(load: Any, tmp_path: Path, side: str) -> None:
    """9 tokens (seq_len + 1) of `say 7 and more⏎7 7 7 <|eos|>` are left: the first, or the last."""
    (tmp_path / "one.jsonl").write_text(
        '{"prompt": "say 7 and more", "completion": "7 7 7 "}\n' * 2, encoding="utf-8"
    )
    config = load(
        data={
            "mix": None,
            "dataset": str(tmp_path / "one.jsonl"),
            "val_dataset": str(tmp_path / "one.jsonl"),
            "template": "plain",
            "truncation_side": side,
        },
        training={"seq_len": 8},
    )
    data = prepared(config)
    example = data.train_examples[0]
    whole = TOKENIZER.encode("say 7 and more\n7 7 7 ") + [TOKENIZER.eos_id]
    expected = whole[:9] if side == "right" else whole[-9:]
    assert example.ids.tolist() == expected
    lost = "their end" if side == "right" else "their start"
    assert f"training: 2 of 2 rows lost {lost} to the context of 8 tokens" in data.notes


@pytest.mark.slow
def test_a_stopped_run_on_a_mixture_goes_on_to_the_last_bit(
    load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The order is a function of seed and step: 4 steps and 2 more are the weights of 6 in a row. The
    passes of each source are in the first lines, in metrics.csv and in the list.
    """
    load(training={"schedule": "constant"})
    command = ["--config", str(next(tmp_path.glob("*.yaml")))]
    for folder, steps in (("parted", 4), ("parted", 6), ("whole", 6)):
        changed = [f"training.max_steps={steps}", *elsewhere(tmp_path / folder)]
        assert finetune.main([*command, *changed]) == 0
    err = capsys.readouterr().err
    parted, whole = (
        checkpoint_format.read(tmp_path / folder / "checkpoints" / "final.ckpt")
        for folder in ("parted", "whole")
    )
    assert parted["step"] == whole["step"] == 6
    assert all(torch.equal(parted["weights"][n], w) for n, w in whole["weights"].items())
    passes = whole["source_passes"]
    for number, share in enumerate(("75.0%", "25.0%")):
        line = f".jsonl: {share} of the rows, {passes[number]:.3g} passes"
        assert f"data.mix[{number}]: " in err and line in err
    with open(next((tmp_path / "whole").rglob("metrics.csv")), encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    assert [float(last[f"passes[{number}]"]) for number in range(2)] == passes
    assert list_program.main(["--dir", str(tmp_path / "whole")]) == 0
    assert f"({passes[0]:.2f} {passes[1]:.2f})" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dpo": {}},
            "data.mix: only valid for pretraining and for fine-tuning on answers, not for "
            "preferences. Set data.dataset to one source.",
        ),
        (
            {"verifier": {}, "data": {"truncation_side": "left", "mix": None}},
            "data.truncation_side: only valid for fine-tuning on answers, not for a verifier. "
            "Remove it.",
        ),
        (
            {"data": {"mix": [{"dataset": "missing.jsonl", "weight": 1}]}},
            "data.mix[0].dataset: missing.jsonl: not found",
        ),
    ],
)
def test_what_a_mixture_cannot_be_is_an_error_of_one_line(
    load: Any, tmp_path: Path, capsys: Any, changes: dict[str, Any], message: str
) -> None:
    training = {} if "data" in changes and len(changes) == 1 else {"train_on": "response"}
    load(**changes, training=training)
    assert finetune.main(["--config", str(next(tmp_path.glob("*.yaml")))]) == 2
    assert message in capsys.readouterr().err
