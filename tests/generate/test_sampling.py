"""Logits to the next token: values derived by hand, properties, and transformers' processors as oracle."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm.common.errors import UserError
from tinylm.config.schema import SamplingConfig
from tinylm.generate.sampling import (
    apply_filters,
    apply_penalties,
    divide_by_temperature,
    draw_tokens,
    forbid_repeated_ngrams,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_probabilities,
    make_generator,
    next_token,
    penalize_repetition,
)

INF = math.inf
NOTHING = torch.zeros(1, 0, dtype=torch.long)


def logits_of(*probabilities: float) -> torch.Tensor:
    """One row of logits with these probabilities."""
    return torch.tensor([probabilities]).log()


def kept(logits: torch.Tensor) -> list[int]:
    """The tokens of one row that are still possible."""
    return logits[0].isfinite().nonzero().flatten().tolist()


def draw(
    logits: torch.Tensor, context: torch.Tensor = NOTHING, sample: int = 0, **settings: object
) -> int:
    sampling = SamplingConfig(**settings)
    return next_token(
        logits, context, sampling, [make_generator(sampling.seed, sample)], 0
    ).ids.item()


# --- penalties ------------------------------------------------------------------------------------


def test_penalty_divides_positive_and_multiplies_negative_logits():
    """Penalty 2 with tokens 0, 1, 1, 3 seen: 4/2, -4*2 (once, though seen twice), 1 stays, 0 stays 0."""
    logits = torch.tensor([[4.0, -4.0, 1.0, 0.0]])
    assert penalize_repetition(logits, torch.tensor([[0, 1, 1, 3]]), 2.0).tolist() == [
        [2.0, -8.0, 1.0, 0.0]
    ]


@pytest.mark.slow
@given(
    st.lists(st.floats(-50, 50, width=32), min_size=5, max_size=5),
    st.lists(st.integers(0, 4), max_size=8),
    st.floats(1, 100),
)
def test_penalty_never_rewards(values, seen, penalty):
    """STYLE.md's bug: dividing a negative logit makes its token more probable."""
    logits = torch.tensor([values])
    penalized = penalize_repetition(logits, torch.tensor([seen], dtype=torch.long), penalty)
    assert (penalized <= logits).all()
    unseen = [token for token in range(5) if token not in seen]
    assert penalized[0, unseen].tolist() == logits[0, unseen].tolist()


@pytest.mark.slow
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=3),
    st.integers(1, 11),
)
def test_forbidden_tokens_are_those_that_would_repeat_an_ngram(rows, n):
    """Oracle: every n-gram as a tuple in a set, row by row."""
    expected = [{tuple(row[i : i + n]) for i in range(len(row) - n + 1)} for row in rows]
    found = forbid_repeated_ngrams(torch.zeros(len(rows), 4), torch.tensor(rows), n)
    for row, ngrams, logits in zip(rows, expected, found, strict=True):
        opening = row[len(row) - n + 1 :] if n > 1 else []
        assert [math.isinf(x) for x in logits.tolist()] == [
            (*opening, token) in ngrams for token in range(4)
        ]


@pytest.mark.slow
@given(
    st.lists(st.integers(0, 4), max_size=9),
    st.lists(st.integers(0, 4), max_size=9),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_presence_and_frequency_are_subtracted_by_count_of_the_generated_tokens(
    prompt, new, presence, frequency
):
    """OpenAI's formula, token by token: mu[j] - c[j] * frequency - (c[j] > 0) * presence. The prompt does not count."""
    logits = torch.tensor([[3.0, -2.0, 0.5, 0.0, -INF]])
    expected = []
    for token, logit in enumerate(logits[0].tolist()):
        expected.append(logit - new.count(token) * frequency - (new.count(token) > 0) * presence)
    sampling = SamplingConfig(presence_penalty=presence, frequency_penalty=frequency)
    context = torch.tensor([prompt + new], dtype=torch.long)
    found = apply_penalties(logits, context, sampling, len(new))
    assert found[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_inputs_are_left_as_they_were():
    logits, context = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1, 2, 1]])
    next_token(
        logits,
        context,
        SamplingConfig(repetition_penalty=2.0, no_repeat_ngram=1, top_k=1, top_p=0.5, min_p=0.5),
        [make_generator(0, 0)],
        0,
    )
    assert logits.tolist() == [[1.0, 2.0, 3.0]]


