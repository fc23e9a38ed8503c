"""A checkpoint with the weights alone: an adapter merged, no optimizer, and if wanted rounded.

Every program opens it as any other one. Its matrices are codes and scales in 8 bits, a quarter of
their size, or in 4, a sixth, and the rest is bf16: what `--weights int8` or `int4` computes with, so
that the text is the same. Only generation computes so: training, validation and export read fp32.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint.check import ROUNDED
from tinylm.checkpoint.load import model_of
from tinylm.common.errors import UserError
from tinylm.common.files import require_new
from tinylm.generate.weights import Precision, RoundingCost, require_decoder, round_weights
from tinylm.model.hf_model import HFModel
from tinylm.model.rounded import bits_of, rounded_matrices

# What stays of the state of a run; the rest is for resuming it.
KEPT = ("format", "schema", "stage", "step", "tokens", "passes", "train_loss", "val_loss")
KEPT += ("tokenizer", "system", "data", "versions")


@dataclass(frozen=True)
class Written:
    """The result of `export_checkpoint`."""

    cost: RoundingCost | None
    """of the rounding"""
    bytes_before: int
    """of the weights in fp32, the adapter merged"""
    bytes: int
    """of the file"""


def export_checkpoint(ckpt: Path, out: Path, precision: Precision, *, max_rise: float) -> Written:
    """Write the model in the checkpoint `ckpt` as the new checkpoint `out`.

    Args:
        precision: fp32, int8 or int4.
        max_rise: as in `round_weights`.

    Raises:
        UserError: `out` exists or does not end in .ckpt, `ckpt` is a verifier, or the rounding
            costs too much or is not supported (`round_weights`).
    """
    if out.suffix != ".ckpt":
        raise UserError(out, "the name of a checkpoint must end in .ckpt")
    require_new(out)
    state = checkpoint_format.read(ckpt)
    loaded = model_of(ckpt, state, "cpu")
    model = loaded.model
    new = {key: state[key] for key in KEPT if key in state}
    new |= checkpoint_format.NO_REFERENCES | {
        "created": time.time(),
        "config": loaded.config.model_copy(update={"lora": None}).to_plain(),
        "hf_config": model.settings if isinstance(model, HFModel) else None,
    }
    weights = model.state_dict()
    n_bytes = sum(weight.nbytes for weight in model.parameters())
    cost = None
    if precision in ROUNDED:
        rounded = rounded_matrices(require_decoder(model), ROUNDED[precision])
        if model.config.tie_embeddings:
            del weights["embedding.weight"]  # the matrix of the head
        others = {name: weights[name].bfloat16() for name in weights if name not in rounded}
        cost = round_weights(model, loaded.tokenizer, precision, max_rise=max_rise)
        new |= {"weights": others}
        for key, bits in ROUNDED.items():
            matrices = {name: part for name, part in rounded.items() if bits_of(part) == bits}
            new |= {key: matrices} if matrices else {}
    else:
        new |= {"weights": weights}
    checkpoint_format.write(out, new, "OUT.ckpt")
    return Written(cost, n_bytes, out.stat().st_size)
