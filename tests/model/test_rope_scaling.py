"""Scaled rotary positions: logits are transformers' own for each type, with and without a cache."""

import math

import pytest
import torch
import transformers
from pydantic import ValidationError

from tests.model.test_decoder import make, slow_frequencies
from tinylm.config.model import RopeScalingConfig
from tinylm.config.schema import Config, ModelConfig
from tinylm.interchange import conversion
from tinylm.model.attention_sinks import with_attention_sinks
from tinylm.model.decoder import apply_rotary, rotary_cos_sin
from tinylm.model.rope_scaling import attention_factor, scaled_frequencies, text_lengths

L = 8  # the original context; max_seq_len is 64
SCALINGS = {
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 8.0, "original_max_seq_len": L},
    "yarn": {"type": "yarn", "factor": 8.0, "original_max_seq_len": L},
    "yarn, own numbers": {
        **{"type": "yarn", "factor": 8.0, "original_max_seq_len": L},
        **{"beta_fast": 0.9, "beta_slow": 0.01, "attention_factor": 1.3},
    },
    "llama3": {
        **{"type": "llama3", "factor": 8.0, "original_max_seq_len": L},
        **{"low_freq_factor": 0.02, "high_freq_factor": 1.1},
    },
}
EACH = pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
SHAPE = {"vocab_size": 31, "rope_theta": 300.0, "head_dim": 16, "n_kv_heads": 2}


def some_ids(length: int = 40) -> torch.Tensor:
    return torch.randint(31, (2, length), generator=torch.Generator().manual_seed(1))


@EACH
@torch.no_grad()
def test_logits_are_those_of_transformers_in_a_text_of_five_times_the_original_context(scaling):
    """And the text shows that it is scaled: without, the logits differ."""
    model, plain = make(**SHAPE, rope_scaling=scaling), make(**SHAPE)
    theirs, ids = conversion.to_hf(model), some_ids()
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-5)
    assert (model(ids) - plain(ids)).abs().max() > 0.05


@EACH
@torch.no_grad()
def test_token_by_token_logits_are_those_of_transformers_with_its_cache(scaling):
    """A prompt of 12, longer than the original context, then one token at a time."""
    model, ids = make(**SHAPE, rope_scaling=scaling), some_ids(24)
    theirs = conversion.to_hf(model)
    cache, their_cache = model.new_cache(2), transformers.DynamicCache()
    for piece in ids.split([12] + 12 * [1], dim=1):
        expected = theirs(piece, past_key_values=their_cache, use_cache=True).logits
        torch.testing.assert_close(model(piece, cache=cache), expected, rtol=0, atol=1e-5)


@EACH
def test_settings_and_context_return_from_config_json(scaling):
    config = ModelConfig(**SHAPE, max_seq_len=64, rope_scaling=scaling)
    assert conversion.our_config(conversion.hf_config(config)) == config


@torch.no_grad()
def test_dynamic_changes_no_text_of_the_original_context():
    model, ids = make(**SHAPE, rope_scaling=SCALINGS["dynamic"]), some_ids(L)
    torch.testing.assert_close(model(ids), make(**SHAPE)(ids), rtol=0, atol=1e-6)


@EACH
@torch.no_grad()
def test_a_packed_document_has_the_logits_that_it_has_alone(scaling):
    """Documents of 20, 5 and 15 tokens: for dynamic, each has the frequencies of its own length."""
    model, ids = make(**SHAPE, rope_scaling=scaling), some_ids()
    documents = torch.tensor([20 * [0] + 5 * [1] + 15 * [2]] * 2)
    packed = model(ids, document_ids=documents)
    for found, alone in zip(packed.split([20, 5, 15], 1), ids.split([20, 5, 15], 1), strict=True):
        torch.testing.assert_close(found, model(alone), rtol=0, atol=1e-5)


