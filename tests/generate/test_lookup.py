"""Prompt look-up decoding: greedy text as without drafts, in fewer passes where it repeats."""

import pytest
import torch

from tinylm.common.errors import UserError
from tinylm.config.schema import ModelConfig, SamplingConfig
from tinylm.generate.constraint import Constraint
from tinylm.generate.decoding import DecodingBatch
from tinylm.generate.engine import Engine
from tinylm.model.decoder import Decoder
from tinylm.tokenizer.byte_char import ByteTokenizer

BYTES = ByteTokenizer()
OPTIONS = {
    "rope": {},
    "alibi": {"position": "alibi"},
    "learned": {"position": "learned"},
    "window": {"sliding_window": 5},
    "window sinks": {"sliding_window": 5, "n_sinks": 2},
    "experts": {"moe": {"n_experts": 4, "top_k": 2}},
}


def make_engine(scale: float = 6, **options: object) -> Engine:
    torch.manual_seed(0)
    shape = {"vocab_size": 260, "max_seq_len": 64, "n_layers": 2, "d_model": 32, "n_heads": 4}
    model = Decoder(ModelConfig.model_validate(shape | options)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(scale)
    return Engine(model, BYTES)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("tie_embeddings", [True, False], ids=["repeats", "varies"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"frequency_penalty": 1.0}, {"stop": ("ggg", "h")}],
    ids=["plain", "penalty", "stop"],
)
def test_greedy_text_is_as_without_drafts(options, tie_embeddings, settings):
    """90 tokens in a context of 64: the context is shifted; twice, so that the prompt's cache is reused."""
    sampling = SamplingConfig(max_new_tokens=90, temperature=0, **settings)
    prompt = "one two three four. one two three"
    expected = list(make_engine(tie_embeddings=tie_embeddings, **options).stream(prompt, sampling))
    engine = make_engine(tie_embeddings=tie_embeddings, **options)
    for _ in range(2):
        found = list(engine.stream(prompt, sampling, lookup=True))
        assert [one.token_id for one in found] == [one.token_id for one in expected]
        assert [one.text for one in found] == [one.text for one in expected]
        assert [one.log_prob for one in found] == pytest.approx(
            [one.log_prob for one in expected], abs=1e-3
        )
        assert found[-1].finish_reason == expected[-1].finish_reason


def test_a_text_that_repeats_takes_fewer_passes(monkeypatch):
    """The tied model repeats a token: after 5 of them, a pass accepts 8 drafted tokens and one more."""
    n_passes = 0
    for name in ("extend", "decode"):
        original = getattr(DecodingBatch, name)

        def counted(self, ids, original=original):
            nonlocal n_passes
            n_passes += 1
            return original(self, ids)

        monkeypatch.setattr(DecodingBatch, name, counted)
    engine = make_engine(tie_embeddings=True)
    sampling = SamplingConfig(max_new_tokens=60, temperature=0)
    found = list(engine.stream("ab", sampling, lookup=True))
    assert len(found) == 60 and n_passes < 20


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        ({"temperature": 1.0}, {}, "lookup: only valid for one greedy text; set temperature to 0."),
        ({"n_samples": 2}, {}, "lookup: only valid for one greedy text; set n_samples to 1."),
        ({"n_beams": 2}, {}, "lookup: only valid for one greedy text; set n_beams to 1."),
        (
            {},
            {"constraint": Constraint.regex("a")},
            "lookup: cannot be combined with a constraint. Remove one of the two.",
        ),
    ],
)
def test_settings_that_a_draft_cannot_be_combined_with_are_errors(settings, more, message):
    sampling = SamplingConfig.model_validate({"temperature": 0, **settings})
    with pytest.raises(UserError) as caught:
        next(make_engine().stream("ab", sampling, lookup=True, **more))
    assert str(caught.value) == message


def test_a_deterministic_engine_makes_no_drafts():
    engine = Engine(make_engine().model, BYTES, deterministic=True)
    with pytest.raises(UserError, match="^lookup: cannot be combined with deterministic"):
        next(engine.stream("ab", SamplingConfig(temperature=0), lookup=True))
