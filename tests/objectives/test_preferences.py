"""Log-probabilities of answers, the preference losses worked by hand, and the metrics of a batch of pairs."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.rows.test_preferences import TOKENIZER, made_of, pair_row  # noqa: F401
from tinylm.config.schema import DpoConfig, ModelConfig
from tinylm.model.decoder import Decoder
from tinylm.objectives import cross_entropy as losses
from tinylm.objectives.preferences import (
    METRICS,
    Answers,
    answer_log_probs,
    compare_pairs,
    preference_loss,
    score_pairs,
)
from tinylm.tokens.example_rows import row_of_examples
from tinylm.tokens.packing import IGNORE_INDEX
from training.stages.reference_log_probs import pair_log_probs


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 5 tokens, so that the tiny examples have several and a shorter last one."""
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 5)


# --- losses ---------------------------------------------------------------------------------------


def answers(seed: int = 0) -> tuple[Answers, Answers, Answers]:
    """Log-probabilities of five pairs, in fp64: under a policy with gradients, under a reference; their lengths."""
    generator = torch.Generator().manual_seed(seed)
    policy = Answers(
        *(
            -20 * torch.rand(5, generator=generator, dtype=torch.float64).requires_grad_()
            for _ in range(2)
        )
    )
    reference = Answers(
        *(-20 * torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(2))
    )
    lengths = Answers(*(torch.randint(1, 9, (5,), generator=generator) for _ in range(2)))
    return policy, reference, lengths


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_log_probability_of_an_answer_is_that_of_its_targets_with_gradients(
    softcap: float | None, small_chunks: None
) -> None:
    """Against torch's log_softmax over all logits; an answer without any target has log p 0."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 9, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(29, 8, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(29, (4, 9), generator=generator)
    labels[0, :5] = labels[1, 3:] = labels[2] = IGNORE_INDEX
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = F.log_softmax(logits, dim=-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    expected = (log_p * (labels != IGNORE_INDEX)).sum(dim=1)
    actual = answer_log_probs(hidden, weight, labels, softcap=softcap)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
    share = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    wanted = torch.autograd.grad((share * expected).sum(), (hidden, weight))
    torch.testing.assert_close(
        torch.autograd.grad((share * actual).sum(), (hidden, weight)),
        wanted,
        rtol=1e-12,
        atol=1e-13,
    )
    assert actual[2].item() == 0


def test_the_dpo_loss_of_one_pair_worked_by_hand() -> None:
    """log p: chosen -2 (reference -3), rejected -4 (reference -3.5): h = 1 - (-0.5) = 1.5; beta 2: beta h = 3.

    sigmoid: ln(1 + e^-3); smoothed by 0.1: 0.9 ln(1 + e^-3) + 0.1 ln(1 + e^3); hinge: max(0, 1 - 3) = 0.
    With lengths 2 and 5, h is 1/2 + 0.5/5 = 0.6 per token: ipo (0.6 - 1/4)^2 = 0.1225, sigmoid ln(1 + e^-1.2).
    Rewards: 2 · 1 and 2 · -0.5.
    """
    policy, reference, lengths = (
        Answers(torch.tensor([a]), torch.tensor([b]))
        for a, b in ((-2.0, -4.0), (-3.0, -3.5), (2, 5))
    )
    expected = {
        DpoConfig(beta=2.0): math.log(1 + math.exp(-3)),
        DpoConfig(beta=2.0, label_smoothing=0.1): 0.9 * math.log(1 + math.exp(-3))
        + 0.1 * math.log(1 + math.exp(3)),
        DpoConfig(beta=2.0, loss="hinge"): 0.0,
        DpoConfig(beta=2.0, loss="ipo"): 0.1225,
        DpoConfig(beta=2.0, length_normalized=True): math.log(1 + math.exp(-1.2)),
    }
    for dpo, loss in expected.items():
        actual = preference_loss(policy, reference, lengths, dpo)
        assert actual.loss.item() == pytest.approx(loss, rel=1e-6)
        assert (actual.chosen_reward.item(), actual.rejected_reward.item()) == (2.0, -1.0)


def without_reference() -> tuple[Answers, Answers]:
    """Two pairs: log p per token -1 and -0.25 (chosen, 2 and 4 tokens), -0.8 and -1.5 (5 and 2)."""
    policy = Answers(torch.tensor([-2.0, -1.0]), torch.tensor([-4.0, -3.0]))
    return policy, Answers(torch.tensor([2, 4]), torch.tensor([5, 2]))


def test_the_simpo_loss_is_that_of_trl_and_of_a_hand_computation() -> None:
    """beta 2, gamma 1: 2 · (-1 + 0.8) - 1 = -1.4 and 2 · (-0.25 + 1.5) - 1 = 1.5, so ln(1 + e^1.4)
    and ln(1 + e^-1.5); trl 1.16.0, CPOTrainer.cpo_loss with loss_type simpo: 1.6204173565 and
    0.2014132887. Null gamma is beta / 2.
    """
    policy, lengths = without_reference()
    by_hand = [math.log(1 + math.exp(1.4)), math.log(1 + math.exp(-1.5))]
    for dpo in (
        DpoConfig(loss="simpo", beta=2.0),
        DpoConfig(loss="simpo", beta=2.0, gamma=1.0),
    ):
        found = preference_loss(policy, None, lengths, dpo)
        assert found.loss.tolist() == pytest.approx(by_hand, rel=1e-6)
        assert found.loss.tolist() == pytest.approx([1.6204173565, 0.2014132887], rel=1e-6)
        assert found.chosen_reward.tolist() == [-2.0, -0.5]
        assert found.rejected_reward.tolist() == pytest.approx([-1.6, -3.0])


def test_the_orpo_loss_is_that_of_trl_and_of_a_hand_computation() -> None:
    """Cross entropies 1 and 0.25, plus 0.1 times -log of the share of the chosen answer's odds:
    odds P / (1 - P) with P = e^-1 and e^-0.8, e^-0.25 and e^-1.5. trl 1.16.0,
    ORPOTrainer.odds_ratio_loss with beta 0.1: 0.0876326710 and 0.0078420071, without the cross
    entropies, and rewards of 0.1 · log P.
    """
    policy, lengths = without_reference()
    found = preference_loss(policy, None, lengths, DpoConfig(loss="orpo", beta=0.1))
    by_hand = []
    for chosen, rejected in ((-1.0, -0.8), (-0.25, -1.5)):
        odds = [math.exp(x) / (1 - math.exp(x)) for x in (chosen, rejected)]
        by_hand.append(-chosen - 0.1 * math.log(odds[0] / sum(odds)))
    assert found.loss.tolist() == pytest.approx(by_hand, rel=1e-6)
    assert found.loss.tolist() == pytest.approx([1.0876326710, 0.2578420071], rel=1e-6)
    assert found.chosen_reward.tolist() == pytest.approx([-0.1, -0.025])
    assert found.rejected_reward.tolist() == pytest.approx([-0.08, -0.15])


def test_orpo_survives_a_certain_answer() -> None:
    """fp32 rounds the probability of a learned answer to 1, whose odds are infinite: the loss is
    the cross entropy (0) and a margin near 0, and no gradient is NaN.
    """
    policy = Answers(torch.zeros(1, requires_grad=True), torch.full((1,), -3.0, requires_grad=True))
    lengths = Answers(torch.tensor([3]), torch.tensor([3]))
    loss = preference_loss(policy, None, lengths, DpoConfig(loss="orpo")).loss
    assert 0 <= loss.item() < 1e-5
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss.sum(), policy))


def test_the_gradient_of_the_dpo_loss_is_that_of_the_paper() -> None:
    """Rafailov et al. 2023, section 4: -beta · σ(rejected reward - chosen reward); the negative for the rejected."""
    policy, reference, lengths = answers()
    result = preference_loss(policy, reference, lengths, DpoConfig(beta=0.3))
    chosen, rejected = torch.autograd.grad(result.loss.sum(), policy)
    expected = -0.3 * torch.sigmoid(result.rejected_reward - result.chosen_reward)
    torch.testing.assert_close(chosen, expected)
    torch.testing.assert_close(rejected, -expected)


def test_a_policy_that_is_its_reference_costs_log_two() -> None:
    """h is 0, so -log σ(0) = ln 2 for any beta and smoothing; the rewards are 0."""
    policy, _, lengths = answers()
    for dpo in (
        DpoConfig(),
        DpoConfig(beta=3.0, label_smoothing=0.2),
        DpoConfig(length_normalized=True),
    ):
        result = preference_loss(policy, Answers(*(part.detach() for part in policy)), lengths, dpo)
        torch.testing.assert_close(result.loss, torch.full((5,), math.log(2), dtype=torch.float64))
        assert not result.chosen_reward.any() and not result.rejected_reward.any()


# --- the metrics of a batch -----------------------------------------------------------------------


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        ModelConfig(
            vocab_size=260,
            n_layers=1,
            d_model=16,
            n_heads=2,
            max_seq_len=64,
            init="trunc_normal",
            residual_dropout=0.2,
        )
    ).eval()


def batch_of(made: list[Any], seq_len: int = 64) -> dict[str, torch.Tensor]:
    """A batch of the four tensors of dpo; `()` is a row of padding."""
    batch = {}
    for number, name in enumerate(("chosen", "rejected")):
        inputs, labels, _ = zip(
            *(
                row_of_examples(pair[number : number + 1], seq_len, TOKENIZER.pad_id)
                for pair in made
            ),
            strict=True,
        )
        batch |= {
            f"{name}_ids": torch.from_numpy(np.stack(inputs)),
            f"{name}_labels": torch.from_numpy(np.stack(labels)),
        }
    return batch


def alone(model: Decoder, example: Any) -> float:
    """log p of an answer by itself: no padding, no other row, all logits."""
    ids = torch.from_numpy(example.ids)
    with torch.no_grad():
        log_p = F.log_softmax(model(ids[None, :-1])[0].double(), dim=-1)
    return (
        log_p.gather(1, ids[1:, None])
        .squeeze(1)[torch.from_numpy(example.trained[1:])]
        .sum()
        .item()
    )


ROWS = [pair_row("q" * n, "good" * (n % 3 + 1), "bad" * (n % 4 + 1)) for n in range(1, 6)]


def test_answers_in_a_batch_have_the_log_probability_that_they_have_alone(made_of, model):
    made, _ = made_of(*ROWS)
    scores = score_pairs(model.features, model.head, batch_of(made))
    assert scores.log_probs.chosen.tolist() == pytest.approx(
        [alone(model, pair.chosen) for pair in made], abs=1e-4
    )
    assert scores.log_probs.rejected.tolist() == pytest.approx(
        [alone(model, pair.rejected) for pair in made], abs=1e-4
    )
    assert scores.lengths.chosen.tolist() == [int(pair.chosen.trained.sum()) for pair in made]
    assert scores.lengths.rejected.tolist() == [int(pair.rejected.trained.sum()) for pair in made]


@pytest.mark.parametrize(
    "dpo",
    [
        DpoConfig(beta=0.5),
        DpoConfig(beta=0.5, loss="ipo"),
        DpoConfig(beta=0.5, length_normalized=True),
    ],
)
def test_metrics_are_sums_over_pairs_and_padding_does_not_count(made_of, model, dpo):
    """By hand: reference -20 and -30 for every pair, beta 0.5, so rewards (log p + 20) / 2 and (log p + 30) / 2."""
    made, _ = made_of(*ROWS)
    chosen, rejected = ([alone(model, pair[number]) for pair in made] for number in (0, 1))
    rewards = [[(c + 20) / 2 for c in chosen], [(r + 30) / 2 for r in rejected]]
    right = sum(a > b for a, b in zip(*rewards, strict=True))
    expected = [
        sum(rewards[0]),
        sum(rewards[1]),
        sum(rewards[0]) - sum(rewards[1]),
        right,
        sum(chosen),
        sum(rejected),
    ]
    for rows in (made, [*made[:2], (), *made[2:], ()]):
        policy = score_pairs(model.features, model.head, batch_of(rows))
        found = compare_pairs(
            policy, Answers(torch.full((len(rows),), -20.0), torch.full((len(rows),), -30.0)), dpo
        )
        assert len(found.loss) == 5
        assert found.loss.isfinite().all()
        assert dict(zip(METRICS, found.metrics.tolist(), strict=True)) == pytest.approx(
            dict(zip(METRICS, expected, strict=True)), abs=1e-3
        )
        per_token = [
            -c / int(pair.chosen.trained.sum()) for c, pair in zip(chosen, made, strict=True)
        ]
        assert found.cross_entropy.tolist() == pytest.approx(per_token, abs=1e-5)


def test_a_batch_of_padding_alone_gives_zero(made_of, model):
    """As on a rank without validation pairs."""
    policy = score_pairs(model.features, model.head, batch_of([(), ()]))
    found = compare_pairs(policy, Answers(torch.zeros(2), torch.zeros(2)), DpoConfig())
    assert found.loss.sum() == 0
    assert found.metrics.tolist() == [0.0] * len(METRICS)


def test_log_probabilities_for_the_cache_are_those_of_the_batches(made_of, model):
    """In the order of the pairs, without padding, dropout or gradients, even for a model in training mode."""
    made, _ = made_of(*ROWS)
    whole = score_pairs(model.features, model.head, batch_of(made)).log_probs
    found = pair_log_probs(
        model.train(), (batch_of(rows) for rows in (made[:2], made[2:4], [made[4], ()])), None
    )
    assert found.dtype == np.float32
    assert found.shape == (5, 2)
    np.testing.assert_allclose(found, torch.stack(whole, dim=1).detach().numpy(), atol=1e-4)


def test_an_ignored_label_is_no_part_of_an_answer(made_of, model):
    """The count of targets, and so what padding is, is read from the labels alone."""
    made, _ = made_of(*ROWS)
    batch = batch_of(made)
    batch["chosen_labels"][0] = IGNORE_INDEX
    scores = score_pairs(model.features, model.head, batch)
    assert (scores.lengths.chosen[0].item(), scores.log_probs.chosen[0].item()) == (0, 0.0)
    assert compare_pairs(
        scores, Answers(torch.zeros(5), torch.zeros(5)), DpoConfig()
    ).loss.shape == (4,)
