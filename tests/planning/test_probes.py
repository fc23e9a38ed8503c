"""Probes with tiny models: their step is training's step, a batch is learned by heart, the learning
rate is read from a curve.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tinylm.common.errors import Diverged
from tinylm.config.schema import Config
from tinylm.model.decoder import Decoder
from tinylm.planning import probes
from tinylm.planning.memory_plan import with_settings
from tinylm.planning.probes import (
    Probe,
    lr_range_test,
    measure_matmul_flops,
    measure_speed,
    overfit,
    random_batch,
    range_lr,
    suggest_lr,
    without_noise,
)

BASE = {
    "model": {"vocab_size": 50, "n_layers": 1, "d_model": 16, "n_heads": 2, "max_seq_len": 16},
    "training": {"seq_len": 8, "micro_batch_size": 2, "lr": 0.01, "grad_accum_steps": 2},
}


def settings(changes: dict[str, Any] | None = None) -> Config:
    """The settings of a tiny run, some changed by dotted key."""
    return with_settings(Config.model_validate(BASE), changes or {})


def tiny_probe(config: Config) -> Probe:
    """A probe whose model depends only on the seed."""
    torch.manual_seed(0)
    return Probe(Decoder(config.model), config, "cpu")


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_micro_batch_gives_the_mean_loss_of_its_targets(precision):
    """Cross entropy of all logits, from torch; an ignored target does not count."""
    config = settings({"hardware.precision": precision})
    probe, batch = tiny_probe(config), random_batch(config, 2)
    batch["labels"] = batch["labels"].masked_fill(torch.arange(8) < 3, -100)
    logits = probe.model(batch["input_ids"]).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"].flatten())
    assert probe.micro_batch(batch) == pytest.approx(
        expected.item(), rel=1e-6 if precision == "32" else 1e-2
    )


def test_a_step_of_two_micro_batches_is_a_step_of_both_together():
    config = settings({"training.optimizer": "sgd"})
    two, one = tiny_probe(config), tiny_probe(config)
    rows = random_batch(config, 4)
    parts = [
        {name: value[part] for name, value in rows.items()} for part in (slice(0, 2), slice(2, 4))
    ]
    assert two.step(parts, 0.5) == pytest.approx(one.step([rows], 0.5), rel=1e-5)
    for a, b in zip(two.model.parameters(), one.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_the_balance_of_experts_is_part_of_the_loss():
    """The same weights and rows, with the balance loss and without it; it is 1 where all experts are used alike."""
    losses = []
    for coefficient in (0.0, 1.0):
        config = settings({"model.moe": {"n_experts": 4, "top_k": 1, "balance_coef": coefficient}})
        torch.manual_seed(1)
        losses.append(tiny_probe(config).micro_batch(random_batch(config, 2)))
    assert losses[1] - losses[0] > 0.9


# --- overfitting ------------------------------------------------------------------------------------------------------


def test_a_batch_is_learned_by_heart_and_then_the_probe_ends():
    config = settings()
    losses = list(overfit(tiny_probe(config), random_batch(config, 1), 300))
    assert losses[0] == pytest.approx(math.log(50), rel=0.05)
    assert losses[-1] < probes.LEARNED * losses[0] <= min(losses[:-1])
    assert len(losses) < 300


def test_a_rate_of_nothing_learns_nothing():
    losses = list(
        overfit(tiny_probe(settings({"training.lr": 1e-12})), random_batch(settings(), 1), 5)
    )
    assert len(losses) == 5
    assert losses[-1] == pytest.approx(losses[0])


def test_what_is_not_a_number_ends_it():
    config = settings(
        {"training.lr": 1e20, "training.grad_clip": None, "training.optimizer": "sgd"}
    )
    with pytest.raises(Diverged, match=r"step \d+: the loss is (nan|inf)\. Lower training\.lr"):
        list(overfit(tiny_probe(config), random_batch(config, 1), 20))


def test_dropout_and_smoothing_are_left_out():
    quiet = without_noise(
        settings(
            {
                "model.residual_dropout": 0.5,
                "model.attention_dropout": 0.5,
                "training.label_smoothing": 0.5,
            }
        )
    )
    assert quiet == settings()


# --- the learning rate ------------------------------------------------------------------------------------------------


def test_the_rates_of_the_test_rise_by_the_same_factor():
    rates = [range_lr(n, 7) for n in range(7)]
    assert rates == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10])


class ScriptedProbe:
    """Gives losses that were written down, and notes what it is asked for."""

    def __init__(self, losses: list[float], config: Config):
        self.losses, self.config = iter(losses), config
        self.shares: list[float] = []
        self.sizes: list[int] = []

    def step(self, batches: list[Any], share: float) -> float:
        self.shares.append(share)
        self.sizes.append(len(batches))
        return next(self.losses)


def endless() -> Iterator[dict[str, Any]]:
    while True:
        yield {}


def test_the_range_test_ends_when_the_loss_has_doubled():
    """Means of five: 4.0, 3.0, then 3.7 and 4.2 with a 5 and a 6, and with a 40, beyond twice 3.0."""
    scripted = ScriptedProbe([4.0, 2.0, 5.0, 6.0, 40.0, 1.0], settings())
    curve = list(lr_range_test(scripted, endless(), 7))
    assert [loss for _, loss in curve] == [4.0, 2.0, 5.0, 6.0, 40.0]
    assert [lr for lr, _ in curve] == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 0.1])
    assert scripted.shares == pytest.approx([1e-3, 1e-2, 0.1, 1, 10])  # of training.lr 0.01
    assert set(scripted.sizes) == {2}  # grad_accum_steps


def test_the_range_test_ends_at_what_is_not_a_number():
    assert len(list(lr_range_test(ScriptedProbe([4.0, math.nan], settings()), endless(), 7))) == 1


def test_the_suggestion_is_a_third_of_the_first_rate_that_is_good_enough():
    """A fall from 6 to 2, after which 2.1 is within a twentieth: means of five are so flat that the
    first of them is the tenth.
    """
    curve = [
        (10.0**-n, loss)
        for n, loss in zip(range(15, 0, -1), [6.0] * 5 + [2.1] * 5 + [2.0] * 5, strict=True)
    ]
    assert suggest_lr(curve) == pytest.approx(1e-6 / 3)


# --- speed ------------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that a micro-batch moves on by a second a row, and an optimizer's step by four."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_speed_is_tokens_over_the_time_of_a_whole_step(monkeypatch):
    """16 rows in two micro-batches, a second a row, and four seconds of optimizer: 16 · 8 tokens in
    20 s. 8 rows fit into MAX_SECONDS.
    """
    clock = Clock()
    monkeypatch.setattr(probes, "time", clock)
    seen: list[int] = []

    def micro_batch(self: Probe, batch: Any, parts: int = 1) -> float:
        seen.append(len(batch["input_ids"]))
        clock.now += seen[-1]
        return 0.0

    def take_step(self: Probe, share: float = 1.0) -> None:
        clock.now += 4

    monkeypatch.setattr(Probe, "micro_batch", micro_batch)
    monkeypatch.setattr(Probe, "take_step", take_step)
    config = settings({"training.micro_batch_size": 8})
    speed = measure_speed(Decoder(config.model), config, "cpu")
    assert (speed.tokens_per_second, speed.rows) == (16 * 8 / 20, 8)
    assert max(seen) == 8
    config = settings({"training.micro_batch_size": 64})
    speed = measure_speed(Decoder(config.model), config, "cpu")
    assert (speed.tokens_per_second, speed.rows) == (128 * 8 / 132, 20)


def test_a_real_model_has_a_speed():
    config = settings({"data.document_mask": True})
    speed = measure_speed(Decoder(config.model), config, "cpu")
    assert speed.rows == 2
    assert 0 < speed.tokens_per_second < 1e8
    assert measure_matmul_flops(config, "cpu", side=64, rounds=2) > 1e6
