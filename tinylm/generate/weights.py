"""Weights with fewer bits, and what the rounding costs: bits per byte before and after.

The text that is scored is one that the model writes itself, so that it suits every language and
tokenizer. The rise on it is an estimate of the divergence of the rounded model from the exact one,
per byte: 0 if nothing has changed.
"""

import logging
import math
from dataclasses import dataclass
from typing import Literal

import torch

from tinylm.common.errors import UserError
from tinylm.config.schema import SamplingConfig
from tinylm.generate.engine import Engine, Request
from tinylm.generate.output import Prompt
from tinylm.generate.scoring import Continuation, score_continuations
from tinylm.model.decoder import Decoder
from tinylm.model.hf_model import HFModel
from tinylm.model.int8 import quantize
from tinylm.tokenizer.base import Tokenizer

Precision = Literal["fp32", "bf16", "int8"]
# A rise in bits per byte that is refused. 8 bits cost about 0.001.
MAX_RISE = 0.02
# The text that is scored: as many samples of at most as many tokens.
N_SAMPLES = 4
N_TOKENS = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundingCost:
    """Bits per byte of the model's own text."""

    before: float
    after: float

    @property
    def rise(self) -> float:
        """Bits per byte that the rounding costs."""
        return self.after - self.before


def round_weights(
    model: Decoder | HFModel,
    tokenizer: Tokenizer,
    precision: Precision,
    *,
    max_rise: float = MAX_RISE,
) -> RoundingCost | None:
    """Round the weights of `model` in place, and log what it costs; None for fp32.

    Adapters must have been merged, as `load_model` does.

    Raises:
        UserError: the rise in bits per byte is more than `max_rise`, or int8 is not supported for
        this model or device.
    """
    model.float()
    if precision == "fp32":
        return None
    texts = own_texts(Engine(model, tokenizer, slots=N_SAMPLES))
    before = bits_per_byte(Engine(model, tokenizer), texts)
    if precision == "bf16":
        model.bfloat16()
    elif isinstance(model, Decoder):
        quantize(model)
        model.bfloat16()  # the rest and the cache: 1.1 to 1.3 times as fast, and half the memory
    else:
        raise UserError(
            "--weights",
            "int8 is only supported for the decoder of this project",
            "Import the model first: python -m tinylm import NAME FILE, or use bf16",
        )
    cost = RoundingCost(before, bits_per_byte(Engine(model, tokenizer), texts))
    logger.info(
        "weights: %s, bits per byte of its own text %.4f -> %.4f (%+.4f)",
        *(precision, cost.before, cost.after, cost.rise),
    )
    if not cost.rise <= max_rise:  # also NaN
        problem = (
            f"{precision} raises the bits per byte of the model's own text from "
            f"{cost.before:.4f} to {cost.after:.4f}, by more than {max_rise:g}"
        )
        fix = "Use --weights fp32, or allow it with --max-bpb-rise"
        raise UserError("--weights", problem, fix)
    return cost


def own_texts(engine: Engine) -> list[Continuation]:
    """Texts that the model writes at temperature 1."""
    start = engine.tokenizer.eos_id
    n_tokens = min(N_TOKENS, engine.model.config.max_seq_len)
    sampling = SamplingConfig(max_new_tokens=n_tokens, temperature=1)
    requests = [Request(Prompt((start,)), sampling, sample=number) for number in range(N_SAMPLES)]
    texts = []
    for outputs in engine.run(requests):
        ids = [output.token_id for output in outputs]
        texts.append(Continuation((start, *ids), len(ids)))
    return texts


@torch.inference_mode()
def bits_per_byte(engine: Engine, texts: list[Continuation]) -> float:
    """Bits to store one byte of the texts."""
    nats = 0.0 - sum(score.log_prob for score in score_continuations(engine, texts))
    lengths = engine.tokenizer.byte_lengths()
    n_bytes = sum(lengths[id] for text in texts for id in text.ids[1:])
    return nats / math.log(2) / max(n_bytes, 1)
