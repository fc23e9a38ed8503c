"""Measuring a run: each measurement is compared with a computation by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tinylm.checkpoint import info as checkpoint_info
from tinylm.checkpoint import load as checkpoint_load
from tinylm.config.loader import load_config
from tinylm.config.schema import Config
from tinylm.model.decoder import Decoder
from tinylm.runs import measure
from tinylm.runs.measure import (
    CACHE_SETTINGS,
    CacheSetting,
    RunMeasurements,
    Score,
    attention_shares,
    load_or_measure,
    loss_by_position,
    mean_by_band,
    score_checkpoint,
)
from tinylm.tokenizer.byte_char import ByteTokenizer


@pytest.fixture
def loaded(make_config) -> checkpoint_load.Loaded:
    """An untrained model of 32 positions, seq_len 16; its validation text has about 700 tokens."""
    config = load_config(make_config(model={"n_sinks": 2}))
    tokenizer = ByteTokenizer()
    config = Config.from_plain(
        config.to_plain()
        | {"model": config.to_plain()["model"] | {"vocab_size": tokenizer.vocab_size}}
    )
    torch.manual_seed(0)
    model = Decoder(config.model).eval()
    info = checkpoint_info.CheckpointInfo(
        Path("a.ckpt"), "pretrain", 7, 0, None, None, None, 0, 0, 0.0, "", None, None
    )
    return checkpoint_load.Loaded(model, tokenizer, config, info)


def validation_tokens(loaded: checkpoint_load.Loaded) -> np.ndarray:
    return np.asarray(
        measure.cached_token_file(
            loaded.config.data, "val", loaded.tokenizer, loaded.config.training.seed
        ).tokens
    ).astype(np.int64)


@torch.no_grad()
def test_loss_by_position_is_the_mean_over_rows_at_a_stride(loaded, monkeypatch):
    """-log p of the next token at each of 32 positions, in full rows that begin every 8 tokens."""
    monkeypatch.setattr(measure, "ROW_STRIDE", 8)
    tokens = torch.from_numpy(validation_tokens(loaded))
    expected = []
    for start in range(0, len(tokens) - 32, 8):
        row = tokens[start : start + 33]
        expected.append(
            -loaded.model(row[None, :-1]).log_softmax(dim=-1)[0, torch.arange(32), row[1:]]
        )
    np.testing.assert_allclose(
        loss_by_position(loaded, CacheSetting("a")),
        torch.stack(expected).mean(dim=0).numpy(),
        rtol=1e-5,
    )


@torch.no_grad()
def test_a_cache_of_fixed_size_gives_losses_beyond_max_seq_len(loaded, monkeypatch):
    """The first 20 positions fit into the cache, so they have the losses of the model as built."""
    monkeypatch.setattr(measure, "LONG_ROW", 32)
    built, cached = (
        loss_by_position(loaded, CacheSetting("a")),
        loss_by_position(loaded, CacheSetting("a", 17, 3)),
    )
    np.testing.assert_allclose(cached[:20], built[:20], rtol=1e-5)
    assert np.abs(cached[20:] - built[20:]).max() > 1e-5
    monkeypatch.setattr(measure, "LONG_ROW", 200)
    assert np.isfinite(loss_by_position(loaded, CacheSetting("a", 17, 3))).all()


@pytest.mark.slow
@torch.no_grad()
def test_positions_beyond_the_end_of_the_text_have_no_loss(loaded, monkeypatch):
    monkeypatch.setattr(measure, "LONG_ROW", 4000)
    n = len(validation_tokens(loaded)) - 1
    losses = loss_by_position(loaded, CacheSetting("a", 16))
    assert np.isfinite(losses[:n]).all()
    assert np.isnan(losses[n:]).all()


@torch.no_grad()
def test_the_score_predicts_every_token_but_the_first_once(loaded):
    """The mean over all targets, each predicted from the tokens before it in its row of 16."""
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
    score = score_checkpoint("a", 2, loaded)
    assert len(flat) == len(tokens) - 1
    assert score.val_loss == pytest.approx(flat.mean().item(), rel=1e-5)
    assert (score.run, score.seed, score.step, score.val_ppl) == (
        "a",
        2,
        7,
        pytest.approx(math.exp(score.val_loss)),
    )
    assert score.cache_bytes == 2 * 1 * 2 * 8 * 4


def test_uniform_attention_gives_sinks_and_first_tokens_equal_shares(loaded, monkeypatch):
    """Zero queries make all scores 0.

    At position t there are 2 sinks and t + 1 tokens: shares 2/(t+3) and 4/(t+3) for t = 8 to 15.
    """
    monkeypatch.setattr(measure, "ATTENTION_FROM", 8)
    with torch.no_grad():
        loaded.model.blocks[0].attention.qkv.weight[:16] = 0
    shares = attention_shares(loaded)
    even = np.mean([1 / (t + 3) for t in range(8, 16)])
    assert shares == pytest.approx(
        {"sinks": 2 * even, "sinks_max": 2 * even, "first": 4 * even, "first_max": 4 * even},
        rel=1e-5,
    )


def test_bands_are_means_over_positions_that_have_a_loss():
    """NaN positions are not counted, and a band of only NaN is absent."""
    losses = np.concatenate([np.repeat([4.0, 3.0], [32, 96]), [1.0, 3.0], np.full(300, math.nan)])
    assert mean_by_band(losses) == {"0-31": 4.0, "32-127": 3.0, "128-255": 2.0}


def test_known_words_are_the_words_of_the_training_text(loaded):
    """The text has the word 'guesses' and numbers; the first and last word are not counted."""
    known = measure.training_words(loaded)
    assert "guesses" in known
    assert measure.known_word_share("odel guesses gesses 7x the toke", known) == pytest.approx(
        2 / 4
    )
    assert measure.known_word_share("the model", known) == 0.0


@pytest.mark.slow
def test_long_text_samples_the_requested_number_of_tokens_past_eos(loaded):
    """A raised EOS weight ends texts often; each text begins on a new line."""
    eos, outputs = loaded.tokenizer.eos_id, []
    engine = measure.Engine(loaded.model, loaded.tokenizer)
    generate = engine.generate

    def count(*arguments: object) -> list:
        [output] = generate(*arguments)
        outputs.append(output.ids)
        return [output]

    engine.generate = count
    with torch.no_grad():
        loaded.model.embedding.weight[eos] += 0.3
    text = measure.long_text(engine, "the", 200, 1)
    assert sum(map(len, outputs)) == 200
    assert len(outputs) > 1
    assert all(ids[-1] == eos for ids in outputs[:-1])
    assert text.count("\n") >= len(outputs) - 1


def test_the_name_of_a_cache_setting_says_what_the_cache_keeps():
    assert [CacheSetting("a").name, CacheSetting("a", 64).name, CacheSetting("a", 60, 4).name] == [
        "a, as built",
        "a, last 64",
        "a, first 4 + last 60",
    ]
    assert len({setting.name for setting in CACHE_SETTINGS}) == len(CACHE_SETTINGS)


def score_of(run: str, seed: int, loss: float, step: int = 200) -> Score:
    return Score(run, seed, "pretrain", step, loss, math.exp(loss), loss * 1.5, 1000, 900, 64)


def test_measurements_are_cached_until_the_checkpoints_change(tmp_path, monkeypatch):
    """A run is measured once; a new checkpoint makes it measured again."""
    folder, calls = tmp_path / "runs/gqa-seed2", []
    folder.mkdir(parents=True)
    (folder / "step-000200.ckpt").write_text("one", encoding="utf-8")

    def measure_run(name: str, seed: int, paths: list[Path]) -> RunMeasurements:
        calls.append((name, seed, [path.name for path in paths]))
        return RunMeasurements([score_of(name, seed, 2.0)], {"x": [math.nan, 1.0]})

    monkeypatch.setattr(measure, "measure_run", measure_run)
    for _ in range(2):
        run = load_or_measure("gqa-seed2", folder, tmp_path)
        assert run.scores == [score_of("gqa", 2, 2.0)]
        assert run.position_losses["x"][1] == 1.0
    assert calls == [("gqa", 2, ["step-000200.ckpt"])]
    (folder / "step-000250.ckpt").write_text("two", encoding="utf-8")
    load_or_measure("gqa-seed2", folder, tmp_path)
    assert calls[1:] == [("gqa", 2, ["step-000200.ckpt", "step-000250.ckpt"])]
