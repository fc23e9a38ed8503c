"""Weights with fewer bits, and what the rounding costs: bits per byte before and after.

The text that is scored is one that the model writes itself, so that it suits every language and
tokenizer. The rise on it is an estimate of the divergence of the rounded model from the exact one,
per byte: 0 if nothing has changed. An export that has held-out documents scores those.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tinylm.checkpoint.check import ROUNDED
from tinylm.checkpoint.load import Loaded, load_model
from tinylm.common.errors import UserError
from tinylm.config.schema import SamplingConfig
from tinylm.generate.engine import Engine, Request
from tinylm.generate.output import Prompt
from tinylm.generate.scoring import Continuation, score_continuations
from tinylm.model.decoder import Decoder
from tinylm.model.hf_model import HFModel
from tinylm.model.rounded import GROUP, bits_of_model, quantize
from tinylm.tokenizer.base import Tokenizer

Precision = Literal["fp32", "bf16", "int8", "int4"]
# A rise in bits per byte that is refused. 8 bits cost about 0.001.
MAX_RISE = 0.02
# The text that is scored: as many samples of at most as many tokens.
N_SAMPLES = 4
N_TOKENS = 64
# At most as many tokens of held-out documents, and characters of one of them.
N_HELD_OUT = 4096
N_CHARACTERS = 32768

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


def open_model(path: Path, device: str, precision: Precision | None) -> Loaded:
    """The model in the checkpoint at `path`, to be generated with after `round_weights`."""
    as_stored = ROUNDED if precision is None else (precision,)
    return load_model(path, device, mapped=True, as_stored=as_stored)


def round_weights(
    model: Decoder | HFModel,
    tokenizer: Tokenizer,
    precision: Precision | None,
    *,
    max_rise: float = MAX_RISE,
) -> RoundingCost | None:
    """Round the weights of `model` in place, and log what it costs; None if nothing is rounded.

    Args:
        model: adapters must have been merged, as `open_model` does.
        precision: None: as in the checkpoint.

    Raises:
        UserError: the rise in bits per byte is more than `max_rise`, or the precision is not
            supported for this model or device.
    """
    bits = bits_of_model(model)
    if bits is not None:
        assert precision in (None, f"int{bits}"), "open_model sees to it"
        logger.info("weights: int%d, as in the checkpoint", bits)
        return None
    if precision is None:
        return None
    model.float()
    if precision == "fp32":
        return None
    texts = own_texts(Engine(model, tokenizer, slots=N_SAMPLES))
    before = bits_per_byte(Engine(model, tokenizer), texts)
    if precision in ROUNDED:
        quantize(require_decoder(model), ROUNDED[precision])
        if bits_of_model(model) != ROUNDED[precision]:
            logger.info(
                "weights: no matrix has a shape for 4 bits (outputs in multiples of 16, inputs of "
                "%d): all have 8",
                GROUP,
            )
    # With int8 and int4 the rest and the cache: 1.1 to 1.3 times as fast, and half the memory.
    model.bfloat16()
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


def require_decoder(model: Decoder | HFModel) -> Decoder:
    """The model, if its weights can be rounded to 8 or 4 bits."""
    if isinstance(model, Decoder):
        return model
    raise UserError(
        "--weights",
        "int8 and int4 are only supported for the decoder of this project",
        "Import the model first: python -m tinylm import NAME FILE, or use bf16",
    )


def own_texts(engine: Engine, n_tokens: int = N_TOKENS) -> list[Continuation]:
    """Texts of at most so many tokens that the model writes at temperature 1."""
    start = engine.tokenizer.eos_id
    n_tokens = min(n_tokens, engine.model.config.max_seq_len)
    sampling = SamplingConfig(max_new_tokens=n_tokens, temperature=1)
    requests = [Request(Prompt((start,)), sampling, sample=number) for number in range(N_SAMPLES)]
    texts = []
    for outputs in engine.run(requests):
        ids = [output.token_id for output in outputs]
        texts.append(Continuation((start, *ids), len(ids)))
    return texts


def held_out_texts(
    documents: Iterable[str], tokenizer: Tokenizer, max_seq_len: int
) -> list[Continuation]:
    """The first tokens of documents, in pieces that fit in the context, each after EOS."""
    texts: list[Continuation] = []
    n_left = N_HELD_OUT
    for document in documents:
        ids = tokenizer.encode(document[:N_CHARACTERS])[:n_left]
        n_left -= len(ids)
        for start in range(0, len(ids), max_seq_len):
            piece = ids[start : start + max_seq_len]
            texts.append(Continuation((tokenizer.eos_id, *piece), len(piece)))
        if not n_left:
            break
    return texts


@torch.inference_mode()
def bits_per_byte(engine: Engine, texts: list[Continuation]) -> float:
    """Bits to store one byte of the texts."""
    nats = 0.0 - sum(score.log_prob for score in score_continuations(engine, texts))
    lengths = engine.tokenizer.byte_lengths()
    n_bytes = sum(lengths[id] for text in texts for id in text.ids[1:])
    return nats / math.log(2) / max(n_bytes, 1)