def test_a_text_is_as_long_as_its_last_position_plus_one():
    assert text_lengths(torch.arange(5, 9)).tolist() == [9, 9, 9, 9]
    assert text_lengths(torch.tensor([[0, 0, 1, 0], [3, 4, 5, 6]])).tolist() == [
        [1, 2, 2, 1],
        [7, 7, 7, 7],
    ]


def test_llama_3_1_keeps_fast_pairs_and_divides_slow_ones_by_8():
    """Its published numbers: wavelengths below 8192/4 positions are kept, above 8192/1 divided."""
    published = {"factor": 8.0, "original_max_seq_len": 8192}
    scaling = RopeScalingConfig(type="llama3", **published)
    config = ModelConfig(rope_theta=5e5, head_dim=128, rope_scaling=scaling)
    plain = torch.tensor([5e5 ** (-i / 64) for i in range(64)], dtype=torch.float64)
    found = scaled_frequencies(plain, 5e5, scaling, None)
    wavelengths = math.tau / plain
    assert torch.equal(found[wavelengths < 2048], plain[wavelengths < 2048])
    torch.testing.assert_close(found[wavelengths > 8192], plain[wavelengths > 8192] / 8)
    expected = torch.tensor(
        slow_frequencies(64, config.rope_theta, config.rope_scaling)[1], dtype=torch.float64
    )
    torch.testing.assert_close(found, expected)


def test_yarn_multiplies_queries_and_keys_by_a_tenth_of_ln_factor_plus_1():
    """Peng et al. 2023, equation 22: for a factor of e, 1.1."""
    scaling = RopeScalingConfig(type="yarn", factor=math.e, original_max_seq_len=L)
    assert attention_factor(scaling) == pytest.approx(1.1)
    cos, sin = rotary_cos_sin(torch.tensor([3]), 16, 300.0, scaling)
    torch.testing.assert_close(cos**2 + sin**2, torch.full((1, 16), 1.21))


def test_the_gradient_of_a_scaled_rotation_is_the_one_that_differences_give():
    scaling = RopeScalingConfig(**SCALINGS["yarn"])
    cos, sin = rotary_cos_sin(torch.arange(3), 4, 300.0, scaling)
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos.double(), sin.double()), x)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"type": "yarn", "factor": 4.0}, "original_max_seq_len: required for type yarn"),
        (
            {"type": "linear", "factor": 4.0, "beta_fast": 16.0},
            r"beta_fast: only valid for type yarn \(type is linear\). Remove it",
        ),
        (
            SCALINGS["yarn"] | {"beta_slow": 64.0},
            r"beta_slow: must be at most beta_fast \(32.0\), got 64.0",
        ),
        (
            SCALINGS["llama3"] | {"low_freq_factor": 2.0},
            r"low_freq_factor: must be less than high_freq_factor \(1.1\), got 2.0",
        ),
    ],
    ids=str,
)
def test_numbers_that_contradict_each_other_are_errors(scaling, words):
    with pytest.raises(ValidationError, match=words):
        RopeScalingConfig(**scaling)


def test_only_rotary_positions_can_be_scaled():
    with pytest.raises(ValidationError, match="rope_scaling: only valid for position rope"):
        ModelConfig(position="alibi", rope_scaling=SCALINGS["linear"])


def test_padded_rows_of_a_verifier_and_streamed_texts_have_no_length_to_scale_by():
    with pytest.raises(ValidationError, match="dynamic is not supported with verifier"):
        Config(model={"rope_scaling": SCALINGS["dynamic"]}, verifier={})
    with pytest.raises(ValueError, match="does not depend on the length"):
        with_attention_sinks(make(rope_scaling=SCALINGS["dynamic"]), window=4, n_first=1)


@torch.no_grad()
def test_attention_sinks_rotate_as_the_model_does():
    model, ids = make(**SHAPE, rope_scaling=SCALINGS["yarn"]), some_ids(20)
    streaming = with_attention_sinks(model, window=17, n_first=3)
    torch.testing.assert_close(streaming(ids), model(ids), rtol=1e-4, atol=1e-4)