def test_no_token_left_is_an_error_that_names_the_setting():
    """A vocabulary of two, both seen, and no token may occur twice."""
    with pytest.raises(
        UserError,
        match=r"^no_repeat_ngram: 1 leaves no possible token after 2 tokens\. Raise it or lower max_new_tokens\.$",
    ):
        apply_penalties(
            torch.zeros(1, 2), torch.tensor([[0, 1]]), SamplingConfig(no_repeat_ngram=1), 0
        )


# --- filters --------------------------------------------------------------------------------------


def test_temperature_two_takes_the_root_of_the_odds():
    """Probabilities 0.9 and 0.1: exp(log p / 2) gives odds 3 to 1."""
    assert divide_by_temperature(logits_of(0.9, 0.1), 2.0).softmax(-1)[0].tolist() == pytest.approx(
        [0.75, 0.25]
    )


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(temperature):
    """In float32 100/1e-300 is inf and inf - inf is NaN."""
    probabilities = divide_by_temperature(
        torch.tensor([[100.0, 99.0, -100.0]]), temperature
    ).softmax(-1)
    assert probabilities.tolist() == [[1.0, 0.0, 0.0]]
    assert draw(torch.tensor([[-5.0, 99.0, 98.0]]), temperature=temperature) == 1


def test_temperature_zero_takes_the_most_probable_token_with_any_seed():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    assert {draw(logits, temperature=0, seed=seed) for seed in range(20)} == {
        logits.argmax().item()
    }


