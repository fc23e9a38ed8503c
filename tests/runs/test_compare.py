"""What experiments have shown: each measure held against one by hand, and the report against what was measured."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tinylm.checkpoint import info as checkpoint_info
from tinylm.checkpoint import load as checkpoint_load
from tinylm.common.errors import UserError
from tinylm.config.loader import load_config
from tinylm.config.schema import Config
from tinylm.model.decoder import Decoder
from tinylm.runs import compare
from tinylm.runs.compare import (  # fmt: skip
    READINGS,
    Findings,
    Found,
    Reading,
    Result,
    banded,
    evaluate,
    kept_measure,
    loss_by_position,
    score,
    where_heads_look,
    write_report,
)
from tinylm.runs.experiments import Step, plan_steps
from tinylm.tokenizer.byte_char import ByteTokenizer

ROOT = Path(__file__).parents[2]


# --- measuring --------------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(make_config) -> checkpoint_load.Loaded:
    """A small untrained model that reads 32 positions and was trained on 16; its validation text has some 700 tokens."""
    config = load_config(make_config(model={"n_sinks": 2}))
    tokenizer = ByteTokenizer()
    config = Config.from_plain(
        config.to_plain()
        | {"model": config.to_plain()["model"] | {"vocab_size": tokenizer.vocab_size}}
    )
    torch.manual_seed(0)
    model = Decoder(config.model).eval()
    info = checkpoint_info.CheckpointInfo(
        Path("a.ckpt"), "pretrain", 7, 0, None, None, 0, 0, 0.0, ""
    )
    return checkpoint_load.Loaded(model, tokenizer, config, info)


def validation_tokens(loaded: checkpoint_load.Loaded) -> np.ndarray:
    return np.asarray(
        compare.cached_token_file(
            loaded.config.data, "val", loaded.tokenizer, loaded.config.training.seed
        ).tokens
    ).astype(np.int64)


@torch.no_grad()
def test_loss_by_position_is_the_mean_over_rows_that_begin_everywhere(loaded, monkeypatch):
    """By hand: -log p of the token after each of the 32 positions, in rows that begin every 8 tokens and end within the text."""
    monkeypatch.setattr(compare, "ROW_STRIDE", 8)
    tokens = torch.from_numpy(validation_tokens(loaded))
    expected = []
    for start in range(0, len(tokens) - 32, 8):
        row = tokens[start : start + 33]
        expected.append(
            -loaded.model(row[None, :-1]).log_softmax(dim=-1)[0, torch.arange(32), row[1:]]
        )
    np.testing.assert_allclose(
        loss_by_position(loaded, Reading("a")), torch.stack(expected).mean(dim=0).numpy(), rtol=1e-5
    )


@torch.no_grad()
def test_through_a_cache_positions_beyond_the_model_have_a_loss(loaded, monkeypatch):
    """Within the cache of 20 it is that of the model as built; the rows are the same, as both are 32 long."""
    monkeypatch.setattr(compare, "FAR", 32)
    built, cached = (
        loss_by_position(loaded, Reading("a")),
        loss_by_position(loaded, Reading("a", 17, 3)),
    )
    np.testing.assert_allclose(cached[:20], built[:20], rtol=1e-5)
    assert np.abs(cached[20:] - built[20:]).max() > 1e-5
    monkeypatch.setattr(compare, "FAR", 200)
    assert np.isfinite(loss_by_position(loaded, Reading("a", 17, 3))).all()


@torch.no_grad()
def test_a_text_shorter_than_the_reading_leaves_far_positions_without_a_loss(loaded, monkeypatch):
    monkeypatch.setattr(compare, "FAR", 4000)
    n = len(validation_tokens(loaded)) - 1
    losses = loss_by_position(loaded, Reading("a", 16))
    assert np.isfinite(losses[:n]).all()
    assert np.isnan(losses[n:]).all()


@torch.no_grad()
def test_the_score_asks_for_every_token_but_the_first_once(loaded):
    """In rows of 16: the mean over all targets, each with what stands before it in its row."""
    tokens = torch.from_numpy(validation_tokens(loaded))
    losses = [
        torch.nn.functional.cross_entropy(
            loaded.model(tokens[None, start : start + 16][:, : len(tokens) - 1 - start])[0],
            tokens[start + 1 : start + 17],
            reduction="none",
        )
        for start in range(0, len(tokens) - 1, 16)
    ]
    flat = torch.cat(losses)
    found = score("a", 2, loaded)
    assert len(flat) == len(tokens) - 1
    assert found.val_loss == pytest.approx(flat.mean().item(), rel=1e-5)
    assert (found.run, found.seed, found.step, found.val_ppl) == (
        "a",
        2,
        7,
        pytest.approx(math.exp(found.val_loss)),
    )
    assert found.cache_bytes == 2 * 1 * 2 * 8 * 4


def test_heads_that_look_evenly_give_sinks_and_first_tokens_their_share(loaded, monkeypatch):
    """With queries of zero every score is 0. At position t there are 2 sinks and t + 1 tokens: shares 2/(t+3) and 4/(t+3) for t = 8 to 15."""
    monkeypatch.setattr(compare, "MAP_FROM", 8)
    with torch.no_grad():
        loaded.model.blocks[0].attention.qkv.weight[:16] = 0
    shares = where_heads_look(loaded)
    even = np.mean([1 / (t + 3) for t in range(8, 16)])
    assert shares == pytest.approx(
        {"sinks": 2 * even, "sinks, most": 2 * even, "first": 4 * even, "first, most": 4 * even},
        rel=1e-5,
    )


def test_bands_are_means_of_what_is_there():
    """Positions without a loss count in no band, and a band of none is left out."""
    losses = np.concatenate([np.repeat([4.0, 3.0], [32, 96]), [1.0, 3.0], np.full(300, math.nan)])
    assert banded(losses) == {"0-31": 4.0, "32-127": 3.0, "128-255": 2.0}


def test_words_are_known_from_the_training_text(loaded):
    """Its lines are numbered; 'guesses' stands in it and 'gesses' does not. A word at the edge may be cut, and does not count."""
    known = compare.known_words(loaded)
    assert "guesses" in known
    assert compare.share_known("odel guesses gesses 7x the toke", known) == pytest.approx(2 / 4)
    assert compare.share_known("the model", known) == 0.0


def test_a_long_text_has_as_many_tokens_as_were_asked_for_across_the_ends_of_texts(loaded):
    """A head that finds EOS likely ends a text often; each further text begins a line."""
    eos, writes = loaded.tokenizer.eos_id, []
    engine = compare.Engine(loaded.model, loaded.tokenizer)
    generate = engine.generate

    def count(*given: object) -> list:
        [written] = generate(*given)
        writes.append(written.ids)
        return [written]

    engine.generate = count
    with torch.no_grad():
        loaded.model.embedding.weight[eos] += 0.3
    text = compare.long_text(engine, "the", 200, 1)
    assert sum(map(len, writes)) == 200
    assert len(writes) > 1
    assert all(ids[-1] == eos for ids in writes[:-1])
    assert text.count("\n") >= len(writes) - 1


def test_a_reading_says_what_it_keeps():
    assert [Reading("a").name, Reading("a", 64).name, Reading("a", 60, 4).name] == [
        "a, as built",
        "a, last 64",
        "a, first 4 + last 60",
    ]
    assert len({reading.name for reading in READINGS}) == len(READINGS)


# --- the report -------------------------------------------------------------------------------------------------------


def result_of(run: str, seed: int, loss: float, step: int = 200) -> Result:
    return Result(run, seed, "pretrain", step, loss, math.exp(loss), loss * 1.5, 1000, 900, 64)


def found_of(*losses: tuple[str, int, float], **more) -> dict[str, Found]:
    return {
        f"{run}-{seed}": Found(
            [result_of(run, seed, loss + 1, 100), result_of(run, seed, loss)], **more
        )
        for run, seed, loss in losses
    }


def test_the_report_holds_each_run_against_the_base_of_its_own_seed(tmp_path):
    """base 2.0 and 2.2, gqa 2.1 and 2.15: means 2.1 and 2.125, differences +0.1 and -0.05. Only last checkpoints count."""
    found = found_of(("base", 1, 2.0), ("base", 2, 2.2), ("gqa", 1, 2.1), ("gqa", 2, 2.15))
    report = write_report(Findings(found, {}, tmp_path), {}, [])
    assert "2 seeds: val_loss is their mean, and the last column has each by itself." in report
    assert "| base | 1,000 | 900 | 64 | 2.1000 | 3.1500 | +0.0000 +0.0000 |\n" in report
    assert "| gqa | 1,000 | 900 | 64 | 2.1250 | 3.1875 | +0.1000 -0.0500 |\n" in report
    assert report.count("## ") == 2  # the one question with two runs, and the texts


def test_the_report_says_what_is_left_out_and_that_one_seed_decides_little(tmp_path):
    report = write_report(
        Findings(found_of(("base", 1, 2.0)), {"no-norm": "error: the loss is nan"}, tmp_path),
        {},
        [],
    )
    assert "- no-norm: error: the loss is nan\n" in report
    assert "One seed: small differences are chance." in report


def test_the_report_shows_a_dash_where_a_model_has_no_positions(tmp_path):
    bands = {
        "base, as built": {"0-31": 1.5, "32-127": 1.25},
        "base, last 128": {"0-31": 1.5, "32-127": 1.25, "1024-2047": 3.0},
    }
    report = write_report(Findings(found_of(("base", 1, 2.0)), {}, tmp_path), bands, [])
    assert "| base, as built | 1.500 | 1.250 | - | - | - | - |\n" in report
    assert "| base, last 128 | 1.500 | 1.250 | - | - | - | 3.000 |\n" in report


def test_the_report_shows_where_heads_look_and_how_far_words_hold(tmp_path):
    """The means over texts, 0.8 and 0.4 are 60%; the first text alone is shown."""
    found = found_of(
        ("base", 1, 2.0),
        looks={"sinks": 0.0, "sinks, most": 0.0, "first": 0.5, "first, most": 0.75},
    )
    text = {
        "run": "base",
        "seed": 1,
        "prompt": "Attention is",
        "max_new_tokens": 600,
        "words_known_first": 0.9,
    }
    texts = [
        text | {"sample": 1, "text": "one\ntwo", "words_known_last": 0.8},
        text | {"sample": 2, "text": "three", "words_known_last": 0.4},
    ]
    report = write_report(Findings(found, {}, tmp_path), {}, texts)
    assert "| base | 0.0% | 0.0% | 50.0% | 75.0% |\n" in report
    assert "| base | 90% | 60% |\n" in report
    assert "    one\\ntwo\n" in report
    assert "three" not in report


def test_the_report_has_the_scores_of_tasks(tmp_path):
    folder = tmp_path / "tasks/sst2"
    folder.mkdir(parents=True)
    row = {
        "task": "sst2",
        "checkpoint": "hf:gpt2",
        "shots": 4,
        "measure": "accuracy",
        "value": 0.6,
        "low": 0.5,
        "high": 0.7,
    }
    (folder / "results.json").write_text(json.dumps({"measures": [row]}), encoding="utf-8")
    report = write_report(Findings(found_of(("base", 1, 2.0)), {}, tmp_path), {}, [])
    assert "| sst2 | hf:gpt2 | 4 | accuracy | 0.6000 | 0.5000 to 0.7000 |\n" in report


def test_positions_are_means_over_seeds(tmp_path):
    found = {
        f"base-{seed}": Found(
            [result_of("base", seed, 2.0)],
            {reading.name: [float(seed)] for reading in READINGS if reading.run == "base"},
        )
        for seed in (1, 3)
    }
    losses = Findings(found, {}, tmp_path).position_losses()
    assert {name: of.tolist() for name, of in losses.items()} == {
        reading.name: [2.0] for reading in READINGS if reading.run == "base"
    }


def test_without_a_finished_run_there_is_no_report(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    said: list[str] = []
    with pytest.raises(
        UserError, match=r"no finished run\. Run: python -m tinylm experiments --phase pretrain\."
    ):
        evaluate(
            [step for step in plan_steps(tmp_path) if step.phase == "pretrain"],
            tmp_path,
            said.append,
        )
    assert said[0] == "base: left out: not run"


def test_what_was_measured_of_a_run_is_kept_for_its_checkpoints(tmp_path, monkeypatch):
    """A killed evaluation goes on; another checkpoint is measured."""
    folder, times = tmp_path / "runs/gqa-seed2", []
    folder.mkdir(parents=True)
    (folder / "step-000200.ckpt").write_text("one", encoding="utf-8")
    step = Step("pretrain: gqa-seed2", "pretrain", (), folder / "final.ckpt", tmp_path / "output")

    def measure(name: str, seed: int, paths: list[Path]) -> Found:
        times.append((name, seed, [path.name for path in paths]))
        return Found([result_of(name, seed, 2.0)], {"x": [math.nan, 1.0]})

    monkeypatch.setattr(compare, "measure", measure)
    for _ in range(2):
        found = kept_measure("gqa-seed2", step, tmp_path)
        assert found.results == [result_of("gqa", 2, 2.0)]
        assert found.positions["x"][1] == 1.0
    assert times == [("gqa", 2, ["step-000200.ckpt"])]
    (folder / "step-000250.ckpt").write_text("two", encoding="utf-8")
    kept_measure("gqa-seed2", step, tmp_path)
    assert times[1:] == [("gqa", 2, ["step-000200.ckpt", "step-000250.ckpt"])]
