"""Rounded weights: what they cost is measured on the model's own text, and too much is an error."""

import logging
import re

import pytest
import torch

from tests.model.test_decoder import make, some_ids
from tinylm.common.errors import UserError
from tinylm.generate import weights
from tinylm.generate.weights import held_out_texts, round_weights
from tinylm.model.decoder import Decoder
from tinylm.tokenizer.byte_char import ByteTokenizer

BYTES = ByteTokenizer()


def make_model() -> Decoder:
    return make(spread=0.1, vocab_size=BYTES.vocab_size)


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_rounding_costs_little_and_is_logged(precision, caplog):
    """The model's text has up to 8 bits per byte, as its weights are random."""
    model, exact = make_model(), make_model()
    with caplog.at_level(logging.INFO):
        cost = round_weights(model, BYTES, precision)
    assert 6 < cost.before < 8.1
    assert 0 < abs(cost.rise) < 0.02
    with torch.inference_mode():
        assert not torch.equal(model(some_ids()).float(), exact(some_ids()))
    assert re.fullmatch(
        rf"weights: {precision}, bits per byte of its own text \d\.\d{{4}} -> \d\.\d{{4}} "
        r"\([+-]0\.0\d{3}\)",
        caplog.messages[-1],
    )


def test_fp32_changes_nothing():
    model = make_model()
    assert round_weights(model, BYTES, "fp32") is None
    assert isinstance(model.head, torch.nn.Linear)


@pytest.mark.slow
def test_rounding_that_costs_more_than_the_bound_is_refused(monkeypatch):
    """Logits that are 30 times too large, in place of rounding."""
    monkeypatch.setattr(weights, "quantize", lambda model, bits: model.head.weight.data.mul_(30))
    with pytest.raises(UserError) as caught:
        round_weights(make_model(), BYTES, "int8")
    assert re.fullmatch(
        r"--weights: int8 raises the bits per byte of the model's own text from \d+\.\d{4} to "
        r"\d+\.\d{4}, by more than 0.02. Use --weights fp32, or allow it with --max-bpb-rise.",
        str(caught.value),
    )
    assert round_weights(make_model(), BYTES, "int8", max_rise=1000.0).rise > 0.02


def test_held_out_documents_are_cut_to_the_context(monkeypatch):
    """Pieces of at most 3 tokens, each after EOS, 8 tokens in all."""
    monkeypatch.setattr(weights, "N_HELD_OUT", 8)
    eos, found = BYTES.eos_id, held_out_texts(["abcd", "efghijk", "never"], BYTES, 3)
    pieces = [BYTES.decode(text.ids[1:]) for text in found]
    assert pieces == ["abc", "d", "efg", "h"]
    assert {(text.ids[0], len(text.ids) - text.n_target) for text in found} == {(eos, 1)}


@pytest.mark.slow
def test_int8_of_another_kind_of_model_is_refused():
    model = make_model()
    model.__class__ = type("Other", (torch.nn.Module,), dict(vars(Decoder)))
    assert not isinstance(model, Decoder)
    with pytest.raises(UserError) as caught:
        round_weights(model, BYTES, "int8")
    assert str(caught.value) == (
        "--weights: int8 and int4 are only supported for the decoder of this project. Import the model "
        "first: python -m tinylm import NAME FILE, or use bf16."
    )