def test_top_k_keeps_exactly_k_also_among_equals():
    assert kept(keep_top_k(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), 2)) == [1, 2]
    assert len(kept(keep_top_k(torch.zeros(1, 10), 3))) == 3
    assert kept(keep_top_k(torch.zeros(1, 4), 100)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (1e-9, [1]),  # at least one token always
        (0.49, [1]),
        (0.51, [1, 3]),  # 0.5 falls short, so the token that crosses stays
        (0.79, [1, 3]),
        (0.81, [0, 1, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_token_that_crosses_p(p, expected):
    """Probabilities sorted: 0.5, 0.3, 0.15, 0.05 with sums 0.5, 0.8, 0.95, 1."""
    assert kept(keep_top_p(logits_of(0.15, 0.5, 0.05, 0.3), p)) == expected


def test_top_p_one_keeps_the_tail_that_rounding_would_cut():
    """1 + 1e-9 is 1 in float32: the sum before the last token already reaches p."""
    assert len(kept(keep_top_p(torch.tensor([[0.0, *[-25.0] * 99]]), 1.0))) == 100


def test_min_p_is_relative_to_the_most_probable_token():
    """0.3 of 0.5 is 0.15: 0.14 goes, 0.16 stays."""
    assert kept(keep_min_p(logits_of(0.14, 0.5, 0.16, 0.2), 0.3)) == [1, 2, 3]
    assert kept(keep_min_p(logits_of(0.14, 0.5, 0.16, 0.2), 1.0)) == [1]


FILTERS = st.builds(
    SamplingConfig,
    temperature=st.floats(1e-320, 100),
    top_k=st.none() | st.integers(1, 20),
    top_p=st.none() | st.floats(1e-300, 1),
    min_p=st.none() | st.floats(1e-300, 1),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12), FILTERS)
def test_the_most_probable_token_survives_every_filter(values, sampling):
    filtered = apply_filters(torch.tensor([values]), sampling)
    assert not filtered.isnan().any()
    assert filtered[0, filtered.argmax()] == 0
    # 1e-45 apart, divided by a temperature above 1, is 0: such two are equally probable.
    assert values[filtered.argmax()] >= max(values) - 1e-40


# --- drawing --------------------------------------------------------------------------------------


def test_draws_follow_the_probabilities():
    """4000 draws of p = 0.5, 0.3, 0.2: each count within 4 standard deviations, sqrt(n p (1-p)) < 32."""
    logits = logits_of(0.5, 0.3, 0.2).expand(4000, -1)
    generators = [make_generator(0, sample) for sample in range(4000)]
    ids = next_token(
        logits, NOTHING.expand(4000, -1), SamplingConfig(temperature=1.0), generators, 0
    ).ids
    counts = ids.bincount(minlength=3).tolist()
    assert counts == pytest.approx([2000, 1200, 800], abs=128)


def test_draws_are_those_of_multinomial():
    """Token for token, over ten steps of five rows with 300 tokens: torch is the oracle."""
    probabilities = torch.randn(5, 300).softmax(dim=-1)
    ours, oracle = ([make_generator(7, s) for s in range(5)] for _ in range(2))
    for _ in range(10):
        rows = zip(probabilities, oracle, strict=True)
        expected = torch.cat([torch.multinomial(row, 1, generator=g) for row, g in rows])
        assert draw_tokens(probabilities, ours).tolist() == expected.tolist()


def test_a_draw_depends_on_seed_sample_and_step_and_not_on_the_batch():
    """I18: ten steps of three samples together, and of each alone, are the same tokens."""
    logits, sampling = torch.zeros(3, 1000), SamplingConfig(temperature=1.0, seed=5)
    together, alone = (
        [make_generator(5, s) for s in range(3)],
        [make_generator(5, s) for s in range(3)],
    )
    context = NOTHING.expand(3, -1)
    batch = [next_token(logits, context, sampling, together, 0).ids.tolist() for _ in range(10)]
    single = [
        [next_token(logits[:1], NOTHING, sampling, [g], 0).ids.item() for g in alone]
        for _ in range(10)
    ]
    assert batch == single
    assert len({token for step in batch for token in step}) > 25  # the samples and the steps differ


def test_samples_and_seeds_have_streams_of_their_own():
    """torch's CPU generator keeps 32 bits of its seed; none of these may fall on another."""
    places = [(seed, sample) for seed in (0, 1, 2**16, 2**31 - 1) for sample in range(64)]
    assert len(
        {
            torch.rand((), generator=make_generator(*place), dtype=torch.float64).item()
            for place in places
        }
    ) == len(places)


def test_the_log_probability_is_the_models_own():
    """Token 1 has probability 0.2 under the model, even if penalties and filters leave no other token."""
    choice = next_token(
        logits_of(0.5, 0.2, 0.3),
        torch.tensor([[0, 2]]),
        SamplingConfig(no_repeat_ngram=1, temperature=0.1),
        [make_generator(0, 0)],
        0,
    )
    assert choice.ids.tolist() == [1]
    assert choice.log_probs.exp().tolist() == pytest.approx([0.2])


@pytest.mark.parametrize("row", [[1.0, math.nan], [INF, 1.0], [-INF, -INF]])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_an_error_and_no_token(row, temperature):
    with pytest.raises(ValueError, match="logits that are not finite"):
        draw(torch.tensor([[0.0, 0.0], row]), NOTHING.expand(2, -1), temperature=temperature)


def test_a_token_that_the_model_itself_rules_out_is_allowed():
    assert log_probabilities(torch.tensor([[0.0, -INF]])).tolist() == [[0.0, -INF]]


# --- oracle ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_step_equals_transformers():
    """Random logits and contexts through transformers' processors, one by one and in its order."""
    from transformers import generation as hf

    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        logits = 4 * torch.randn(3, 40, generator=generator)
        context = torch.randint(0, 40, (3, 60), generator=generator)
        penalty, p, temperature = (torch.rand(3, generator=generator) + 0.05).tolist()
        n, k = torch.randint(1, 6, (2,), generator=generator).tolist()
        sampling = SamplingConfig(
            temperature=temperature,
            top_k=4 * k,
            top_p=min(p, 1.0),
            min_p=0.02,
            repetition_penalty=1 + penalty,
            no_repeat_ngram=n,
        )
        processors = hf.LogitsProcessorList(
            [
                hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
                hf.NoRepeatNGramLogitsProcessor(n),
                hf.TemperatureLogitsWarper(temperature),
                hf.TopKLogitsWarper(4 * k),
                hf.TopPLogitsWarper(sampling.top_p),
                hf.MinPLogitsWarper(0.02),
            ]
        )
        expected = processors(context, logits).softmax(-1)
        assert torch.allclose(
            apply_filters(apply_penalties(logits, context, sampling, 0), sampling).softmax(-1),
            expected,
            atol=1e-6,
        )
