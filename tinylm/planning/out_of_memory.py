"""What to do when a device has no memory left: an error that names the settings to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

from tinylm.common.errors import UserError, first_line, is_out_of_memory
from tinylm.common.units import size
from tinylm.config.schema import Config
from tinylm.planning.machine_memory import available_bytes

# Bytes for each weight: the weight and its gradient, and what the optimizer keeps.
WEIGHT_BYTES = 8
OPTIMIZER_BYTES = {"adamw": 8, "adamw_plain": 8, "muon": 4, "sgd": 0}
# Bytes for each token of a micro-batch: its id and its label.
TOKEN_BYTES = 16


@contextmanager
def explain_out_of_memory(config: Config, intact: str) -> Iterator[None]:
    """Turn a lack of memory, on any device, or the end of a worker process into a UserError.

    Args:
        config: the settings of the run.
        intact: a sentence about what was not lost.

    Raises:
        UserError: with overrides that halve the memory of a step.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if str(error).startswith(("DataLoader worker (pid", "DataLoader timed out")):
            problem = f"a worker process was killed, possibly out of memory: {first_line(error)}"
            fix = f"Free memory, or lower data.num_workers. {intact}"
            raise UserError("data.num_workers", problem, fix) from None
        if not is_out_of_memory(error):
            raise
        rows, tokens = config.training.micro_batch_size, config.training.seq_len
        raise UserError(
            "out of memory",
            f"a micro-batch of {rows} rows (training.micro_batch_size) of {tokens} tokens "
            f"(training.seq_len) does not fit: {first_line(error)}",
            f"Try {' '.join(_halve(config))}; train.py --plan shows what a run needs. {intact}",
        ) from None


def require_memory(config: Config, device: str) -> None:
    """Raise a UserError if new weights or a micro-batch of packed rows certainly do not fit,
    before anything is allocated: Linux would end the process without a word.

    The bounds are low: matrices with their gradients and optimizer state; for each token its id,
    its label, and the input of each block in 16 bits, which are kept for the backward pass.
    """
    available = available_bytes(device)
    if available is None:
        return
    model, training = config.model, config.training
    assert model.n_kv_heads and model.head_dim and model.d_ff, "resolved by the schema"
    heads = 2 * (model.n_heads + model.n_kv_heads)  # of query, key, value and output
    n_experts = model.moe.n_experts if model.moe else 1
    feed_forward = (3 if model.ffn == "swiglu" else 2) * model.d_ff * n_experts
    rows_of_embedding = (model.vocab_size or 0) * (1 if model.tie_embeddings else 2)
    n_weights = model.d_model * (
        rows_of_embedding + model.n_layers * (heads * model.head_dim + feed_forward)
    )
    n_shards = config.hardware.devices if config.hardware.strategy == "fsdp" else 1
    weights = n_weights * (WEIGHT_BYTES + OPTIMIZER_BYTES[training.optimizer]) // n_shards
    n_tokens = training.micro_batch_size * training.seq_len
    batch = n_tokens * (TOKEN_BYTES + 2 * model.n_layers * model.d_model)
    if weights + batch <= available:
        return
    fix = "Lower training.micro_batch_size or training.seq_len"
    if weights > batch:
        fix = "Lower model.d_model, model.n_layers or model.vocab_size"
    raise UserError(
        "memory",
        f"a step needs at least {size(weights)} for the model and {size(batch)} for a micro-batch, "
        f"but only {size(available)} are available",
        f"{fix}; train.py --plan shows the parts",
    )


def _halve(config: Config) -> Iterator[str]:
    """Overrides with which a step needs about half the memory."""
    training = config.training
    if training.micro_batch_size > 1:
        rows = training.micro_batch_size * training.grad_accum_steps
        size = next(n for n in range(training.micro_batch_size // 2, 0, -1) if rows % n == 0)
        yield f"training.micro_batch_size={size}"
        yield f"training.grad_accum_steps={rows // size}"
    elif not config.model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true"
    else:
        yield f"training.seq_len={max(1, training.seq_len // 2)}"
