"""The lean step gives the logits of the decoder, for every option of the decoder."""

import pytest
import torch
from torch import Tensor

from tests.model.test_decoder import AXES, COMBINED, assert_same, make, some_ids
from tinylm.config.schema import LoraConfig, ModelConfig
from tinylm.generate import lean_step as lean_step_file
from tinylm.generate.decoding import DecodingBatch
from tinylm.generate.lean_step import LeanStep, lean_step
from tinylm.model.decoder import Decoder
from tinylm.model.lora import attach

SIZES = {"depth", "vocab_size", "max_seq_len", "n_layers", "d_model", "n_heads", "head_dim", "d_ff"}
NUMBERS = {"rope_theta", "norm_eps", "rope_scaling", "no_rope_interval", "query_scalar"} | {
    "full_attention_interval",
    "rope_local_theta",
}
IN_TRAINING = {"attention_dropout", "residual_dropout", "init", "gradient_checkpointing"}


def steps(
    model: Decoder, *, batch: int = 3, n_steps: int = 6, ragged: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """The logits (B, V) of both after each of some tokens that follow a prompt of 7; if `ragged`
    of 7, 6, 5, ...
    """
    step, ids = LeanStep(model), some_ids(batch, 7 + n_steps, seed=2)
    caches = [model.new_cache(batch, 32, chunk=3) for _ in range(2)]
    pairs = []
    with torch.inference_mode():
        for cache in caches:
            for row in range(batch):
                one, length = cache.rows(row, row + 1), 7 - row * ragged
                for part in ids[row : row + 1, :length].split(cache.chunk, dim=1):
                    model.features(part, cache=one)
        for t in range(7, 7 + n_steps):
            hidden = model.features(ids[:, t : t + 1], cache=caches[1]).hidden
            pairs.append((step(ids[:, t], caches[0]), model.head(hidden[:, -1])))
    assert caches[0].length == caches[1].length == 7 + n_steps
    return pairs


@COMBINED
def test_its_logits_are_those_of_the_decoder(options):
    """Six steps: a window of 4 with chunks of 3 has 6 slots, so the ring is overwritten."""
    for lean, plain in steps(make(**options)):
        assert_same(lean, plain)


@COMBINED
def test_rows_of_different_lengths_have_the_logits_of_the_decoder(options, monkeypatch):
    """Rows of 5, 6 and 7 to 11, 12 and 13 tokens, which multiples of 4 join and part."""
    monkeypatch.setattr(lean_step_file, "LENGTH_MULTIPLE", 4)
    for lean, plain in steps(make(**options), ragged=True):
        assert_same(lean, plain)


def test_every_option_of_the_decoder_is_in_the_table_of_these_tests():
    """A new field of ModelConfig is an option (then it must be in AXES), a size, or for training."""
    assert set(ModelConfig.model_fields) == set(AXES) | SIZES | NUMBERS | IN_TRAINING


DYNAMIC = {"type": "dynamic", "factor": 3.0, "original_max_seq_len": 8}


@pytest.mark.parametrize(
    "numbers",
    [
        {"rope_theta": 100.0},
        {"norm_eps": 0.1, "qk_norm": True},
        {"rope_scaling": {"type": "linear", "factor": 3.0}},
        {"rope_scaling": DYNAMIC},
    ],
    ids=str,
)
def test_numbers_of_the_config_are_used(numbers):
    for lean, plain in steps(make(**numbers)):
        assert_same(lean, plain)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, {"bias": "all", "norm": "layernorm"}, {"n_kv_heads": 2, "qk_norm": True}]
)
def test_bf16_is_as_close_to_fp32_as_the_decoder_in_bf16(options, batch):
    """Both round at other places: the error of the lean step is at most twice the decoder's."""
    wide, narrow = make(**options), make(**options).bfloat16()
    in_bf16 = steps(narrow, batch=batch)
    in_fp32 = steps(wide, batch=batch)
    for (lean, plain), (_, exact) in zip(in_bf16, in_fp32, strict=True):
        error = (plain.float() - exact).abs().max()
        assert 0 < error < exact.std()
        assert (lean.float() - exact).abs().max() < 2 * error


def test_the_weights_of_the_model_are_left_alone():
    model = make()
    before = {name: (weight.clone(), weight.stride()) for name, weight in model.named_parameters()}
    LeanStep(model)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name][0])
        assert weight.stride() == before[name][1]


@pytest.mark.slow
def test_a_model_with_adapters_in_training_has_no_lean_step():
    """They are beside the matrices that the lean step reads."""
    pytest.importorskip("peft")
    model = make()
    assert isinstance(lean_step(model), LeanStep)
    attach(model, LoraConfig(r=2), seed=0)
    assert lean_step(model) is None


def test_another_device_has_no_lean_step():
    assert lean_step(make().to("meta")) is None


def test_a_batch_decodes_with_the_weights_of_now():
    """The engine of a training run lives on while the weights change in place."""
    model = make(vocab_size=300)
    batch = DecodingBatch(model, slots=2, vocab_size=300)
    for _ in range(2):
        with torch.inference_mode():
            row = batch.start([1, 2, 3], 4)
            batch.decode([5])
            expected = model(torch.tensor([[1, 2, 3, 5]]))[0, -1]
            assert_same(batch.logits[row], expected)
            batch.finish(row)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.5)
